"""``prunekit compare``: two runs side by side on a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..files.dotted import flatten, resolved_settings, resolved_text
from ..output import printing
from ..output.formatting import accuracy_of, names_of, number, value_text
from ..runs.records import RESULTS, Comparison, EvaluatorResult, RunResult, damages, read_results
from ..runs.report import headline
from .axes import finite
from .metrics import COSTS, DECODER_FLOPS, FLOPS, REMOVED, Metric, unequal
from .protocols import fact
from .statistics import FEW_WINDOWS, not_paired, paired_bootstrap, windows_of

TAKES = "prunekit compare takes two folders written by prunekit run"

IGNORED = ("output.", "plugins")
"""Prefixes of settings that say where results go, or follow from the components in use."""

CIRCUMSTANCES = {
    "processor", "accelerator", "threads", "torch", "clock", "lm_eval", "dtype", "device", "attention", "meter",
    "pairs", "warmup", "breakdown", "prefill_samples", "decode_samples", "sites", "pruned_perplexity",
    "dense_perplexity", "pruned_seconds", "dense_seconds", "seed",
}  # fmt: skip
"""Protocol keys that do not change a value's meaning: machine, repetitions, and measured values."""

COUNTED = {"windows", "tokens", "pages", "words", "bytes", "documents", "ids_sha256"}
"""Protocol keys that follow from others; they are named only where those are equal."""

OF_THE_MODEL = {"parameters", "parameters_ratio", "weights"}
"""Values that depend on no batch or text."""

MACHINE = ("processor", "accelerator", "threads", "clock")

ABSENT = object()

Line = tuple[str, str, str]
"""Key, A's value, B's value."""


def compare(a: Path, b: Path, samples: int = 10_000, seed: int = 0) -> None:
    """Print how two results folders differ, and the interval of the difference of their perplexities.

    ``samples`` and ``seed`` are of the bootstrap over windows. Raises :class:`SpecError` for a folder without the
    results of one run.
    """
    folders = [Path(a).expanduser(), Path(b).expanduser()]
    first, second = (_one_run(folder) for folder in folders)
    for name, folder, result in zip("AB", folders, (first, second), strict=True):
        printing.say(f"{name}: {folder}", whole=True)
        printing.say(f"   {headline(result)}")
    printing.say("")
    left, right = (resolved_text(folder / "resolved.yaml") for folder in folders)
    tables = {"settings": settings(left, right), "model, machine and versions": origins(first, second)}
    for what, lines in tables.items():
        if lines:
            printing.show_table(("", "A", "B"), lines, left=3, title=f"{what} that differ")
        else:
            printing.say(f"{what} are the same\n")
    printing.show_table(("measurement", "dense", "A", "B", "B to A"), results(first, second), title="results")
    for sentence in [*differences(first, second), *intervals(first, second, samples, seed)]:
        printing.say(sentence)
    for name, result in zip("AB", (first, second), strict=True):
        for sentence in damages(result.metrics, result.recovery is not None):
            printing.warning(f"{name}: {sentence}")


def settings(a: str | None, b: str | None) -> list[Line]:
    """The settings of two resolved pipelines that differ."""
    found = _lines(resolved_settings(a), resolved_settings(b))
    # A component that one side lacks: its options show that already.
    parents = {name[:end] for name, *_ in found for end in range(len(name)) if name[end] == "."}
    return [line for line in found if line[0] not in parents and not line[0].startswith(IGNORED)]


def origins(a: RunResult, b: RunResult) -> list[Line]:
    """Differences in model, calibration text, machine, origin of the components and versions."""
    sides = []
    for result in (a, b):
        found = {f"model {name}": value for name, value in result.model.as_json().items()}
        found["calibration fingerprint"] = result.calibration.fingerprint if result.calibration else None
        for metric in result.metrics:
            found |= {name: value for name, value in metric.protocol.items() if name in MACHINE}
        found["components from"] = sorted(result.plugins)
        sides.append(found | {f"version of {name}": version for name, version in result.versions.items()})
    return _lines(*sides)


def results(a: RunResult, b: RunResult) -> list[tuple[str, str, str, str, str]]:
    """Measurement, dense, A, B and B relative to A, for each value that either has.

    Dense values that differ are both shown; values with different protocols are not related.
    """
    rows = []
    for label in dict.fromkeys(metric.label for result in (a, b) for metric in result.metrics):
        one, other = a.metric(label), b.metric(label)
        sides = [metric for metric in (one, other) if metric]
        for name in dict.fromkeys(name for metric in sides for name in names_of(metric.pruned)):
            pruned = [metric.pruned if metric else {} for metric in (one, other)]
            if all(values.get(name) is None for values in pruned):
                continue
            dense = [value_text(metric.dense, name) if metric else "-" for metric in (one, other)]
            title = label if label == name else f"{label}: {name}"
            unlike = bool(one and other and not_comparable(one, other, name))
            related = "-" if unlike else _relation(name, *pruned)
            shown = dense[0] if dense[0] == dense[1] else " / ".join(dense)
            first, second = (value_text(values, name) for values in pruned)
            rows.append((title.replace("_", " "), shown, first, second, related))
    return rows


def differences(a: RunResult, b: RunResult) -> list[str]:
    """A sentence for every evaluator whose values do not compare, with the differences in its protocol."""
    found = {}
    for one, other in _shared(a, b):
        names = one.pruned.keys() & other.pruned.keys()
        found[one.label] = sorted({text for name in names for text in not_comparable(one, other, name)})
    return [f"{label}: A and B do not compare: {', '.join(texts)}" for label, texts in found.items() if texts]


