"""Which formats can hold a model of a type; what a cut must be for them is checked with the cut."""

from __future__ import annotations

from ...registry import Architecture, ModelError
from ..models.exported import classes
from .gguf.file import MODEL_TYPES
from .profiles import PROFILES


def profiles_for(kind: str, architecture: Architecture) -> list[str]:
    """The names of the formats that can hold a pruned model of type ``kind``, in the order of ``export --list``."""
    smaller = architecture.sizes is not None
    can = {"hf-uniform": smaller, "hf-hetero": smaller and _has_class(kind), "gguf": kind in MODEL_TYPES}
    return [profile.name for profile in PROFILES if can.get(profile.name, True)]


def _has_class(kind: str) -> bool:
    try:
        classes.class_of(kind)
    except ModelError:
        return False
    return True
