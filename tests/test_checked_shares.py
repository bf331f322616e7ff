"""Means and slopes that a probe of the batch checks: the shares are the best ones, and they are all that changes."""

import pytest
import torch
from accelerate import cpu_offload
from prunekit.compress import prune
from prunekit.compress.engine.compensation import SiteCompensation, least_squares_in_box
from prunekit.registry import complement

SEES_ALL = {"selector": "whole_batch"}
CHECKED = {"name": "least_squares", "check": True}


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def shares(pruned):
    """The shares of mean and slope in the last batch, (sites, 2)."""
    records = pruned.trace[-len(pruned.counts) :]
    return torch.tensor([[record["mean_share"], record["slope_share"]] for record in records])


def of_the_first_site(model, ids):
    """The consumer of layer 0's attention: its weight, what enters it and what it gives, (N, C) and (N, O) float64."""
    seen = []
    consumer = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = consumer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    logits(model, ids)
    handle.remove()
    x, output = seen[-1]  # the probe comes before the batch
    return consumer.weight.detach().double(), x.flatten(0, -2).double(), output.flatten(0, -2).double()


# The square.


def grid(steps=200):
    return torch.cartesian_prod(*[torch.linspace(0, 1, steps + 1).double()] * 2)


BEST = [(0.3, 0.6), (-0.4, 0.5), (0.5, -0.4), (1.4, 0.5), (0.5, 1.4), (-1.0, 1.7), (1.6, 1.6), (-0.2, -0.7)]


@pytest.mark.parametrize("alike", [0.0, 0.9, -0.9])
@pytest.mark.parametrize("best", BEST)
def test_no_weights_of_a_grid_are_better(best, alike):
    """Inside the square, outside of every edge and of every corner, for predictions that are more or less alike."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 50, generator=generator)
    x[1] += alike * 3 * x[0]
    y = torch.tensor(best) @ x + torch.randn(50, generator=generator) / 10
    found = least_squares_in_box(x, y)

    def error(weights):
        return (weights.double() @ x.double() - y.double()).square().sum(-1)

    assert ((found >= 0) & (found <= 1)).all()
    assert error(found) <= error(grid()).min() + 1e-4
    assert error(found) >= error(grid()).min() - 0.05 * error(torch.zeros(2)), "the grid must be fine enough to tell"


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ([[0, 0], [0, 0]], [1, 1], [0, 0]),
        ([[0, 0], [2, 2]], [1, 1], [0, 0.5]),
        ([[2, 2], [0, 0]], [1, 1], [0.5, 0]),
        ([[1, 0], [0, 1]], [0, 0], [0, 0]),
        ([[1, float("nan")], [0, 1]], [1, 1], [0, 0]),
        ([[1, 0], [float("inf"), 1]], [1, 1], [0, 0]),
        ([[1, 0], [0, 1]], [float("-inf"), 1], [0, 0]),
    ],
)
def test_what_changes_nothing_or_is_not_finite_has_no_weight(x, y, expected):
    found = least_squares_in_box(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32))
    assert found.tolist() == expected


def test_two_predictions_that_are_one_are_not_used_more_than_it():
    x = torch.tensor([1.0, -2.0, 0.5]).expand(2, 3)
    assert least_squares_in_box(x, 0.6 * x[0]).sum() == pytest.approx(0.6)


# On a model.

COMPENSATORS = ["mean", "probe_mean", "least_squares", "low_rank_least_squares"]
KINDS = [{"name": "mean"}, {"name": "probe_mean"}, {"name": "least_squares", "ridge": 1e-3}]
KINDS += [KINDS[-1] | {"probe": 0.5}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("applier", ["slice", "zero"])
def test_the_output_has_the_least_error_that_shares_can_give(make_model, batches, kind, applier):
    """The output itself is compared, so the bias and the weight are those that were checked."""
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]
    weight, x, dense = of_the_first_site(model, ids)
    options = {"compensate": kind | {"check": True} | SEES_ALL, "applier": applier, "trace": True}
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches[:1], **options) as pruned:
        output = of_the_first_site(model, ids)[2]
        cut = pruned._engine.cuts[0]
        kept, slopes = cut.site.columns(cut.fixed), cut.compensation.fixed or ()
        mean, found = cut.history.mean.double(), shares(pruned)[0].double()
    mean += {"mean": 0, "probe_mean": 0.5}.get(kind["name"], kind.get("probe", 0)) * (x.mean(0) - mean)
    dropped, centred = complement(kept, len(mean)), x - mean
    lost = weight[:, dropped]
    constant = lost @ mean[dropped]
    predicted = centred[:, kept] @ (lost @ slopes[0].double()).T if slopes else torch.zeros_like(dense)

    def error(pair):
        return float((x[:, dropped] @ lost.T - pair[0] * constant - pair[1] * predicted).square().sum())

    made = float((dense - output).square().sum())
    assert made == pytest.approx(error(found), rel=1e-3)
    assert made <= min(error(pair) for pair in grid(50)) * (1 + 1e-5)
    assert found[0] > 0 and (0 < found[1] < 1) == bool(slopes)


STRATEGIES = [("wanda_sp", SEES_ALL), ("pp", {})]


@pytest.mark.parametrize("compensator", COMPENSATORS)
@pytest.mark.parametrize("strategy, selector", STRATEGIES)
def test_whole_shares_are_no_check_and_none_are_no_compensation(
    make_model, batches, monkeypatch, compensator, strategy, selector
):
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]

    def found(compensate):
        with prune(model, strategy, ratio=0.4, calibration=batches[:2], compensate=compensate):
            return [logits(model, ids) for _ in range(2)][1]

    checked = {"name": compensator, "check": True} | selector
    whole = found(compensator if compensator in ("mean", "least_squares") else {"name": compensator} | selector)
    none, plain = found("none"), found(checked)
    for share, expected in ((1.0, whole), (0.0, none)):
        monkeypatch.setattr(SiteCompensation, "best_shares", lambda *args, share=share: torch.full((2,), share))
        assert torch.equal(found(checked), expected)
        # The mean of a probe that sees all may be right as it is.
        assert compensator == "probe_mean" or not torch.equal(plain, expected)


@pytest.mark.parametrize("strategy, selector", STRATEGIES)
def test_the_slope_alone_leaves_the_mean_out(make_model, batches, monkeypatch, strategy, selector):
    """With the share 0 of the mean and 1 of the slope, a consumer given the kept channels' mean changes nothing."""
    model = make_model("llama-gqa")
    monkeypatch.setattr(SiteCompensation, "best_shares", lambda *args: torch.tensor([0.0, 1.0]))
    with prune(model, strategy, ratio=0.4, calibration=batches[:2], compensate=CHECKED | selector) as pruned:
        cut, seen = pruned._engine.cuts[0], []
        cut.binding.consumer.register_forward_hook(lambda *args: seen.append((cut.consumer_weights(), cut.kept)))
        logits(model, batches[3]["input_ids"])
        (weight, bias), kept = seen[-1]
        columns = cut.site.columns(kept)
        mean, whole = cut.history.mean[columns], cut.binding.consumer.weight[:, columns]
    torch.testing.assert_close(weight @ mean + bias, whole @ mean, atol=1e-5, rtol=1e-5)
    assert (weight - whole).abs().max() > 1e-3


