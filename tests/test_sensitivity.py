"""The allocator that measures: the cheapest cuts that meet the budget."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import NonFiniteError, SiteScores, SpecError
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.sensitivity import Options, Sensitivity, cheapest, filled

HEAD, CHANNEL = 160, 40
"""Parameters of the units of some_site."""


def curves(seed, *sites):
    """Options of sites of (units, parameters of a unit), with random increases."""
    random = np.random.default_rng(seed)
    made = []
    for units, parameters in sites:
        dropped = np.arange(units + 1)
        increase = np.append(0, random.exponential(size=units) * random.exponential()).cumsum()
        made.append(Options(dropped, dropped * float(parameters), increase))
    return made


def total(options, chosen, what):
    return sum(getattr(option, what)[n] for option, n in zip(options, chosen, strict=True))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [40, 200, 360, 680])
def test_the_cheapest_cuts_are_those_of_brute_force(seed, budget):
    options = curves(seed, (3, HEAD), (4, CHANNEL), (3, HEAD), (4, CHANNEL), (3, CHANNEL))
    chosen = cheapest(options, budget)
    every = itertools.product(*(range(len(option.dropped)) for option in options))
    least = min(total(options, each, "increase") for each in every if total(options, each, "parameters") == budget)
    assert total(options, chosen, "parameters") == budget
    assert total(options, chosen, "increase") == pytest.approx(least)
    assert filled(options, chosen, budget) == chosen


def losses_of(sites, seed=0):
    """Additive losses of candidates, random ones for every site; some cuts even lower the loss."""
    random = np.random.default_rng(seed)
    weights = random.normal(1, 1, len(sites))

    def evaluate(candidates, tokens, **how):
        shares = 1 - np.array(candidates) / [scores.site.units for scores in sites]
        return (3 + shares**2 @ weights).tolist()

    return evaluate


def places(layers, heads, channels, head, channel):
    sites = []
    for layer, (kind, units, parameters) in itertools.product(
        range(layers), (("attention", heads, head), ("mlp", channels, channel))
    ):
        site = replace(some_site(kind, layer), units=units, unit_parameters=parameters)
        sites.append(SiteScores(site))
    return sites


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.2, 0.4, 0.77, 0.85])
@pytest.mark.parametrize("sizes", [(30, 3, 1536, 294912, 1728), (4, 6, 24, 160, 40), (2, 12, 100, 701, 89)])
def test_the_budget_is_met_within_the_cheapest_unit(ratio, sizes):
    sites = places(*sizes)
    counts = Sensitivity().allocate(sites, ratio, losses_of(sites))
    whole = sum(scores.site.units * scores.site.unit_parameters for scores in sites)
    cut = sum((s.site.units - count) * s.site.unit_parameters for s, count in zip(sites, counts, strict=True))
    assert ratio * whole - sizes[-1] < cut <= ratio * whole * (1 + 1e-6)
    assert min(counts) >= 1


def test_sites_that_cost_least_are_cut_first():
    sites = places(3, 6, 24, HEAD, CHANNEL)

    def evaluate(candidates, tokens, **how):
        assert tokens == 77
        return [5 + sum(place * (6 - c[place]) for place in (0, 2, 4)) + 24 * 6 - sum(c[1::2]) for c in candidates]

    assert Sensitivity(tokens=77).allocate(sites, 10 * HEAD / (3 * 2 * 6 * HEAD), evaluate) == [1, 24, 1, 24, 6, 24]


def test_kept_widths_are_multiples_and_what_cannot_be_reached_is_refused():
    sites = places(3, 6, 24, HEAD, CHANNEL)
    counts = Sensitivity(mlp_multiple=8).allocate(sites, 0.5, losses_of(sites))
    assert all(count % 8 == 0 for count in counts[1::2]) and min(counts) > 0
    with pytest.raises(SpecError, match=r"sensitivity: a ratio of 0\.97 .* minimum_units: 1, so 0\.8958 can be cut"):
        Sensitivity().allocate(sites, 0.97, losses_of(sites))
    assert sum(Sensitivity(minimum_units=0).allocate(sites, 0.99, losses_of(sites))) < 4
    with pytest.raises(SpecError, match="sensitivity measures the model"):
        Sensitivity().allocate(sites, 0.5)


@pytest.mark.parametrize("levels", [(), (0.5,), (0.0, 1.0), (0.6, 0.4, 1.0), (0.5, 0.5, 1.0)])
def test_levels_that_leave_a_curve_open_are_refused(levels):
    with pytest.raises(ValueError, match="levels are shares above 0 in ascending order, the last 1; found"):
        Sensitivity(levels=levels)


def test_an_infinite_loss_is_the_last_choice():
    sites = places(2, 6, 24, HEAD, CHANNEL)
    evaluate = lambda candidates, tokens, **how: [float("inf") if c[0] < 6 else 3.0 for c in candidates]  # noqa: E731
    assert Sensitivity().allocate(sites, 0.5, evaluate)[0] == 6
    infinite = lambda candidates, tokens, **how: [3.0] + [float("inf")] * (len(candidates) - 1)  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"sensitivity: no cut that it measured .* has a finite objective .loss."):
        Sensitivity().allocate(sites, 0.5, infinite)


@pytest.mark.parametrize("allocator", ["sensitivity", "greedy"])
@pytest.mark.parametrize(
    ("use", "options"),
    [("magnitude", {}), ("pp", {}), ("wanda_sp", {"sequential": True, "compensate": "mean"})],
    ids=["static", "per batch", "layer by layer"],
)
def test_a_site_without_effect_is_cut_first(make_model, batches, allocator, use, options):
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    prompts = torch.cat([batch["input_ids"] for batch in batches])[:, :4]
    batches = [model.generate(prompts, max_new_tokens=20, do_sample=False)]  # a text that this model knows
    ratio = 191 * 3 * 128 / (3 * (192 * 3 * 128 + 4 * 96 * 128))  # nearly all of one MLP
    with prune(model, use, ratio=ratio, calibration=batches, allocator=allocator, **options) as pruned:
        assert pruned.counts[1, "mlp"] < 60
        assert pruned.ratio.prunable_parameters_cut == pytest.approx(ratio, abs=0.002)
