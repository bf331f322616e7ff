"""What ``prunekit families`` prints: the model types that are served."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...registry import Catalog, ModelError
from ..export.support import profiles_for
from ..models.experts import EXPERTS
from ..models.language import READ_IMAGES
from ..models.likeness import types_of
from ..models.loading import outline_of
from ..models.source import ModelSource
from ..output import printing
from ..pruning.sites import architecture_of, find_sites

TESTED = (
    "on tiny random models, by four strategies: what is cut equals what is zeroed, padded or not, in generation too"
)
INSIDE = (
    "inside of tiny random models that also read images, by four strategies: what is cut equals what is zeroed, with "
    "images, padded on the left, in generation too"
)
"""How types are tested that are not models of their own."""
EVERY = ("padded", "dynamic")
"""Formats that hold every model, and do not make it smaller on disk."""


@dataclass(frozen=True)
class Served:
    """A model type that is served."""

    model_type: str
    architecture: str
    provider: str
    layers: str
    """What its layers have that Llama's have not; empty: nothing."""
    leaves: str
    """What large part of the layers is never cut; empty: nothing."""
    exports: list[str]
    fewer_experts: bool
    """Whether hf-uniform holds it with fewer routed experts."""
    tested: str
    """How prunekit's tests prove it; empty for a type that a plugin serves."""
    installed: bool
    """Whether the installed transformers has the type."""


def served(catalog: Catalog) -> list[Served]:
    """All model types that the catalog's architectures serve, sorted by name."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALONE

    found = []
    for entry in catalog.of_role("architectures"):
        made: Any = entry.component
        architecture = made()
        about = (entry.name, entry.provider, architecture.form, architecture.leaves)
        ours = entry.provider.startswith("prunekit ")
        for kind in types_of(entry):
            exports, experts = profiles_for(kind, architecture), kind in EXPERTS
            tested = (INSIDE if kind in CONFIG_MAPPING and kind not in ALONE else TESTED) if ours else ""
            found.append(Served(kind, *about, exports, experts, tested, kind in CONFIG_MAPPING))
    return sorted(found, key=lambda each: each.model_type)


def show(catalog: Catalog) -> None:
    """Print the served model types as a table."""
    found = served(catalog)
    rows = []
    for each in found:
        smaller = ", ".join(name for name in each.exports if name not in EVERY)
        if each.fewer_experts and "hf-uniform" not in each.exports:
            smaller = "hf-uniform of whole experts"
        ours = {TESTED: "yes", INSIDE: "inside"}.get(each.tested, f"no, by {each.provider}")
        name = each.model_type if each.installed else f"{each.model_type} (not in this transformers)"
        rows.append((name, each.layers or "as Llama", each.leaves or "-", smaller or "-", ours))
    printing.show_table(("model type", "layers", "left whole", "smaller exports", "tested"), rows, left=5)
    printing.say(
        f"{len(found)} model types. Exports {' and '.join(EVERY)} hold every one; of whole experts that are gone, "
        f"hf-uniform and dynamic do, where the configuration divides experts into no groups (n_group: 1)."
    )
    printing.say(f"Tested: {TESTED}. Tested inside: {INSIDE}.")
    printing.say(
        f"Models that also read images are pruned by the language model inside: {', '.join(READ_IMAGES)}, and others "
        "whose language model has one of these types (docs/limits.md)."
    )
    printing.say(
        "Another type whose layers look like one of these: architecture: {like: TYPE} (docs/architectures.md)."
    )


def show_of(name: str, catalog: Catalog) -> None:
    """Print which architecture serves a model; raises :class:`ModelError`, with the lines of a plugin, for none."""
    model = outline_of(ModelSource(name=name))
    if model is None:
        raise ModelError(f"the configuration of {name} is not known here; name a folder, or download the model first")
    find_sites(model, catalog, "kv_group")
    printing.say(f"{name}: architecture {architecture_of(model.config, catalog).name}")


def as_data(catalog: Catalog) -> list[dict[str, Any]]:
    """The served model types as plain data."""
    return [asdict(each) for each in served(catalog)]
