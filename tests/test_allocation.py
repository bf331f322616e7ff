"""How many units allocators keep: as close to what was asked as units allow, and no silence where that fails."""

from dataclasses import replace

import pytest
import torch
from prunekit.registry import SiteScores, SpecError
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.allocation import Explicit
from prunekit.strategies.flap.adaptive import GlobalAdaptive

pytestmark = pytest.mark.smoke

HEAD, CHANNEL = 160, 40  # parameters of the units of some_site


def scored(seed: int = 0, layers: int = 4) -> list[SiteScores]:
    """Attention and MLP of some layers with random scores."""
    generator = torch.Generator().manual_seed(seed)
    sites = [some_site(kind, layer) for layer in range(layers) for kind in ("attention", "mlp")]
    return [SiteScores(site, torch.rand(site.channels, generator=generator)) for site in sites]


def gone(sites: list[SiteScores], counts: list[int]) -> int:
    return sum((s.site.units - kept) * s.site.unit_parameters for s, kept in zip(sites, counts, strict=True))


def whole(sites: list[SiteScores]) -> int:
    return gone(sites, [0] * len(sites))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.2, 0.33, 0.4, 0.5, 0.77, 0.85])
def test_global_adaptive_comes_within_the_cheapest_unit(ratio, seed):
    sites = scored(seed)
    counts = GlobalAdaptive().allocate(sites, ratio)
    asked = ratio * whole(sites)
    assert asked - CHANNEL < gone(sites, counts) <= asked + 1e-6
    assert min(counts) >= 1


def test_global_adaptive_passes_over_a_head_that_does_not_fit():
    """A head has the lowest score and the budget is three channels: channels go in its place."""
    sites = scored(layers=1)
    sites[0] = replace(sites[0], channels=torch.cat([torch.full((4,), -100.0), sites[0].channels[4:]]))
    counts = GlobalAdaptive().allocate(sites, (3 * CHANNEL + 1) / whole(sites))
    assert counts == [6, 21]
    counts = GlobalAdaptive().allocate(sites, (HEAD + 2 * CHANNEL) / whole(sites))
    assert counts == [5, 22]


@pytest.mark.parametrize("seed", range(3))
def test_global_adaptive_cuts_more_where_more_is_asked(seed):
    sites = scored(seed)
    cut = [gone(sites, GlobalAdaptive().allocate(sites, step / 200)) for step in range(179)]
    assert cut == sorted(cut) and cut[0] == 0


def test_global_adaptive_refuses_what_minimum_units_puts_out_of_reach():
    sites = scored()
    with pytest.raises(SpecError, match=r"ratio of 0\.99 .*minimum_units: 1, so 0\.8958 can be cut; lower the ratio"):
        GlobalAdaptive().allocate(sites, 0.99)
    reachable = 1 - (HEAD + CHANNEL) * 4 / whole(sites)
    assert set(GlobalAdaptive().allocate(sites, reachable)) == {1}
    assert gone(sites, GlobalAdaptive(minimum_units=0).allocate(sites, 0.99)) > 0.97 * whole(sites)


def test_global_adaptive_of_a_large_model():
    """The sites of a model of 7B: a slow loop over its units would be felt here."""
    mlp, attention = some_site("mlp"), some_site("attention")
    sites = []
    for layer in range(32):
        for place, units in ((attention, 32), (mlp, 11008)):
            site = replace(place, layer=layer, units=units, unit_parameters=12288 if place is mlp else 2097152)
            channels = torch.rand(site.channels, generator=torch.Generator().manual_seed(layer))
            sites.append(SiteScores(site, channels))
    asked = 0.2 * whole(sites)
    assert asked - 12288 < gone(sites, GlobalAdaptive().allocate(sites, 0.2)) <= asked


@pytest.mark.parametrize("skipped", [True, False], ids=["skipped", "beyond"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_explicit_refuses_a_share_for_a_layer_that_cannot_be_cut(kind, skipped):
    layer = 1 if skipped else 4
    shares = {name: [0.25, 0.0, 0.25, 0.25, 0.0] for name in ("attention", "mlp")}
    sites = [scores for scores in scored() if scores.site.layer != 1]
    assert len(Explicit(**shares).allocate(sites, None)) == 6
    shares[kind][layer] = 0.5
    with pytest.raises(SpecError, match=rf"{kind} names 0\.5 for layer {layer}, which the model does not have or"):
        Explicit(**shares).allocate(sites, None)
