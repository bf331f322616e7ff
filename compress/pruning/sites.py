"""The sites of a model: all of them, and those that a strategy prunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...registry import (
    Architecture,
    AttentionUnit,
    Catalog,
    ExpertUnit,
    ModelError,
    Site,
    SpecError,
    Strategy,
)
from ...registry.catalog import Entry
from ...registry.tensors.experts import experts_in
from ..models.architectures import PRUNED
from ..models.experts import ROUTED
from ..models.exported.classes import family_of
from ..models.language import WithTextConfig, has_layers, inside, text_config
from ..models.likeness import ANY, advice
from ..models.more_families import REFUSED


def find_sites(
    model: nn.Module, catalog: Catalog, unit: AttentionUnit, experts: ExpertUnit = "channels"
) -> tuple[str, list[Site]]:
    """Path of the decoder layers and all sites, by the architecture that serves the model's type.

    Of a model that also reads images, it is the architecture of the language model inside of it.
    ``experts``: whether channels of routed experts are sites, too, whole experts are the only ones, or none are.
    """
    config: Any = getattr(model, "config", None)
    entry, architecture = serving(config, catalog) or (None, None)
    if entry is None or architecture is None:
        raise unserved(config, catalog, model)
    kind, seen = text_config(model).model_type, model
    if text_config(model) is not config and not has_layers(model, architecture.layers):
        found = inside(architecture, model)
        if found is None:
            raise ModelError(
                f"this {type(model).__name__} has no {kind} language model with layers at "
                f"{architecture.layers.partition('.')[2]}; pass the causal language model itself"
            )
        architecture, seen = found, WithTextConfig(model)
    try:
        others = [] if experts == "whole" else architecture.sites(seen, unit)
        routed = [] if experts == "keep" else architecture.expert_sites(seen, experts)
    except AttributeError as error:
        if ANY in architecture.model_types:
            raise misfit(entry, model, error) from error
        raise ModelError(
            f"architecture {architecture.name} serves model type {kind!r}, but this {type(model).__name__} is built "
            f"differently ({error}); {_instead(model, architecture.layers)}"
        ) from error
    if experts == "whole" and not routed:
        raise ModelError(
            f"experts: whole removes routed experts, and architecture {architecture.name} knows none of this "
            f"{type(model).__name__} ({kind}); use a strategy that cuts heads and channels, such as wanda_sp"
        )
    sites = sorted([*others, *routed], key=lambda site: site.layer)
    if not sites:
        raise ModelError(f"architecture {architecture.name} finds nothing in this {type(model).__name__} to prune")
    return architecture.layers, sites


def serving(config: Any, catalog: Catalog) -> tuple[Entry, Architecture] | None:
    """The architecture that serves a model of this configuration, or the language model inside of it; None: none does.

    Raises :class:`ModelError` where several do.
    """
    known = architectures_in(catalog)
    for kind in _kinds(config):
        found = [each for each in known if kind in each[1].model_types or ANY in each[1].model_types]
        if len(found) > 1:
            both = " and ".join(f"{entry.name} (plugin {entry.plugin} of {entry.provider})" for entry, _ in found)
            raise ModelError(
                f"model type {kind!r} is served by architectures {both}; switch one off with PRUNEKIT_BLOCK, or name "
                f"one, as architecture: {{like: {found[-1][0].name}}}"
            )
        if found:
            return found[0]
    return None


def architecture_of(config: Any, catalog: Catalog) -> Architecture:
    """The architecture that serves a model of this configuration; raises :class:`ModelError` for none or several."""
    found = serving(config, catalog)
    if found is None:
        raise unserved(config, catalog)
    return found[1]


def left_whole(model: nn.Module, catalog: Catalog, experts: ExpertUnit) -> str:
    """What large part of the model no site cuts, by the family and by what is done with routed experts."""
    if experts == "whole":
        return f"all but {ROUTED}"
    left = architecture_of(model.config, catalog).leaves
    kept = experts == "keep" and ROUTED not in left and experts_in(model)
    return ", ".join(filter(None, (left, ROUTED if kept else "")))


def partly_covered(model: nn.Module, layers: Sequence[nn.Module], sites: Sequence[Site]) -> frozenset[int]:
    """Numbers of the decoder layers that have a matrix outside of all sites: another mixer, or experts that stay.

    They are left where all of a layer's sites keep nothing.
    """
    paths: set[str] = set()
    for site in sites:
        for path in (site.entry, site.consumer, *(producer.path for producer in site.producers)):
            # Experts of a layer may be one tensor, "module:name:number"; their router lies next to that module.
            paths.add(path.partition(":")[0].rpartition(".")[0] if ":" in path else path)
    covered = {module for path in paths for module in model.get_submodule(path).modules()}
    return frozenset(
        number
        for number, layer in enumerate(layers)
        for module in layer.modules()
        if module not in covered and any(each.dim() > 1 for each in module.parameters(recurse=False))
    )


def unserved(config: Any, catalog: Catalog, model: nn.Module | None = None) -> ModelError:
    """The error for a model type that no architecture serves, with what to write for this model."""
    for each in _kinds(config):
        if each in REFUSED:
            return ModelError(f"models of type {each!r} cannot be pruned: {REFUSED[each]}; use another model")
    known = [architecture for _, architecture in architectures_in(catalog)]
    served = [kind for architecture in known for kind in architecture.model_types if not kind.startswith(PRUNED)]
    kind, *within = _kinds(config)
    whose = f", whose language model is of type {within[0]!r}" if within else ""
    listed = f"prunekit families lists the {len(served)} that are served"
    remedy = "" if model is None or within else advice(model, str(kind), known)
    return ModelError(f"no architecture serves model type {kind!r}{whose}; {listed}. {remedy or WRITE_ONE}")


def _kinds(config: Any) -> list[str | None]:
    """The model type of a configuration and of the language model inside of it; of an exported one, its family's."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return list(dict.fromkeys(family_of(each) if hasattr(each, "model_type") else None for each in (config, text)))


