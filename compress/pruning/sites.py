"""The sites of a model: all of them, and those that a strategy prunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...registry import (
    Architecture,
    AttentionUnit,
    Catalog,
    ModelError,
    Site,
    SpecError,
    Strategy,
)
from ...registry.catalog import Entry
from ..models.architectures import PRUNED
from ..models.likeness import ANY, advice
from ..models.more_families import REFUSED


def find_sites(model: nn.Module, catalog: Catalog, unit: AttentionUnit) -> tuple[str, list[Site]]:
    """Path of the decoder layers and all sites, by the architecture that serves the model's type."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model: expected a loaded model, found {model!r:.80}; load it with transformers' "
            "AutoModelForCausalLM.from_pretrained first, or name it in a pipeline file"
        )
    inner = model._modules.get("module")
    if inner is not None and len(model._modules) == 1:
        raise ModelError(
            f"model: a {type(model).__name__} is a wrapper; prune the model inside it, model.module, a "
            f"{type(inner).__name__}, before it is wrapped"
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = architectures_in(catalog)
    serving = [each for each in known if kind in each[1].model_types or ANY in each[1].model_types]
    if len(serving) > 1:
        both = " and ".join(f"{entry.name} (plugin {entry.plugin} of {entry.provider})" for entry, _ in serving)
        raise ModelError(
            f"model type {kind!r} is served by architectures {both}; switch one off with PRUNEKIT_BLOCK, or name one, "
            f"as architecture: {{like: {serving[-1][0].name}}}"
        )
    if serving:
        entry, architecture = serving[0]
        try:
            sites = architecture.sites(model, unit)
        except AttributeError as error:
            if ANY in architecture.model_types:
                raise misfit(entry, model, error) from error
            raise ModelError(
                f"architecture {architecture.name} serves model type {kind!r}, but this {type(model).__name__} is "
                f"built differently ({error}); {_instead(model, architecture.layers)}"
            ) from error
        if not sites:
            raise ModelError(f"architecture {architecture.name} finds nothing in this {type(model).__name__} to prune")
        return architecture.layers, sites
    if kind in REFUSED:
        raise ModelError(f"models of type {kind!r} cannot be pruned: {REFUSED[kind]}; use another model")
    served = [kind for _, architecture in known for kind in architecture.model_types if not kind.startswith(PRUNED)]
    remedy = _inner_model(model, served) or advice(model, str(kind), [architecture for _, architecture in known])
    listed = f"prunekit families lists the {len(served)} that are served"
    raise ModelError(f"no architecture serves model type {kind!r}; {listed}. {remedy or WRITE_ONE}")


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


_WRAP = (
    "whole = AutoModelForCausalLM.from_config(config), whole.model = backbone, whole.lm_head = output layer; then "
    "prune whole"
)


def _instead(model: nn.Module, layers: str) -> str:
    """What to pass instead of a model without the decoder layers at ``layers``."""
    try:
        model.get_submodule(layers.partition(".")[2])
    except AttributeError:
        return "pass the causal language model itself, without wrappers"
    return f"it is a backbone without an output layer: pass what AutoModelForCausalLM loads, or put it in one ({_WRAP})"


def _inner_model(model: nn.Module, served: Sequence[str]) -> str:
    """A hint for a model that holds a language model of a served type, such as a vision-language model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config or text.model_type not in served:
        return ""
    return (
        f"Its {text.model_type} language model can be pruned alone: with config = model.config.get_text_config() "
        f"and backbone = model.model.language_model, {_WRAP}"
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
