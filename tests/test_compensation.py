"""Compensation on every family: it keeps the mean output, leaves an uncut model alone, and slices as it zeroes."""

import pytest
import torch
from prunekit.compress import Pipeline, PipelineSpec, prune

FAMILIES = ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"]
UNITS = [(f, "kv_group") for f in FAMILIES] + [(f, "query_head") for f in FAMILIES if f not in ("llama-mha", "opt")]
"""Where every query head has key and value of its own, both units are the same."""
COMPENSATORS = ["mean", "probe_mean", "least_squares", "low_rank_least_squares"]
ISSUED = [("pp", "mean"), ("flap", "least_squares")]
CONTROL = 1e-2
"""A mean output that is off by less would prove nothing."""


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def first_outputs(model, ids):
    """The logits, and what every consumer gave for this batch, by its path."""
    given = {}
    ends = ("o_proj", "down_proj", "out_proj", "fc2")
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: given.update({name: output}))
        for name, module in model.named_modules()
        if name.endswith(ends)
    ]
    try:
        return logits(model, ids), given
    finally:
        for handle in handles:
            handle.remove()


def mean_of(output):
    return output.reshape(-1, output.shape[-1]).double().mean(0)


def whole_batch(compensator):
    """The compensator with a probe, if it has one, that sees everything: it then knows this batch's own mean."""
    return {"name": "probe_mean", "selector": "whole_batch"} if compensator == "probe_mean" else compensator


@pytest.mark.parametrize("family, unit", UNITS)
def test_the_mean_output_of_the_first_cut_site_stays(make_model, batches, family, unit):
    """On the very text of calibration nothing but its own cut changes what the first cut site gives."""
    model = make_model(family)
    ids = batches[0]["input_ids"]
    dense, before = first_outputs(model, ids)
    strategies = ["wanda_sp", "flap", "magnitude", "pp"] if unit == "kv_group" else ["flap", "pp"]
    for strategy in strategies:
        found = {}
        for compensator in ["none", *COMPENSATORS]:
            options = dict(compensate=whole_batch(compensator), attention_unit=unit)
            if strategy == "pp" and compensator == "probe_mean":
                options["selector"] = "whole_batch"
            with prune(model, strategy, ratio=0.4, calibration=batches[:1], **options) as pruned:
                found[compensator], after = first_outputs(model, ids)
                first = next(cut.site.consumer for cut in pruned._engine.cuts if not cut.whole)
            off = (mean_of(after[first]) - mean_of(before[first])).abs().max()
            if compensator == "none":
                assert off > CONTROL
            else:
                assert off < 1e-4, (strategy, compensator)
                assert found[compensator].isfinite().all()
                assert not torch.equal(found[compensator], found["none"])
                assert not torch.equal(found[compensator], dense)
        different = [found["mean"], found["least_squares"], found["low_rank_least_squares"]]
        assert all((a - b).abs().max() > 1e-3 for a in different for b in different if a is not b)


@pytest.mark.parametrize("strategy, compensator", ISSUED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_what_python_says(make_model, batches, tmp_path, family, strategy, compensator):
    model = make_model(family)
    ids = batches[1]["input_ids"]
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"prune: {{use: {strategy}, ratio: 0.4, compensate: {compensator}}}")
    with prune(model, PipelineSpec.load(file).prune, calibration=batches) as pruned:
        assert pruned.strategy.compensate.name == compensator
        told = logits(model, ids)
    with prune(model, strategy, ratio=0.4, calibration=batches, compensate=compensator) as pruned:
        assert pruned.counts[0, "mlp"] < 192
        assert torch.equal(logits(model, ids), told)
    with prune(model, strategy, ratio=0.4, calibration=batches, compensate="none"):
        assert not torch.equal(logits(model, ids), told)


@pytest.mark.slow
@pytest.mark.parametrize("strategy, compensator", ISSUED)
def test_a_whole_pipeline_measures_another_model(strategy, compensator):
    def perplexity(compensate):
        content = {
            "calibration": {"sequences": 8, "length": 64},
            "prune": {"use": strategy, "ratio": 0.4, "compensate": compensate},
            "evaluate": [{"name": "perplexity", "window": 32, "limit": 2, "batch_size": 2}],
        }
        return Pipeline(content).measure().metrics["perplexity.perplexity"]

    found = {compensate: perplexity(compensate) for compensate in ("none", compensator)}
    assert found["none"]["dense"] == found[compensator]["dense"]
    assert found["none"]["pruned"] != found[compensator]["pruned"]
    assert found[compensator]["pruned"] < 10 * found[compensator]["dense"]