WRITE_ONE = "Write one as a plugin: a prunekit.registry.Architecture with the model's names (docs/architectures.md)"


def architectures_in(catalog: Catalog) -> list[tuple[Entry, Architecture]]:
    """The architectures of a catalog, with who provides them."""
    classes: list[tuple[Entry, Any]] = [(entry, entry.component) for entry in catalog.of_role("architectures")]
    return [(entry, made()) for entry, made in classes]


def misfit(entry: Entry, model: nn.Module, reason: Any) -> ModelError:
    """The error for an architecture that the user names and that is not this model's."""
    return ModelError(
        f"architecture.like: {entry.name} does not fit this {type(model).__name__} ({reason}); name another one of "
        "prunekit families, or write an architecture (docs/architectures.md)"
    )


def _instead(model: nn.Module, layers: str) -> str:
    """What to pass instead of a model without the decoder layers at ``layers``."""
    try:
        model.get_submodule(layers.partition(".")[2])
    except AttributeError:
        return "pass the causal language model itself, without wrappers"
    return (
        "it is a backbone without an output layer: pass what AutoModelForCausalLM loads, or put it in one (whole = "
        "AutoModelForCausalLM.from_config(config), whole.model = backbone, whole.lm_head = output layer; then prune "
        "whole)"
    )


def sites_within(strategy: Strategy, sites: list[Site], layers: int) -> tuple[list[Site], float | None]:
    """Sites of the layers that are not skipped, and the share that they must lose."""
    beyond = [layer for layer in strategy.skip_layers if not 0 <= layer < layers]
    if beyond:
        raise SpecError(f"skip_layers: the model has layers 0 to {layers - 1}, found {beyond[0]}")
    kept_whole = set(strategy.skip_layers)
    inside = [site for site in sites if site.layer not in kept_whole]
    if not strategy.allocator.takes_ratio or not strategy.ratio:
        return inside, strategy.ratio
    others = layers - len(kept_whole)
    if not others:
        raise SpecError(f"skip_layers: all {layers} layers are skipped, so a ratio of {strategy.ratio} is out of reach")
    ratio = strategy.site_ratio(strategy.ratio, layers, len(kept_whole))
    if ratio >= 1:
        raise SpecError(
            f"ratio {strategy.ratio} is out of reach: with {len(kept_whole)} of {layers} layers skipped the others "
            f"would have to lose {ratio:.3g} of their units; skip fewer layers, or ask for less than "
            f"{others / layers:.3g}"
        )
    return inside, ratio
