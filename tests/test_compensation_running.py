"""Compensation while a model runs: per batch, over the steps of a generation, and without a trace afterwards."""

import copy
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from prunekit.compress import prune
from torch import nn
from transformers import DynamicCache

PROBING = {"name": "least_squares", "probe": 0.5}
CHECKED = {"name": "least_squares", "check": True}
ALL_SEEN = {"probe": 1.0, "selector": "whole_batch"}


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@contextmanager
def recorded(cuts):
    """Collects, for every run of a consumer, its site, what it computes with, what enters it and what it gives."""
    runs = []

    def hook(cut):
        def record(module, args, output):
            probe = cut.shared.running.batch.probe
            if probe is None or not probe.is_running:
                x, y = (t.reshape(-1, t.shape[-1]).double() for t in (args[0], output))
                runs.append((cut.site, cut.kept, *cut.consumer_weights(), x, y))

        return record

    handles = [cut.binding.consumer.register_forward_hook(hook(cut), prepend=True) for cut in cuts]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


# Where every batch decides.


def test_pivot_and_solve_are_one_and_usual_is_less(make_model, batches):
    model = make_model("llama-gqa")
    ids = batches[0]["input_ids"]

    def by_way(**options):
        found = []
        for way in ("solve", "pivot", "usual"):
            compensate = {"name": "least_squares", "per_batch": way}
            with prune(model, "pp", ratio=0.4, calibration=batches, compensate=compensate, **options):
                found.append(logits(model, ids))
        return found

    solve, pivot, usual = by_way()
    torch.testing.assert_close(pivot, solve, atol=1e-4, rtol=1e-4)
    assert (usual - solve).abs().max() > 0.01
    # Where every batch keeps what calibration alone would, there is nothing to correct.
    solve, pivot, usual = by_way(merger={"name": "history_only", "momentum": 1.0}, selector="whole_batch")
    torch.testing.assert_close(pivot, solve, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(usual, solve, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compensator", ["probe_mean", "least_squares", "low_rank_least_squares"])
@pytest.mark.parametrize("family, strategy", [("llama-gqa", "full_batch_probing"), ("opt", "wanda_sp")])
def test_a_probe_that_sees_all_keeps_the_mean_of_the_batch(make_model, batches, family, strategy, compensator):
    """Calibrated on other text: only the probe can know this batch's mean."""
    model = make_model(family)
    ids = batches[3]["input_ids"]
    off = []
    for compensate in ({"name": compensator, **ALL_SEEN}, "mean"):
        with prune(model, strategy, ratio=0.4, calibration=batches[:2], compensate=compensate) as pruned:
            with recorded(pruned._engine.cuts[:1]) as runs:
                logits(model, ids)
                with pruned.dense():
                    logits(model, ids)
        (_, kept, *_, cut), (_, none, *_, dense) = runs
        assert kept is not None and none is None
        off.append((cut.mean(0) - dense.mean(0)).abs().max())
    assert off[0] < 1e-5
    assert off[1] > 1e-3


# Where the cut is made once and a probe of every batch corrects its bias.


@pytest.mark.parametrize("compensate", ["probe_mean", PROBING])
def test_a_probed_mean_changes_the_bias_alone(make_model, batches, compensate):
    model = make_model("llama-gqa")
    counts = Counter()

    def count(stage):
        counts[stage] += 1
        return nullcontext()

    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate=compensate) as pruned:
        with pruned.watch(count), recorded(pruned._engine.cuts) as runs:
            for batch in batches[:3]:
                logits(model, batch["input_ids"])
                assert counts["gather"] == 3 * 7, "every linear layer of the blocks once, in the first batch"
    by_site = [runs[start::6] for start in range(6)]
    for first, second, third in by_site:
        assert first[1] is second[1] is third[1], "the kept units"
        assert first[2] is second[2] is third[2], "the consumer's weight"
        assert not torch.equal(first[3], second[3]) and not torch.equal(second[3], third[3])
    assert counts["probe"] == 3 * 6


def generated(model, prompts, steps=4):
    """Greedy continuations, decoding step by step in turns; the logits of every prompt's steps, stacked."""
    caches = [DynamicCache(config=model.config) for _ in prompts]
    last, found = list(prompts), [[] for _ in prompts]
    with torch.no_grad():
        for _ in range(steps):
            for i, cache in enumerate(caches):
                found[i].append(model(last[i], past_key_values=cache).logits[:, -1])
                last[i] = found[i][-1].argmax(-1, keepdim=True)
    return [torch.stack(steps) for steps in found]


CACHED = [
    ("wanda_sp", "probe_mean", {}),
    ("flap", PROBING, {}),
    ("pp", PROBING, {"merger": {"momentum": 1.0}}),
    ("pp", "low_rank_least_squares", {"merger": {"momentum": 1.0}}),
    ("wanda_sp", CHECKED | {"probe": 0.5}, {}),
    ("pp", CHECKED, {"merger": {"momentum": 1.0}}),
    ("wanda_sp", {"name": "mean", "check": True}, {}),
]


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("strategy, compensate, options", CACHED)
def test_decode_steps_compute_with_the_weights_of_the_prefill(
    make_model, batches, family, strategy, compensate, options
):
    """An unpruned model whose consumers have the prefill's weights, zero where units are dropped, and its biases."""
    model = make_model(family)
    oracle = copy.deepcopy(model)
    prompt = batches[0]["input_ids"][:, :10]
    options = dict(ratio=0.4, calibration=batches, compensate=compensate, **options)
    with prune(model, strategy, **options) as pruned, recorded(pruned._engine.cuts) as runs:
        (found,) = generated(model, [prompt])
    for site, kept, weight, bias, *_ in runs[:6]:
        consumer = oracle.get_submodule(site.consumer)
        if kept is not None:
            consumer.weight.data.zero_()[:, site.columns(kept)] = weight
            consumer.bias = nn.Parameter(bias, requires_grad=False)
    (expected,) = generated(oracle, [prompt])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("strategy, compensate, options", CACHED)
def test_interleaved_generations_keep_their_own_compensation(make_model, batches, strategy, compensate, options):
    model = make_model("llama-gqa")
    prompts = [b["input_ids"][:2, :12] for b in batches[:2]]
    options = dict(ratio=0.4, calibration=batches, compensate=compensate, **options)
    with prune(model, strategy, **options) as pruned:
        with recorded(pruned._engine.cuts[-1:]) as runs:
            alone = [generated(model, [prompt])[0] for prompt in prompts]
        assert not torch.equal(runs[0][3], runs[4][3]), "the prompts must differ in their bias"
        pruned.reset()
        together = generated(model, prompts)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# What is left of it.


def state_of(model):
    """What a removal must bring back: values, and for every module its class, attributes and number of hooks."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {
        name: (type(m), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return values, modules


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("strategy, compensate, options", CACHED)
def test_nothing_is_left_also_after_an_exception(make_model, batches, family, strategy, compensate, options):
    model = make_model(family)
    ids = batches[0]["input_ids"]
    (values, modules), dense = state_of(model), logits(model, ids)

    def fail(module, args):
        raise KeyboardInterrupt

    options = dict(ratio=0.4, calibration=batches, compensate=compensate, **options)
    with prune(model, strategy, **options) as pruned:
        expected = logits(model, ids)
        assert list(model.state_dict()) == list(values)  # leaves weights stored by rows: other rounding until dense()
        with pruned.dense():
            assert torch.equal(logits(model, ids), dense)
        for index in (0, -1):
            handle = pruned._engine.cuts[index].binding.consumer.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                logits(model, batches[1]["input_ids"])
            handle.remove()
        pruned.reset()
        assert torch.equal(logits(model, ids), expected)
        with pruned.suspended():
            assert state_of(model)[1] == modules
            assert torch.equal(logits(model, ids), dense)
    after, left = state_of(model)
    assert left == modules
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("strategy, compensate, options", CACHED)
def test_bfloat16_stays_bfloat16(make_model, batches, strategy, compensate, options):
    """Statistics and solutions are float32; what the model computes with is rounded once."""
    model = make_model("opt").bfloat16()
    ids = batches[0]["input_ids"]
    found = {}
    for applier in ("slice", "zero"):
        with (
            prune(
                model, strategy, ratio=0.4, calibration=batches, compensate=compensate, applier=applier, **options
            ) as p,
            recorded(p._engine.cuts) as runs,
        ):
            found[applier] = logits(model, ids)
            assert {tensor.dtype for run in runs for tensor in run[2:4]} == {torch.bfloat16}
            assert {cut.history.mean.dtype for cut in p._engine.cuts} == {torch.float32}
    assert found["slice"].dtype == torch.bfloat16
    assert found["slice"].isfinite().all()
    torch.testing.assert_close(found["slice"].float(), found["zero"].float(), atol=0.15, rtol=0.05)


# Layer by layer.


def first_of_layer_1(model, batches, allocator, **options):
    """What enters and leaves layer 1's attention output on the calibration text, and its kept channels."""
    compensate = {"name": "least_squares", "ridge": 1e-4}
    options = dict(calibration=batches, allocator=allocator, compensate=compensate, **options)
    with prune(model, "magnitude", **options) as pruned, recorded(pruned._engine.cuts[2:3]) as runs:
        for batch in batches:
            logits(model, batch["input_ids"])
        return [torch.cat([run[i] for run in runs]) for i in (4, 5)]


def test_sequential_calibration_sees_compensated_predecessors(make_model, batches):
    """Layer 1's error is uncorrelated with what it keeps, as it enters behind layer 0's compensated cut."""
    model = make_model("llama-gqa")
    everywhere = {"name": "explicit", "attention": [0.5] * 3, "mlp": [0.4] * 3}
    layer_0 = {"name": "explicit", "attention": [0.5, 0, 0], "mlp": [0.4, 0, 0]}
    _, whole = first_of_layer_1(model, batches, layer_0)
    left = []
    for sequential in (True, False):
        x, y = first_of_layer_1(model, batches, everywhere, sequential=sequential)
        error, x = whole - y, x - x.mean(0)
        left.append(float((error.T @ x).norm() / error.norm() / x.norm() + error.mean(0).norm() / error.std(0).norm()))
    assert left[0] < 1e-3
    assert left[1] > 0.05


def test_sequential_calibration_reckons_with_calibrated_means(make_model, batches):
    """No probe runs while it calibrates; afterwards one does."""
    model = make_model("llama-gqa")
    means, outputs = [], []
    for compensate in ("mean", "probe_mean"):
        options = dict(ratio=0.4, calibration=batches, sequential=True, compensate=compensate)
        with prune(model, "wanda_sp", **options) as pruned:
            means.append([cut.history.mean for cut in pruned._engine.cuts])
            outputs.append(logits(model, batches[0]["input_ids"]))
    assert all(torch.equal(a, b) for a, b in zip(*means, strict=True))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("strategy, compensate, options", [*CACHED, ("wanda_sp", "least_squares", {})])
def test_a_write_to_the_weights_is_seen(make_model, batches, strategy, compensate, options):
    """The fold is linear in the weight, so that half of one is half of the other, to the last bit."""
    model = make_model("opt")
    ids = batches[0]["input_ids"]
    options = dict(allocator="uniform", ratio=0.4, calibration=batches, compensate=compensate, **options)
    with prune(model, strategy, **options) as pruned:
        cut = pruned._engine.cuts[0]
        with recorded([cut]) as runs, torch.no_grad():
            logits(model, ids)
            runs[0] = (*runs[0][:2], runs[0][2].clone(), *runs[0][3:])  # its memory is used again
            cut.binding.consumer.weight.mul_(0.5)
            cut.binding.consumer.bias.mul_(0.5)
            pruned.reset()
            logits(model, ids)
        (_, kept, weight, bias, *_), (_, same, half, half_bias, *_) = runs
    assert torch.equal(kept, same)
    assert torch.equal(half, weight / 2)
    torch.testing.assert_close(half_bias, bias / 2, atol=1e-6, rtol=1e-5)
