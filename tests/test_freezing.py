"""One cut of a dynamic strategy's decisions: which units are kept, what is compensated, and what stays as it was."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import DataError, SpecError

COMPENSATIONS = (
    "none",
    "mean",
    "probe_mean",
    "least_squares",
    {"name": "least_squares", "per_batch": "solve"},
    {"name": "least_squares", "probe": 0.5},
    "low_rank_least_squares",
)


@pytest.fixture
def model(make_model):
    return make_model("llama-gqa")


def test_last_keeps_what_the_last_batch_kept(model, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
        kept = pruned.freeze("last", batches)
        last = {(r["layer"], r["kind"]): tuple(r["kept"]) for r in pruned.trace if r["batch"] == len(batches) - 1}
    assert {place: kept[place] for place in last} == last


def test_calibration_keeps_what_static_ppsp_keeps(model, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        kept = pruned.freeze("calibration")
    with prune(model, "pp", ratio=0.4, calibration=batches, selector=None, merger=None) as static:
        assert kept == static.sites_kept


def test_mean_score_averages_the_scores_of_all_batches(model, batches):
    """Two batches, each frozen alone, decide what both together keep."""
    seen = {}
    with prune(model, "pp", ratio=0.4, calibration=batches, merger="probe_only") as pruned:
        decider = pruned._engine.decider
        original = decider._scored

        def watched(state, statistic):
            channels, units = original(state, statistic)
            site = state.binding.site
            seen.setdefault((site.layer, site.kind), []).append(units)
            return channels, units

        decider._scored = watched
        kept = pruned.freeze("mean-score", batches[:2])
        counts = pruned.counts
    for place, scores in seen.items():
        assert len(scores) == 2
        best = (scores[0] + scores[1]).topk(counts[place]).indices.sort().values
        assert kept[place] == tuple(best.tolist())
    assert any(tuple(scores[1].topk(counts[p]).indices.sort().values.tolist()) != kept[p] for p, scores in seen.items())


@pytest.mark.parametrize("how", ["mean-score", "last", "calibration"])
@pytest.mark.parametrize("compensate", COMPENSATIONS, ids=str)
def test_a_frozen_model_no_longer_depends_on_its_batch(model, batches, compensate, how):
    ids = batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches, compensate=compensate) as pruned:
        pruned.freeze(how, batches)
        together = model(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
        assert (together - alone).abs().max() < 1e-4
        assert not pruned.strategy.dynamic
        assert not pruned.strategy.compensate.uses_probe


def test_a_pruned_model_does_depend_on_its_batch(model, batches):
    """The negative control of the test above."""
    ids = batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches):
        together = model(ids).logits
        assert (together - torch.cat([model(row[None]).logits for row in ids])).abs().max() > 1e-2


def test_removing_a_frozen_pruning_leaves_the_model_as_it_was(model, batches):
    before = model(batches[0]["input_ids"]).logits
    with prune(model, "pp", ratio=0.4, calibration=batches, compensate="mean") as pruned:
        pruned.freeze("last", batches)
        with pruned.dense():
            assert torch.equal(model(batches[0]["input_ids"]).logits, before)
    assert torch.equal(model(batches[0]["input_ids"]).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_decides_once_keeps_its_units_and_loses_its_probe(model, batches):
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate="probe_mean") as pruned:
        before = pruned.sites_kept
        assert pruned.freeze("calibration") == before
        frozen = model(batches[0]["input_ids"]).logits
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate="mean"):
        assert torch.allclose(frozen, model(batches[0]["input_ids"]).logits, atol=1e-5)


def test_histories_are_as_calibrated_before_batches_are_looked_at(model, batches):
    def kept(first_some_text: bool):
        with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
            if first_some_text:
                model(torch.flip(batches[0]["input_ids"], (0,)))
            return pruned.freeze("last", batches)

    assert kept(False) == kept(True)


def test_a_model_that_runs_unpruned_is_not_frozen(model, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        for how in (pruned.dense, pruned.suspended):
            with how(), pytest.raises(SpecError, match=r"outside of dense\(\) and suspended\(\)"):
                pruned.freeze("last", batches)
        assert pruned.freeze("last", batches) and not pruned.strategy.dynamic


def test_mistakes(model, batches):
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(SpecError, match=r"unknown way 'mean_score'.*mean-score"):
            pruned.freeze("mean_score", batches)
        with pytest.raises(DataError, match="last runs batches"):
            pruned.freeze("last")
        assert pruned.strategy.dynamic
    with prune(model, "pp", ratio=0.4, merger="probe_only") as pruned:
        with pytest.raises(SpecError, match="uses no history"):
            pruned.freeze("calibration")
