"""The allocator that cuts step by step: what it finds, and what it measures for it."""

from typing import ClassVar, Literal

import numpy as np
import pytest
from prunekit.compress import prune
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import NonFiniteError, SpecError
from prunekit.registry.checks import check_component
from prunekit.strategies.greedy import Greedy
from prunekit.strategies.sensitivity import Sensitivity

from tests.toy_sites import HEAD, freed, places


class Losses:
    """A made-up loss of the shares that are cut; remembers what was asked."""

    def __init__(self, sites, of):
        self.units, self.of, self.asked = [scores.site.units for scores in sites], of, []
        self.steps = []

    def __call__(self, candidates, tokens, **how):
        self.asked += [tuple(counts) for counts in candidates]
        return [float(self.of(1 - np.array(counts) / self.units)) for counts in candidates]

    def record(self, **step):
        self.steps.append(step)

    @staticmethod
    def progress(items, label, total):
        return items


def eager(sites, of, steps):
    """The steps of one unit each that a greedy search makes which measures every site at every step."""
    counts = [scores.site.units for scores in sites]
    units = np.array(counts)
    for _ in range(steps):
        rises = {}
        for place, scores in enumerate(sites):
            if counts[place] > 1:
                fewer = [*counts[:place], counts[place] - 1, *counts[place + 1 :]]
                rises[place] = (of(1 - fewer / units) - of(1 - counts / units)) / scores.site.unit_parameters
        counts[min(rises, key=rises.__getitem__)] -= 1
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_lazy_steps_are_those_of_a_search_that_measures_everything(seed):
    sites = places(3, channels=6, channel=HEAD)
    weights = np.random.default_rng(seed).exponential(size=len(sites))
    of = lambda shares: 3 + np.exp(shares**1.5 @ weights)  # noqa: E731  cuts make each other worse
    losses = Losses(sites, of)
    counts = Greedy(step=0.01).allocate(sites, 0.5, losses)
    assert counts == eager(sites, of, 18)
    assert len(set(losses.asked)) < 18 * 6 / 2
    assert len(losses.steps) == 18
    ends = {step["site"]: step["kept"] for step in losses.steps}
    assert ends == {each.site.label: n for each, n in zip(sites, counts, strict=True) if n < each.site.units}
    assert losses.steps[-1]["best"] == of(1 - np.array(counts) / losses.units)


def test_cuts_that_act_on_each_other_are_seen():
    """Either of two sites does the work of both; the others lose a little with every unit."""
    sites = places(2, channels=6, channel=HEAD)
    of = lambda shares: 9 * shares[0] * shares[2] + 0.2 * (shares[1] + shares[3])  # noqa: E731
    ratio = 10 / 24
    whole, alone = Greedy().allocate(sites, ratio, Losses(sites, of)), Sensitivity()
    assert min(whole[0], whole[2]) == 1 and max(whole[0], whole[2]) == 6
    assert alone.allocate(sites, ratio, Losses(sites, of))[0::2] == [1, 1]


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.2, 0.4, 0.77, 0.85])
@pytest.mark.parametrize("sizes", [(30, 3, 1536, 294912, 1728), (4, 6, 24, 160, 40), (2, 12, 100, 701, 89)])
def test_the_budget_is_met_within_the_cheapest_unit_left(ratio, sizes):
    sites = places(*sizes)
    weights = np.random.default_rng(0).normal(1, 1, len(sites))  # some cuts lower the loss
    losses = Losses(sites, lambda shares: 3 + shares**2 @ weights)
    counts = Greedy().allocate(sites, ratio, losses)
    whole = sum(scores.site.units * scores.site.unit_parameters for scores in sites)
    left = [each.site.unit_parameters for each, count in zip(sites, counts, strict=True) if count > 1]
    assert ratio * whole - min(left) < freed(sites, counts) <= ratio * whole * (1 + 1e-6)
    assert min(counts) >= 1 and (ratio or not losses.asked)


def test_kept_widths_are_multiples_and_what_cannot_be_reached_is_refused():
    sites = places(3)
    losses = Losses(sites, lambda shares: (shares**2).sum())
    counts = Greedy(mlp_multiple=8).allocate(sites, 0.5, losses)
    assert all(count % 8 == 0 for count in counts[1::2]) and min(counts) > 0
    with pytest.raises(SpecError, match=r"greedy: a ratio of 0\.97 .* minimum_units: 1, so 0\.8958 can be cut"):
        Greedy().allocate(sites, 0.97, losses)
    assert sum(Greedy(minimum_units=0).allocate(sites, 0.99, losses)) < 4
    with pytest.raises(SpecError, match="greedy measures the model"):
        Greedy().allocate(sites, 0.5)


def test_an_infinite_loss_is_the_last_choice():
    sites = places(2)
    losses = Losses(sites, lambda shares: np.inf if shares[0] else 3.0)
    assert Greedy().allocate(sites, 0.5, losses)[0] == 6
    losses = Losses(sites, lambda shares: np.inf if shares.sum() > 1 else 3.0)
    assert Greedy().allocate(sites, 0.2, losses)
    with pytest.raises(NonFiniteError, match=r"greedy: no cut that it measured for this ratio has a finite objective"):
        Greedy().allocate(sites, 0.5, losses)


class Unscored(Greedy):
    """Measures cuts of units that have no scores."""

    needs_scores: ClassVar[bool] = False
    name: Literal["unscored"] = "unscored"


def test_the_contract():
    check_component(Greedy())
    with pytest.raises(AssertionError, match="measures, so its needs_scores must be true"):
        check_component(Unscored())


def test_a_larger_ratio_measures_only_what_is_new(make_model, batches):
    model, statistics, passes = make_model("llama-gqa"), SharedStatistics(), []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for ratio in (0.2, 0.4, 0.4):
        options = dict(calibration=batches, allocator={"name": "greedy", "step": 0.25}, statistics=statistics)
        with prune(model, "wanda_sp", ratio=ratio, **options) as pruned:
            counts.append((pruned.counts, len(passes)))
            assert pruned.ratio.prunable_parameters_cut == pytest.approx(ratio, abs=0.002)
    (small, first), (large, second), (again, third) = counts
    assert large == again and third == second and second < 2.5 * first and large != small