@pytest.mark.parametrize("strategy, selector", STRATEGIES)
@pytest.mark.parametrize("compensator", ["mean", "least_squares"])
def test_a_batch_of_other_text_gets_smaller_shares(make_model, compensator, strategy, selector):
    model = make_model("llama-gqa")
    generator = torch.Generator().manual_seed(1)
    alike, other = (torch.randint(low, low + 20, (4, 24), generator=generator) for low in (3, 70))
    compensate = {"name": compensator, "check": True} | selector
    with prune(model, strategy, ratio=0.4, calibration=[alike], compensate=compensate, trace=True) as pruned:
        logits(model, alike)
        same = shares(pruned).mean(0)
        pruned.reset()
        logits(model, other)
        differs = shares(pruned).mean(0)
    assert same[0] > 0.6 and differs[0] < 0.7 * same[0]
    if compensator == "least_squares":
        assert same[1] > 0.8 and differs[1] < 0.6


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
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])


@pytest.mark.parametrize("compensator", ["mean", "least_squares"])
def test_frozen_and_exported_cuts_check_nothing(make_model, batches, compensator):
    model = make_model("llama-gqa")
    ids = batches[3]["input_ids"]
    with prune(
        model, "pp", ratio=0.4, calibration=batches[:2], compensate={"name": compensator, "check": True}
    ) as pruned:
        pruned.freeze("calibration")
        assert not pruned.strategy.compensate.uses_probe
        frozen = logits(model, ids)
    with prune(model, "pp", ratio=0.4, calibration=batches[:2], compensate=compensator) as pruned:
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
