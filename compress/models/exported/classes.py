"""The classes of exported models whose layers have different shapes, and their registration with transformers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ....registry import ModelError
from ..architectures import PRUNED

CODE = "modeling_prunekit.py"
"""The file with the model classes, in this package and in exported folders."""


NOT_CARRIED = {"model_type", "architectures", "auto_map", "per_layer_config", "transformers_version", "_name_or_path"}


@functools.cache
def register(family: str | None = None) -> None:
    """Register exported models with transformers' Auto classes, so that no code from a folder has to run.

    They are the models of the families with a class of their own, and of ``family``. Raises :class:`ModelError` if the
    installed transformers has no per-layer configurations, or no such family.
    """
    import transformers

    models = [*model_classes(), *([] if family is None else [class_of(family)])]
    for model in models:
        transformers.AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def model_classes() -> tuple[Any, ...]:
    """The classes of models with a shape for every layer that families have of their own.

    Raises :class:`ModelError` as :func:`register` does.
    """
    try:
        from .modeling_prunekit import MODELS
    except ImportError as error:
        raise ModelError(str(error)) from error
    return MODELS


def class_of(family: str) -> Any:
    """The class of models of a family with a shape for every layer, by the model type of the family.

    Raises :class:`ModelError` for a family that is none of transformers' causal language models.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_classes()
    from .modeling_prunekit import model_class

    base: Any = None
    if family in CONFIG_MAPPING:
        base = transformers.AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[family], None)
    if not (isinstance(base, type) and hasattr(transformers, base.__name__)):
        raise ModelError(
            f"transformers {transformers.__version__} has no causal language model of type {family!r}, on which one "
            "with layers of different shapes is built; install the transformers that has it"
        )
    return model_class(base)


def needs() -> dict[str, str]:
    """The packages that load such a model, and their oldest versions."""
    model_classes()
    from .modeling_prunekit import OLDEST

    return {"transformers": OLDEST}


def family_of(config: Any) -> str:
    """The model type; for an exported model, that of the family it was made from."""
    return config.model_type.removeprefix(PRUNED)


def homogeneous(config: Any) -> Any:
    """The family's stock configuration for one with a shape for every layer; any other is returned as it is."""
    if not config.model_type.startswith(PRUNED):
        return config
    import transformers

    cls = type(transformers.AutoConfig.for_model(family_of(config)))
    size = {"head_dim": config.head_dim} if hasattr(config, "head_dim") else {}  # not every class has this field
    return cls(**{**carried(config, cls), **size})


def carried(config: Any, cls: type) -> dict[str, Any]:
    """The fields of ``config`` that a configuration of class ``cls`` has too."""
    known = sorted({field.name for field in dataclasses.fields(cls)} - NOT_CARRIED)
    stored, other = config.to_dict(), config.attribute_map  # some fields are stored under another name
    return {key: stored[other.get(key, key)] for key in known if other.get(key, key) in stored}