def not_comparable(one: EvaluatorResult, other: EvaluatorResult, name: str) -> list[str]:
    """What a value depends on and differs between two protocols: ``length 128 against 256``."""
    if name in OF_THE_MODEL:
        return []
    sides = (flatten(found.protocol).items() for found in (one, other))
    # Random ids depend on their number only, not on their seed.
    first, second = ({k: re.sub(r", seed \d+$", "", v) if isinstance(v, str) else v for k, v in side} for side in sides)
    found = {line[0]: line[1:] for line in _lines(first, second) if _matters(line[0], name, first)}
    # Equal tokens compare, whatever their limit was.
    same = {key.rpartition(".")[0] for key in first if key.endswith("ids_sha256") and first[key] == second.get(key)}
    limits = {f"{place}.{key}".removeprefix(".") for place in same for key in ("limit", "documents")}
    found = {key: values for key, values in found.items() if key not in limits}
    causes = {key: values for key, values in found.items() if key.rpartition(".")[2] not in COUNTED} or found
    return [f"{key.replace('_', ' ').replace('.', ' ')} {a} against {b}" for key, (a, b) in causes.items()]


def _matters(key: str, name: str, protocol: Mapping[str, Any]) -> bool:
    """Whether a value depends on a protocol's key: a decoding step's on those of decoding, a task's on its own."""
    last, task = key.rpartition(".")[2], name.removesuffix("_stderr")
    if last in CIRCUMSTANCES or (last.startswith("decode") and not name.startswith("decode")):
        return False
    of_task = any(known.startswith(f"tasks.{task}.") for known in protocol)
    return not (of_task and key.startswith("tasks.")) or key.startswith(f"tasks.{task}.")


def _relation(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    first, second = finite(a.get(name)), finite(b.get(name))
    if first is None or second is None:
        return ""
    if first == second:
        return "same"
    if accuracy_of(a, name) and accuracy_of(b, name):
        return f"{100 * (second - first):+.1f} points"
    if name == "loss" or not first or second / first <= 0:  # a logarithm, or no ratio
        return f"{second - first:+.3g}"
    return f"x {second / first:.3g}"


def _shared(a: RunResult, b: RunResult) -> list[tuple[EvaluatorResult, EvaluatorResult]]:
    return [(metric, other) for metric in a.metrics if (other := b.metric(metric.label))]


def _lines(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Line]:
    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in dict.fromkeys([*left, *right])]
    return [(key, _text(one), _text(other)) for key, one, other in pairs if one != other]


def _text(value: Any) -> str:
    return "-" if value is ABSENT else "none" if value is None else fact(value)


def intervals(a: RunResult, b: RunResult, samples: int, seed: int) -> list[str]:
    """A sentence for every perplexity that both runs measured: its interval, or why there is none."""
    pairs = [pair for pair in _shared(a, b) if pair[0].evaluator == "perplexity"]
    if not pairs:
        return ["no interval: the runs share no perplexity measurement"]
    prints = [str(result.model.fingerprint)[:12] for result in (a, b)]
    if a.model.fingerprint != b.model.fingerprint:
        return [f"no interval: the dense models differ (fingerprints {prints[0]} and {prints[1]})"]
    costs = unequal_costs(a, b)
    return [_interval(one, other, samples, seed, costs) for one, other in pairs]


def unequal_costs(a: RunResult, b: RunResult) -> str:
    """``, at unequal cost (A removed 15.0% of the decoder's parameters, B 20.0%)``; empty if the costs are equal."""
    found = []
    decoder = all(_share(result, DECODER_FLOPS) is not None for result in (a, b))
    for metric in (REMOVED, DECODER_FLOPS if decoder else FLOPS):
        first, second = (_share(result, metric) for result in (a, b))
        if unequal(first, second):
            found.append(f"A {COSTS[metric.key].format(metric.text(first))}, B {metric.text(second)}")
    return f", at unequal cost ({'; '.join(found)})" if found else ""


def _share(result: RunResult, metric: Metric) -> float | None:
    cost = next((found.pruned for found in result.metrics if found.evaluator == metric.label), {})
    return finite(result.ratio.parameters_cut if metric is REMOVED else cost.get(metric.name))


def _interval(a: EvaluatorResult, b: EvaluatorResult, samples: int, seed: int, costs: str) -> str:
    first, second, why = windows_of(a), windows_of(b), not_paired(a, b)
    if why or first is None or second is None:
        return f"{a.label}: no interval: {why}"
    found, windows = paired_bootstrap(first, second, samples, seed), first.shape[1]
    if found is None:
        return f"{a.label}: no interval: the perplexities are too large"
    difference, ratio = found
    significant = ratio.low > 1 or ratio.high < 1
    result = "which excludes 0" if significant else "which includes 0: the difference is not significant"
    few = f" With only {windows} windows it is too narrow." if windows < FEW_WINDOWS else ""
    value, low, high = (("-" if end < 0 else "+") + number(abs(end)) for end in difference)
    return (
        f"{a.label}: B - A = {value}{costs}, 95% interval {low} to {high}, {result}; B / A = {ratio.value:.4f}, "
        f"{ratio.low:.4f} to {ratio.high:.4f}. Paired bootstrap over {windows} windows, {samples:,} samples, seed "
        f"{seed}; it covers the choice of text, not of seeds.{few}"
    )


def _one_run(folder: Path) -> RunResult:
    if folder.is_file():
        raise SpecError(f"{folder} is a file, and {TAKES}; prunekit report shows the store of a study")
    if not (folder / RESULTS).is_file():
        what = f"is not a results folder (no {RESULTS} in it)" if folder.is_dir() else "does not exist"
        raise SpecError(f"{folder} {what}; {TAKES}")
    found = read_results(folder)
    if isinstance(found, Comparison):
        raise SpecError(
            f"{folder} holds {len(found.runs)} runs, and compare takes folders of one run each; "
            "prunekit report compares them all"
        )
    return found
