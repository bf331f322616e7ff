"""The checks of routed experts find what is broken on purpose."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from prunekit.registry import ExpertStatistic, Scorer, expert_sites
from prunekit.registry.checks import check_component, check_sites
from prunekit.registry.checks.experts import check_experts
from prunekit.strategies.reap import ExpertFrequency, Reap

from tests.moe_models import FAMILIES, built, catalog, is_supported


def serving(family):
    """The architecture that serves a family."""
    made = [entry.component() for entry in catalog().of_role("architectures")]
    return next(each for each in made if family in each.model_types)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family):
    if not is_supported(family):
        pytest.skip(f"this transformers has no {family}")
    check_sites(serving(family), built(family))


def broken(family, change):
    """The architecture of a family whose expert sites are changed."""
    base = type(serving(family))

    class Broken(base):
        """Broken on purpose."""

        def expert_sites(self, model, unit):
            return change(super().expert_sites(model, unit), unit)

    return Broken()


def of(unit, **changes):
    """A change of all sites with these units."""
    return lambda sites, found: [replace(site, **changes) if found == unit else site for site in sites]


BROKEN = {
    "another norm": ("mixtral", of("whole", norm="model.layers.0.input_layernorm"), "does not read what"),
    "parameters": ("mixtral", of("channels", unit_parameters=7), "the site says 7"),
    "order": ("mixtral", lambda sites, unit: sites[::-1] if unit == "channels" else sites, "in order"),
    "a layer left out": (
        "mixtral",
        lambda sites, unit: sites[:1] if unit == "whole" else sites,
        "whole experts are in",
    ),
    "another router": ("qwen2_moe", of("whole", router="model.layers.0.mlp.shared_expert_gate"), "not the router"),
    "too few stay": ("mixtral", of("whole", least=1), "2 are chosen, not 1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_sites_fail(what):
    family, change, words = BROKEN[what]
    with pytest.raises(AssertionError, match=words):
        check_sites(broken(family, change), built(family))


def test_rows_of_another_channel_fail():
    """gpt-oss lists gate and up in turns; Mixtral one after the other."""
    segments = serving("mixtral").expert_sites(built("mixtral"), "channels")[0].producers[0].segments

    def change(sites, unit):
        if unit != "channels":
            return sites
        return [replace(s, producers=(replace(s.producers[0], segments=segments),)) for s in sites]

    with pytest.raises(AssertionError, match="make another channel"):
        check_experts(broken("gpt_oss", change), built("gpt_oss"))


def test_experts_that_compute_something_else_fail(monkeypatch):
    model = built("mixtral")
    experts = model.model.layers[0].mlp.experts
    own = experts.forward
    monkeypatch.setattr(experts, "forward", lambda *args: own(*args) * 2, raising=False)
    with pytest.raises(AssertionError, match="something else than its matrices say"):
        check_sites(serving("mixtral"), model)


@pytest.mark.parametrize("component", [Reap, ExpertFrequency])
def test_strategies_pass(component):
    check_component(component)
    check_component(component().scorer)


class ByNumber(ExpertStatistic):
    """Values an expert by its number."""

    name: Literal["by_number"] = "by_number"

    def value(self, weights, norms):
        return norms * torch.arange(weights.shape[1])


class ByBatch(ExpertStatistic):
    """Values a token by the batch that it is in."""

    name: Literal["by_batch"] = "by_batch"

    def value(self, weights, norms):
        return norms / norms.sum()


@pytest.mark.parametrize(("made", "words"), [(ByNumber, "turned around"), (ByBatch, "in two batches")])
def test_broken_statistics_fail(made, words):
    class Broken(Scorer):
        """Broken on purpose."""

        name: Literal["broken"] = "broken"
        statistic = made()

        def prepare(self, weight, site):
            return None

        def score(self, prepared, statistic):
            return statistic

    with pytest.raises(AssertionError, match=words):
        check_component(Broken)


def test_sites_of_a_layer_by_hand():
    """What a third party calls for a family of its own."""
    model = built("mixtral")
    block = "model.layers.0.mlp"
    sites = expert_sites(
        model, 0, "model.layers.0.post_attention_layernorm", f"{block}.experts", f"{block}.gate", "whole"
    )
    assert [(site.kind, site.units, site.least) for site in sites] == [("experts", 6, 2)]
