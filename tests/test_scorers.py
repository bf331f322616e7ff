"""Scores of published methods: their formulas, written out for every channel."""

from typing import ClassVar, Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelHistory, Producer, Rows, SparsityAllocator, Strategy
from prunekit.registry.checks import check_component
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.application import Slice
from prunekit.strategies.cfsp import CfspScorer
from prunekit.strategies.two_ssp import SequenceNorm


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def history_of(statistic, *batches):
    history = ChannelHistory(batches[0][0].shape[-1], torch.device("cpu"))
    for x, valid in batches:
        statistic.observe(history, x, valid)
    return history


def test_two_ssp_is_the_mean_of_the_norms_of_sequences():
    """Of sequences of different lengths, in batches of different lengths; not the norm of the mean."""
    first, second, third = some(2, 5, 3), some(3, 7, 3, seed=1), some(1, 4, 3, seed=2)
    valid = torch.arange(7) < torch.tensor([7, 2, 0])[:, None]
    history = history_of(SequenceNorm(), (first, None), (second, valid), (third, None))
    sequences = [*first, second[0], second[1, :2], *third]  # one was padding alone
    expected = torch.stack([sequence.norm(dim=0) for sequence in sequences]).mean(0)
    torch.testing.assert_close(history.summed(), expected)
    torch.testing.assert_close(
        SequenceNorm().measure(second, valid, None).sum(0), (second[0].norm(dim=0) + second[1, :2].norm(dim=0)) / 2
    )
    silent = history_of(SequenceNorm(), (torch.zeros(2, 5, 3), None))
    assert silent.summed().tolist() == [0, 0, 0]


def test_two_ssp_of_half_precision_does_not_overflow():
    large = (300 * some(2, 64, 3).abs() + 300).half()
    history = history_of(SequenceNorm(), (large, None))
    torch.testing.assert_close(history.summed(), large.float().norm(dim=1).mean(0))


def site_of(kind, *producers):
    site = some_site(kind)
    return type(site)(**{**vars(site), "producers": producers})


def test_cfsp_of_an_mlp():
    site = site_of("mlp", Producer("gate", (Rows(0, 1),)), Producer("up", (Rows(0, 1),)))
    down, gate, up, energy = some(20, 24), some(24, 16, seed=1), some(24, 16, seed=2), some(24, seed=3).square()
    scorer = CfspScorer(power=0.5)
    found = scorer.score(scorer.prepare(down, site, [gate, up]), energy)
    for channel in range(24):
        relative = sum(down[o, channel].abs() / down[o].abs().sum() for o in range(20)) / 20
        for matrix in (gate, up):
            relative += sum(matrix[channel, d].abs() / matrix[:, d].abs().sum() for d in range(16)) / 16
        torch.testing.assert_close(found[channel], relative * energy[channel] ** 0.25)


def test_the_weights_cancel_in_the_published_code_of_cfsp():
    site = site_of("mlp", Producer("gate", (Rows(0, 1),)), Producer("up", (Rows(0, 1),)))
    energy, scorer = some(24, seed=3).square(), CfspScorer(relative="channel")
    found = scorer.score(scorer.prepare(some(20, 24), site, [some(24, 16, seed=1), some(24, 16, seed=2)]), energy)
    torch.testing.assert_close(found, (1 / 20 + 1 / 16 + 1 / 16) * energy.sqrt())


def test_cfsp_of_heads_whose_producers_have_rows_of_their_own_number():
    """Six groups of four channels; two rows of a fused key and value each."""
    site = site_of("attention", Producer("q", (Rows(0, 4),)), Producer("kv", (Rows(0, 2), Rows(12, 2))))
    out, query, fused = some(20, 24), some(24, 16, seed=1), some(24, 16, seed=2)
    prepared = CfspScorer().prepare(out, site, [query, fused])
    of = lambda rows: (rows.abs() / rows.abs().sum(0)).mean(1)  # noqa: E731
    for unit in range(6):
        heads = of(query)[4 * unit : 4 * unit + 4].sum()
        shared = of(fused[:12])[2 * unit : 2 * unit + 2].sum() + of(fused[12:])[2 * unit : 2 * unit + 2].sum()
        expected = (out.abs() / out.abs().sum(1, keepdim=True)).mean(0)[4 * unit : 4 * unit + 4].sum() + heads + shared
        torch.testing.assert_close(prepared[4 * unit : 4 * unit + 4].sum(), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("use", ["cfsp", "two_ssp", "pp"])
def test_they_prune_models(make_model, batches, family, unit, use):
    options = {"scorer": "cfsp"} if use == "pp" else {}
    model = make_model(family)
    with prune(model, use, ratio=0.5, calibration=batches, attention_unit=unit, **options) as pruned:
        assert pruned.ratio.units_cut == pytest.approx(0.5)
        assert model(**batches[0]).logits.isfinite().all()


def test_changed_producers_change_the_score(make_model, batches):
    model = make_model("llama-mha")
    with prune(model, "magnitude", ratio=0.5, scorer="cfsp", calibration=batches) as pruned:
        cut = pruned.cuts[1]
        before = pruned.calibrated_scores(cut).units
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight[:50] *= 9
        assert not torch.equal(before, pruned.calibrated_scores(cut).units)


def test_a_scorer_that_cannot_take_what_it_asks_for_is_refused():
    class Deaf(CfspScorer):
        """Does not take the producers."""

        def prepare(self, weight, site):
            return weight.abs().sum(0)

    with pytest.raises(AssertionError, match=r"asks for more than it takes: Deaf\.prepare takes"):
        check_component(Deaf())
    with pytest.raises(ValueError, match=r"Deaf\.prepare takes \(self, weight, site\).* one more argument, producers"):
        Strategy(name="any", scorer=Deaf(), allocator=Uniform(), applier=Slice())

    class Writing(CfspScorer):
        """Writes to what it is given."""

        def prepare(self, weight, site, producers=()):
            return producers[0].mul_(2).sum(1) + weight.abs().sum(0)

    with pytest.raises(AssertionError, match="changes the producers' weights it was given"):
        check_component(Writing())


def test_an_allocator_that_cannot_take_what_it_asks_for_is_refused():
    class Deaf(SparsityAllocator):
        """Measures without a way to."""

        name: Literal["deaf"] = "deaf"
        needs_scores: ClassVar[bool] = True
        measures: ClassVar[bool] = True

        def allocate(self, sites, ratio):
            return [scores.site.units for scores in sites]

    words = r"Deaf\.allocate takes \(self, sites, ratio\), but it is called with one more argument, evaluate"
    with pytest.raises(AssertionError, match=words):
        check_component(Deaf())
    with pytest.raises(ValueError, match=words):
        Strategy(name="any", scorer=CfspScorer(), allocator=Deaf(), applier=Slice())
