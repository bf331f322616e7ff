"""What results say about where they come from: the model, the cut, the code."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from ... import __version__
from ...registry import Component
from ...registry.sites import SiteKind
from ...registry.tensors.devices import device_of, places_of
from ..files.spec import PipelineSpec
from ..models.loading import Loaded, fingerprint
from ..output.records import CompensationFacts, Cut, Kept, LayerCut, ModelFacts
from ..pruning.pruned import Pruned


def about_model(loaded: Loaded) -> ModelFacts:
    """What identifies the model, its weights' fingerprint included, and how it was run."""
    model = loaded.model
    return ModelFacts(
        **loaded.identity,
        fingerprint=fingerprint(model),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device_of(model.get_input_embeddings())),
        device_map=_device_map(model),
        attention=getattr(model.config, "_attn_implementation", None),
    )


def _device_map(model: Any) -> str | None:
    """Such as "cpu+disk: 12 modules on cpu, 20 on disk"; None for a model in one place."""
    places = places_of(model)
    first, *others = [f"{count} on {place}" for place, count in places.items()] or [""]
    return f"{'+'.join(places)}: {', '.join([first.replace(' ', ' modules ', 1), *others])}" if places else None


def about_cut(pruned: Pruned) -> Cut:
    """Kept units of every layer, skipped ones included, the ratio asked for and achieved, and the compensation."""
    layers: dict[int, dict[SiteKind, Kept]] = {}
    for site in pruned.all_sites:
        kept = pruned.counts.get((site.layer, site.kind), site.units)
        layers.setdefault(site.layer, {})[site.kind] = Kept(kept=kept, units=site.units)
    compensation = pruned.about_compensation()
    return Cut(
        ratio=pruned.ratio,
        compensation=None if compensation is None else CompensationFacts(**compensation),
        attention_unit=pruned.strategy.attention_unit,
        layers=[LayerCut.of(index, layers[index]) for index in sorted(layers)],
    )


def plugins_used(spec: PipelineSpec) -> dict[str, list[str]]:
    """Who provides the components in use: provider -> names."""
    used: list[Component] = [spec.prune, *spec.evaluate]
    parts = (getattr(spec.prune, field) for field in type(spec.prune).model_fields)
    used += [part for part in parts if isinstance(part, Component)]
    providers: dict[str, list[str]] = {}
    for component in used:
        for entry in spec.catalog.entries:
            if entry.component is type(component):
                providers.setdefault(entry.provider, []).append(f"{entry.role}/{entry.name}")
    return {provider: sorted(set(names)) for provider, names in sorted(providers.items())}


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"python": platform.python_version(), "prunekit": __version__}
    for package in ("torch", "transformers", "tokenizers", "datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
