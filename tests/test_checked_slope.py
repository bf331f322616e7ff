"""Slopes that a probe of the batch checks: the share is the best one, and it is all that changes."""

import pytest
import torch
from accelerate import cpu_offload
from prunekit.compress import prune
from prunekit.compress.engine.compensation import SiteCompensation
from prunekit.registry import complement

SEES_ALL = {"selector": "whole_batch"}
CHECKED = {"name": "least_squares", "check": True}


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def shares(pruned):
    """The shares of the last batch, by site."""
    return [record["share"] for record in pruned.trace[-len(pruned.counts) :]]


def input_of_the_first_site(model, ids):
    """What enters the consumer of layer 0's attention on the dense model, (N, C) float64."""
    given = []
    consumer = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = consumer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    logits(model, ids)
    handle.remove()
    return consumer.weight.detach().double(), given[0].reshape(-1, given[0].shape[-1]).double()


@pytest.mark.parametrize("probe", [0, 0.5])
def test_the_share_is_the_one_with_the_least_error(make_model, batches, probe):
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]
    weight, x = input_of_the_first_site(model, ids)
    compensate = CHECKED | SEES_ALL | {"ridge": 1e-3, "probe": probe}
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches[:1], compensate=compensate, trace=True) as pruned:
        logits(model, ids)
        cut = pruned._engine.cuts[0]
        kept, slope = cut.site.columns(cut.fixed), cut.compensation.fixed[0].double()
        mean = cut.history.mean.double()
        found = shares(pruned)[0]
    mean += probe * (x.mean(0) - mean)
    dropped, centred = complement(kept, len(mean)), x - mean

    def error(share):
        return ((centred[:, dropped] - share * centred[:, kept] @ slope.T) @ weight[:, dropped].T).square().sum()

    tried = torch.linspace(0, 1, 10_001)
    best = float(tried[torch.stack([error(share) for share in tried]).argmin()])
    assert 0 < best < 1
    assert found == pytest.approx(best, abs=1e-4)


STRATEGIES = [("wanda_sp", SEES_ALL), ("pp", {})]


@pytest.mark.parametrize("compensator", ["least_squares", "low_rank_least_squares"])
@pytest.mark.parametrize("strategy, selector", STRATEGIES)
@pytest.mark.parametrize("share, same_as", [(1.0, None), (0.0, "mean")])
def test_all_of_the_slope_is_least_squares_and_none_of_it_the_mean(
    make_model, batches, monkeypatch, compensator, strategy, selector, share, same_as
):
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]

    def found(compensate):
        with prune(model, strategy, ratio=0.4, calibration=batches[:2], compensate=compensate):
            return [logits(model, ids) for _ in range(2)][1]

    checked = {"name": compensator, "check": True} | selector
    expected, plain = found(same_as or compensator), found(checked)
    monkeypatch.setattr(SiteCompensation, "share_of_slope", lambda *args: torch.tensor(share))
    assert torch.equal(found(checked), expected)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("strategy, selector", STRATEGIES)
def test_a_batch_of_other_text_gets_a_smaller_share(make_model, strategy, selector):
    model = make_model("llama-gqa")
    generator = torch.Generator().manual_seed(1)
    alike, other = (torch.randint(low, low + 20, (4, 24), generator=generator) for low in (3, 70))
    compensate = CHECKED | selector
    with prune(model, strategy, ratio=0.4, calibration=[alike], compensate=compensate, trace=True) as pruned:
        logits(model, alike)
        same = shares(pruned)
        pruned.reset()
        logits(model, other)
        differs = shares(pruned)
    assert sum(same) / len(same) > 0.8
    assert sum(differs) / len(differs) < 0.6


def test_padding_does_not_count(make_model, batches):
    model = make_model("llama-gqa")
    ids, mask = batches[3]["input_ids"].clone(), torch.ones(4, 24, dtype=torch.int64)
    mask[:2, 12:] = 0
    compensate, found = CHECKED | SEES_ALL, []
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches[:2], compensate=compensate, trace=True) as pruned:
        for seen in (mask, None):
            for token in (3, 50):
                ids[:2, 12:] = token
                logits(model, ids, seen)
                found.append(shares(pruned))
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_nothing_predicted_is_a_share_of_none(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches[:2], compensate=CHECKED) as pruned:
        cut = pruned._engine.cuts[0]
        weight, mean, kept = cut.binding.consumer.weight, cut.history.mean, cut.site.columns(cut.fixed)
        added = cut.compensation.folded(weight, kept)
        for states in (mean.expand(1, 3, -1), torch.full((1, 3, len(mean)), float("nan"))):
            assert cut.compensation.share_of_slope(weight, kept, added, states, None, mean) == 0


def test_frozen_and_exported_cuts_check_nothing(make_model, batches):
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches[:2], compensate=CHECKED) as pruned:
        pruned.freeze("calibration")
        assert not pruned.strategy.compensate.uses_probe
        frozen = logits(model, ids)
    with prune(model, "pp", ratio=0.4, calibration=batches[:2], compensate="least_squares") as pruned:
        pruned.freeze("calibration")
        assert torch.equal(logits(model, ids), frozen)


@pytest.mark.parametrize("strategy", ["wanda_sp", "pp"])
def test_weights_that_are_offloaded_are_checked_too(make_model, batches, strategy):
    found = []
    for offloaded in (False, True):
        model = make_model("llama-gqa")
        if offloaded:
            cpu_offload(model)
        with prune(model, strategy, ratio=0.4, calibration=batches[:2], compensate=CHECKED):
            found.append([logits(model, batches[3]["input_ids"]) for _ in range(2)][1])
    torch.testing.assert_close(*found)


def test_a_static_cut_holds_what_every_batch_mixes(make_model, batches):
    model = make_model("llama-gqa")
    held = {}
    for check in (False, True):
        compensate = {"name": "least_squares", "check": check}
        with prune(model, "wanda_sp", ratio=0.4, calibration=batches[:2], compensate=compensate) as pruned:
            for batch in batches[2:]:
                logits(model, batch["input_ids"])
            held[check] = sum(tensor.numel() for cut in pruned._engine.cuts for tensor in cut.copies())
            weights = sum(cut.consumer_weights()[0].numel() for cut in pruned._engine.cuts)
    assert held[True] - held[False] == 2 * weights, "the kept columns, and what the slope adds to them"
