"""Registers the classes of exported models with transformers."""

from __future__ import annotations

import functools
from typing import Any

from ....registry import ModelError
from ..architectures import PRUNED

CODE = "modeling_prunekit.py"
"""The file with the model classes, in this package and in exported folders."""


@functools.cache
def register() -> None:
    """Register exported models with transformers' Auto classes, so that no code from a folder has to run.

    Raises :class:`ModelError` if the installed transformers has no per-layer configurations.
    """
    import transformers

    for model in model_classes():
        transformers.AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def model_classes() -> tuple[Any, ...]:
    """The classes of models with a shape for every layer; raises :class:`ModelError` as :func:`register` does."""
    try:
        from .modeling_prunekit import MODELS
    except ImportError as error:
        raise ModelError(str(error)) from error
    return MODELS


def needs() -> dict[str, str]:
    """The packages that load such a model, and their oldest versions."""
    model_classes()
    from .modeling_prunekit import OLDEST

    return {"transformers": OLDEST}


def family_of(config: Any) -> str:
    """The model type; for an exported model, that of the family it was made from."""
    return config.model_type.removeprefix(PRUNED)
