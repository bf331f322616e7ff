"""Which formats can hold a model of a type; what a cut must be for them is checked with the cut."""

from __future__ import annotations

from ...registry import ModelError
from ..models.architectures import PRUNED
from ..models.exported import classes
from .configs import WITHOUT_WINDOW
from .gguf.file import MODEL_TYPES
from .profiles import PROFILES

STOCK = (*WITHOUT_WINDOW, "qwen3", "opt")
"""Model types with a stock class for the shapes of a pruned model."""


def profiles_for(kind: str) -> list[str]:
    """The names of the formats that can hold a pruned model of type ``kind``, in the order of ``export --list``."""
    try:
        own_shapes = {made.config_class.model_type.removeprefix(PRUNED) for made in classes.model_classes()}
    except ModelError:  # the installed transformers has no configurations with a shape for every layer
        own_shapes = set()
    limited = {"hf-uniform": STOCK, "hf-hetero": own_shapes, "gguf": MODEL_TYPES}
    return [profile.name for profile in PROFILES if kind in limited.get(profile.name, (kind,))]
