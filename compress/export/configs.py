"""Configurations of exported models: what is carried over from the model before, and whether weights fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...registry import ModelError
from .tensors import PlannedTensor, Tensors

NOT_CARRIED = {"model_type", "architectures", "auto_map", "per_layer_config", "transformers_version", "_name_or_path"}


def window_in_force(config: Any) -> bool:
    """Whether attention is cut off by a sliding window that is shorter than the model's context."""
    window, used = getattr(config, "sliding_window", None), getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return used and window is not None and window < config.max_position_embeddings and "sliding_attention" in kinds


def carried(config: Any, cls: type) -> dict[str, Any]:
    """What a configuration of another class takes over from ``config``: every field that both have."""
    known = {field.name for field in dataclasses.fields(cls)} - NOT_CARRIED
    return {key: value for key, value in config.to_dict().items() if key in known}


def fitted(config: Any, tensors: Tensors) -> Tensors:
    """``tensors`` with zeros for biases that a model of ``config`` has besides; nothing else may be missing or over.

    Says in ``config`` which class that is, and that it needs no code of its own.

    Raises :class:`ModelError` naming the first tensor that does not fit.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.__dict__.pop("auto_map", None)
    parameters = dict(model.named_parameters())  # tied ones are named once
    found = dict(tensors)
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if name not in found and name.endswith(".bias"):
            dtype = found[f"{name.removesuffix('bias')}weight"].dtype
            found[name] = PlannedTensor(shape, dtype, _zeros(shape, dtype))
        if name in found and found[name].shape != shape:
            raise _unfit(model, f"{name} is {found[name].shape}, and {shape} was expected")
        if name not in found:
            raise _unfit(model, f"{name} is missing")
    over = [name for name in found if name not in parameters and name not in dict(model.named_buffers())]
    if over:
        raise _unfit(model, f"there is no place for {over[0]}")
    return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return lambda: torch.zeros(shape, dtype=dtype)


def _unfit(model: Any, what: str) -> ModelError:
    return ModelError(
        f"the pruned weights do not fit a {type(model).__name__}: {what}; export with --profile hf-hetero or padded"
    )
