"""The model classes of exported models, made known to transformers."""

from __future__ import annotations

import functools
from typing import Any

from ....registry import ModelError
from ..architectures import PRUNED

CODE = "modeling_prunekit.py"
"""The file with the model classes, here and next to exported weights."""


@functools.cache
def register() -> None:
    """Make transformers' Auto classes know exported models, so that no code from a folder has to be run.

    Raises :class:`ModelError` where the installed transformers has no per-layer configurations.
    """
    import transformers

    for model in model_classes():
        transformers.AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def model_classes() -> tuple[Any, ...]:
    try:
        from .modeling_prunekit import MODELS
    except ImportError as error:
        raise ModelError(str(error)) from error
    return MODELS


def needs() -> dict[str, str]:
    """Packages, and their oldest versions, that load such a model."""
    model_classes()
    from .modeling_prunekit import OLDEST

    return {"transformers": OLDEST}


def family_of(config: Any) -> str:
    """The model type, that of an exported model being the family it was made of."""
    return config.model_type.removeprefix(PRUNED)
