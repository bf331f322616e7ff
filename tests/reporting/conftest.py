"""Synthetic trials of the shape that runs have: every evaluator, details included, without running a model."""

import random
from pathlib import Path

import pytest
import yaml
from prunekit.compress.ablation.published import Published
from prunekit.compress.reporting.trials import Study, Trial
from prunekit.compress.runs.records import RunResult

LAYERS = 8
TOKENS = [127.0] + [128.0] * 29
PARTS = ("attention", "mlp", "head", "other")
HARM = {"random": 2.2, "magnitude": 2.4, "wanda_sp": 1.12, "flap": 1.25, "pp": 1.0, "full_batch_probing": 0.94}
"""How much perplexity each strategy loses, relative to PP."""
STRATEGIES = tuple(HARM)
MACHINE = {"processor": "Some Processor", "threads": 2, "torch": "2.13.0"}
SETTING = {"dtype": "float32", "device": "cpu", "attention": "sdpa"}


def outcome(evaluator, dense, pruned, protocol=None, details=None, notes=(), label=None):
    """What one evaluator found, as results.json has it."""
    return {
        "evaluator": evaluator, "label": label or evaluator, "dense": dense, "pruned": pruned,
        "protocol": {**(protocol or {}), **SETTING}, "details": details or {}, "notes": list(notes), "seconds": 1.0,
    }  # fmt: skip


def perplexity(value, seed=0, dense=24.0, ids="a" * 64, noise=0.01):
    """An outcome whose windows have losses that add up to the given perplexity."""
    from math import exp, log

    text, own = random.Random(1), random.Random(f"{value} {seed}")
    hard = [text.gauss(0, 0.3) for _ in TOKENS]  # some windows are harder, for every model alike
    side = {}
    for name, mean in (("dense", dense), ("pruned", value)):
        extra = [h + own.gauss(0, noise) for h in hard]
        level = log(mean) - sum(t * e for t, e in zip(TOKENS, extra, strict=True)) / sum(TOKENS)
        losses = [t * (level + e) for t, e in zip(TOKENS, extra, strict=True)]
        side[name] = {"window_losses": losses, "window_tokens": TOKENS}
    values = {name: exp(sum(found["window_losses"]) / sum(TOKENS)) for name, found in side.items()}
    protocol = {"text": "bundled reference-evaluation", "window": 128, "windows": len(TOKENS), "tokens": 3839,
                "batch_size": 20, "ids_sha256": ids, "separator": "\n\n"}  # fmt: skip
    both = [{"perplexity": values[name], "loss": log(values[name])} for name in ("dense", "pruned")]
    return outcome("perplexity", both[0], both[1], protocol, side)