@pytest.mark.parametrize("strategy", ["wanda_sp", "magnitude", "pp"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("compensator", COMPENSATORS)
def test_nothing_dropped_is_nothing_changed(make_model, batches, family, strategy, compensator):
    """With ratio 0, and with one that is less than half a unit of the whole model."""
    model = make_model(family)
    ids = batches[0]["input_ids"]
    dense, total = logits(model, ids), sum(p.numel() for p in model.parameters())
    for ratio in (0.0, 0.0004):
        with prune(model, strategy, ratio=ratio, calibration=batches[:1], compensate=compensator) as pruned:
            assert torch.equal(logits(model, ids), dense)
            assert pruned.active_parameters() == total
            for cut in pruned._engine.cuts:
                weight, bias = cut.consumer_weights()
                assert weight is cut.binding.consumer.weight and bias is cut.binding.consumer.bias
                assert not cut.compensation.has_slope and cut.compensation.tokens is None


def test_sites_that_keep_everything_stay_untouched_beside_others(make_model, batches):
    model = make_model("llama-gqa")
    shares = {"name": "explicit", "attention": [0, 0.5, 0], "mlp": [0, 0, 0.5]}
    options = dict(allocator=shares, calibration=batches, compensate="least_squares")
    _, before = first_outputs(model, batches[0]["input_ids"])
    with prune(model, "wanda_sp", **options) as pruned:
        _, after = first_outputs(model, batches[0]["input_ids"])
        biased = [cut.consumer_weights()[1] is not None for cut in pruned._engine.cuts]
    assert biased == [False, False, True, False, False, True]
    same = [torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True)]
    assert same == [True, True, False, False, False, False]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family, unit", [("llama-gqa", "query_head"), ("opt", "kv_group")])
@pytest.mark.parametrize("strategy", ["wanda_sp", "pp"])
def test_sliced_equals_zeroed(make_model, batches, family, unit, strategy, side):
    model = make_model(family)
    ids = batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    mask[3, -1:] = 0
    mask = mask if side == "right" else mask.flip(1)
    padded = [{"input_ids": ids, "attention_mask": mask}, batches[1]]
    probing = {"name": "least_squares", "probe": 0.5}
    found = {}
    for name, compensate in [*((c, c) for c in COMPENSATORS), ("probing", probing), ("none", "none")]:
        options = dict(ratio=0.4, calibration=padded, compensate=compensate, attention_unit=unit)
        for applier in ("slice", "zero"):
            with prune(model, strategy, applier=applier, **options):
                found[name, applier] = torch.stack([logits(model, ids, mask)[mask.bool()] for _ in range(2)])
        torch.testing.assert_close(found[name, "slice"], found[name, "zero"], atol=1e-4, rtol=1e-3)
    for name in [*COMPENSATORS, "probing"]:
        moved = (found[name, "slice"] - found["none", "slice"]).abs().max()
        assert moved > 0.05, "compensation must be visible, or the check proves nothing"


@pytest.mark.parametrize("compensator", ["mean", "least_squares", "probe_mean"])
def test_padding_teaches_compensation_nothing(make_model, batches, compensator):
    """Whatever stands under the padding, of calibration and of the batch, gives the same weights and biases."""
    model = make_model("opt")
    ids = batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:2, -9:] = 0
    found = []
    for filler in (0, 55):
        padded = torch.where(mask.bool(), ids, filler)
        text = [{"input_ids": padded, "attention_mask": mask}]
        with prune(model, "wanda_sp", ratio=0.4, calibration=text, compensate=compensator):
            found.append(logits(model, padded, mask)[mask.bool()])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    with prune(model, "wanda_sp", ratio=0.4, calibration=[{"input_ids": padded}], compensate=compensator):
        assert (logits(model, padded, mask)[mask.bool()] - found[1]).abs().max() > 0.01