def run_data(strategy="pp", ratio=0.4, seed=0, ids="a" * 64, harm=None):
    """A run's results with every built-in evaluator and one that nobody knows."""
    harm = HARM.get(strategy, 1.0) if harm is None else harm
    probe = {"pp": 0.02, "full_batch_probing": 0.55}.get(strategy, 0.0)
    flops, time = 1 - 0.8 * ratio + probe, 1 - 0.8 * ratio + 3 * probe
    value = 24.0 * (1 + harm * ratio * (1 + 0.01 * seed))
    dense_parts = {"attention_projections": 30.0, "attention_scores": 8.0, "mlp": 50.0, "head": 10.0, "other": 2.0}
    parts = {name: amount * (1 - ratio if name in ("attention_projections", "mlp") else 1)
             for name, amount in dense_parts.items()}  # fmt: skip
    seconds = {"attention": 0.04 * (1 - ratio), "mlp": 0.05 * (1 - ratio), "head": 0.008, "other": 0.002}
    steps = {"select": 0.001, "probe": 0.03 * probe + 0.001, "gather": 0.003, "score": 0.0, "history": 0.002}
    dense_seconds = {"attention": 0.04, "mlp": 0.05, "head": 0.008, "other": 0.002}
    overlap = {kind: [None] + [0.9 - 0.04 * layer for layer in range(1, LAYERS)] for kind in ("attention", "mlp")}
    chance = {kind: [None] + [0.43] * (LAYERS - 1) for kind in ("attention", "mlp")}
    saved = time < 1
    metrics = [
        perplexity(value, seed, ids=ids),
        outcome("zero_shot", {"mean": 0.61, "boolq": 0.7, "piqa": 0.52},
                {"mean": 0.61 - 0.2 * ratio * harm / 2, "boolq": 0.65, "boolq_stderr": 0.02, "piqa": 0.5,
                 "piqa_stderr": 0.02}, {"tasks": ["boolq", "piqa"], "few_shot": 0}),
        outcome("cost", {"flops": 100.0, "parameters": 1000, **dense_parts, "probe": 0.0},
                {"flops": 100 * flops, "flops_ratio": flops, "floor_ratio": 1 - 0.8 * ratio, "parameters": 700,
                 "parameters_ratio": 0.7, **parts, "probe": 100 * probe}, {"batch_size": 20, "length": 256}),
        outcome("latency", {"prefill_seconds": 0.1},
                {"prefill_seconds": 0.1 * time, "prefill_ratio": time, "prefill_ratio_min": time - 0.03,
                 "prefill_ratio_max": time + 0.04, "decode_ratio": 0.95}, {"pairs": 5, **MACHINE},
                {"pruned": {"breakdown": {"pruned": {**seconds, **(steps if probe else {})}, "dense": dense_seconds}}}),
        outcome("memory", {"prefill_peak": 4e8, "weights": 3e8}, {"prefill_peak": 3.6e8, "weights": 3e8}),
        outcome("prr", {}, {"prr": (value - 24) / (0.1 - 0.1 * time) if saved else None}, {},
                notes=() if saved else ["prr: no time saved: a batch takes longer"]),
        outcome("similarity", None, {"cka": 0.9, "svcca": 0.8}, {}, {"pruned": {"cka": [0.9] * LAYERS}}),
        outcome("overlap", {}, {"full_batch": 0.7, "between_batches": 0.9, "chance": 0.43}, {"batches": 4},
                {"pruned": {"full_batch": overlap, "between_batches": overlap, "chance": chance}}),
        outcome("strangers_own", {"score": 3.5}, {"score": 2.25, "shape": "round"}, {"made_by": "a plugin"}),
    ]  # fmt: skip
    kept = [{"layer": i, "attention": {"kept": 8 if i == 0 else 5, "units": 8},
             "mlp": {"kept": 512 if i == 0 else round(512 * (1 - ratio)), "units": 512}}
            for i in range(LAYERS)]  # fmt: skip
    return {
        "format": 1, "started": "2026-01-02T03:04:05+00:00", "strategy": strategy, "attention_unit": "kv_group",
        "ratio": {"asked": ratio, "units_cut": ratio, "prunable_parameters_cut": ratio}, "metrics": metrics,
        "model": {"name": "bundled", "parameters": 5_800_000, "architecture": "LlamaForCausalLM",
                  "fingerprint": "f" * 64, "commit": None, **SETTING},
        "calibration": {"text": "bundled docstrings-calibration", "sequences": 32, "length": 256, "seed": seed,
                        "fingerprint": "c" * 64},
        "layers": kept, "seeds": {"pipeline": seed}, "plugins": {"prunekit 0.1.0": ["strategies/pp"]},
        "versions": {"python": "3.11.7", "prunekit": "0.1.0", "torch": "2.13.0"}, "notes": [],
        "seconds": {"total": 12.5},
    }  # fmt: skip


def run_result(*args, only=None, **options):
    """:func:`run_data` as a record, with the evaluators of ``only`` if that is given."""
    data = run_data(*args, **options)
    data["metrics"] = [found for found in data["metrics"] if only is None or found["label"] in only]
    return RunResult.model_validate(data)


def resolved(strategy="pp", ratio=0.4, **prune):
    """A resolved pipeline."""
    prune = {"use": strategy, "ratio": ratio, "skip_layers": [0], **prune}
    evaluate = [{"name": "perplexity", "window": 128}, {"name": "cost", "length": 256}]
    return yaml.safe_dump({"prune": prune, "evaluate": evaluate, "output": {"trace": False}, "seed": 0})


@pytest.fixture(name="run_data")
def _run_data():
    return run_data


@pytest.fixture(name="run_result")
def _run_result():
    return run_result


@pytest.fixture(name="outcome")
def _outcome():
    return outcome


@pytest.fixture(name="perplexity")
def _perplexity():
    return perplexity


@pytest.fixture(name="resolved")
def _resolved():
    return resolved


@pytest.fixture
def make_study():
    """A study of strategies x ratios x seeds; ``extra`` trials come after, ``only`` names evaluators."""

    def make(strategies=STRATEGIES, ratios=(0.2, 0.4), seeds=(0,), published=(), extra=(), **options):
        trials = []
        for strategy in strategies:
            for ratio in ratios:
                for seed in seeds:
                    settings = {"prune.use": strategy, "prune.ratio": ratio, "seed": seed}
                    result = run_result(strategy, ratio, seed, **options)
                    pipeline = resolved(strategy, ratio)
                    trials.append(Trial(len(trials) + 1, settings, "done", result, pipeline, None, 12.5))
        axes = {"prune.use": list(strategies), "prune.ratio": list(ratios), "seed": list(seeds)}
        trials += [Trial(len(trials) + 1 + i, *rest) for i, rest in enumerate(extra)]
        text = "title: Strategies compared\nvary:\n  prune.use: [pp]\n"
        entries = tuple(Published(**entry) for entry in published)
        return Study("Strategies compared", Path("study.sqlite"), tuple(trials), axes, entries, text)

    return make
