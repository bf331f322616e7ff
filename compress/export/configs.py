"""Configurations of exported models: of a stock class, of one with a shape for every layer, of the original class."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...registry import ModelError, SpecError
from ...registry.tensors.tokens import context_of
from ..models.architectures import PRUNED, head_size
from ..models.exported import classes
from ..pruning.pruned import Pruned
from .cut_model import LayerShape
from .weights import PlannedTensor, Tensors

NOT_CARRIED = {"model_type", "architectures", "auto_map", "per_layer_config", "transformers_version", "_name_or_path"}

WITHOUT_WINDOW = ("llama", "mistral", "qwen2")
"""Families that compute the same function if no sliding window is in force; their classes allow different shapes."""


def window_in_force(config: Any) -> bool:
    """Whether attention is limited to a sliding window that is shorter than the model's context."""
    window, used = getattr(config, "sliding_window", None), getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    inside = window is not None and 0 < window < (context_of(config) or 0)
    return used and inside and "sliding_attention" in kinds


def homogeneous(config: Any) -> Any:
    """The family's stock configuration for one with a shape for every layer; any other is returned as it is."""
    if not config.model_type.startswith(PRUNED):
        return config
    import transformers

    cls = type(transformers.AutoConfig.for_model(classes.family_of(config)))
    size = {"head_dim": config.head_dim} if hasattr(config, "head_dim") else {}  # not every class has this field
    return cls(**{**_carried(config, cls), **size})


def shortened(config: Any, layers: Sequence[LayerShape]) -> tuple[Any, list[LayerShape]]:
    """The configuration and the shapes without the layers of which nothing is left.

    Raises :class:`SpecError` where no layer is left.
    """
    left = [number for number, layer in enumerate(layers) if not layer.gone]
    if not left:
        raise SpecError("nothing is left of any layer, and no model has none; lower the ratio")
    if len(left) == len(layers):
        return config, list(layers)
    config = copy.deepcopy(homogeneous(config))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in left]
    config.num_hidden_layers = len(left)
    return config, [layers[number] for number in left]


def lacking(layers: Sequence[LayerShape]) -> str | None:
    """The first layer without attention or MLP, such as "layer 3 has no MLP"; None: every layer has both."""
    for index, layer in enumerate(layers):
        if not (layer.heads and layer.width):
            return f"layer {index} has no {'MLP' if layer.heads else 'attention'}"
    return None


def check_whole(profile: str, layers: Sequence[LayerShape]) -> None:
    """Raise :class:`SpecError` for a layer of which a part is left, in a format without empty blocks."""
    if found := lacking(layers):
        raise SpecError(
            f"profile {profile}: {found} left, and this format needs both in every layer; whole layers may go "
            "(strategies shortgpt and sleb). Nearest: --profile hf-hetero"
        )


# Profile hf-uniform


def stock_config(dense: Any, layers: Sequence[LayerShape]) -> Any:
    """The configuration of a stock class for layers of one shape.

    It is the family's own class if that class, and the servers that load it, allow the shape. Otherwise it is Llama for
    head counts that divide the hidden size, Mistral for other head counts, and Granite, with multipliers of 1, for
    other head counts with biases. Raises :class:`SpecError` or :class:`ModelError` naming the nearest profile.
    """
    import transformers

    check_whole("hf-uniform", layers)
    layer, family, dense = _uniform_layer(layers), classes.family_of(dense), homogeneous(dense)
    if family == "opt":
        if layer.heads != dense.num_attention_heads:
            raise SpecError(_opt_heads(layer.heads, dense.num_attention_heads, len(layers)))
        return _changed(dense, {"ffn_dim": layer.width})
    sizes = {
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "intermediate_size": layer.width,
        "head_dim": head_size(dense),
    }
    biases = layer.attention_bias or layer.mlp_bias
    if family == "qwen3":
        if layer.mlp_bias or (layer.attention_bias and not getattr(dense, "attention_bias", False)):
            # transformers' Qwen3 allows a bias in attention, but vLLM's drops it without a message.
            raise SpecError(
                "profile hf-uniform: Qwen3 has no place for the biases that this compensation gives; nearest: "
                "--profile hf-hetero, or --set prune.compensate=none"
            )
        return _changed(dense, sizes)
    if family not in WITHOUT_WINDOW:
        raise ModelError(
            f"profile hf-uniform: model type {family!r} is not known to have a stock class for pruned shapes; nearest: "
            "--profile padded, or --profile dynamic"
        )
    # vLLM's Qwen2 takes the hidden size divided by the number of heads as head size.
    whole_heads = layer.heads == dense.num_attention_heads
    divides = dense.hidden_size % layer.heads == 0
    own_class = {"llama": divides, "mistral": True, "qwen2": whole_heads}[family]
    if own_class and not biases:
        return _changed(dense, sizes)
    if window_in_force(dense):
        raise SpecError(
            f"profile hf-uniform: {family} with a sliding window has no other class, and these "
            f"{'biases' if biases else 'head counts'} need one; nearest: --profile hf-hetero, or --profile padded"
        )
    # Qwen2 has biases on queries, keys and values; an output bias that the model lacks is written as zero.
    flags = {
        "attention_bias": layer.attention_bias or family == "qwen2" or getattr(dense, "attention_bias", False),
        "mlp_bias": layer.mlp_bias or getattr(dense, "mlp_bias", False),
    }
    if divides:
        return _of_class(transformers.LlamaConfig, dense, {**sizes, **flags})
    if not any(flags.values()):
        return _of_class(transformers.MistralConfig, dense, {**sizes, "sliding_window": None})
    neutral = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": head_size(dense) ** -0.5,
    }
    return _of_class(transformers.GraniteConfig, dense, {**sizes, **flags, **neutral})


def _uniform_layer(layers: Sequence[LayerShape]) -> LayerShape:
    """The shape of all layers; raises :class:`SpecError` naming the first layer that differs."""
    first = layers[0]
    for index, layer in enumerate(layers):
        if (layer.heads, layer.kv_heads, layer.width) != (first.heads, first.kv_heads, first.width):
            raise SpecError(
                f"profile hf-uniform: layer {index} keeps {_shape(layer)}, layer 0 {_shape(first)}; a stock class has "
                "one shape for all layers. Nearest: --profile hf-hetero, or prune all layers alike: no skip_layers, "
                "and allocator: {name: uniform, rounding: down}"
            )
    biases = any(layer.attention_bias for layer in layers), any(layer.mlp_bias for layer in layers)
    return LayerShape(first.heads, first.kv_heads, first.width, *biases)


def _shape(layer: LayerShape) -> str:
    return f"{layer.heads} query heads, {layer.kv_heads} key/value heads and {layer.width} channels"


def _opt_heads(kept: int, heads: int, layers: int) -> str:
    whole = "[" + ", ".join(["0"] * layers) + "]"
    return (
        f"profile hf-uniform: {kept} of OPT's {heads} heads were to be kept, but its stock class ties heads to the "
        "hidden size. Nearest: --profile hf-hetero; or cut the MLP alone, by --set prune.ratio=null --set "
        f"'prune.allocator={{name: explicit, attention: {whole}, mlp: [0.4, ...]}}' with a share for every layer"
    )


# Profile hf-hetero


def hetero_config(dense: Any, layers: Sequence[LayerShape]) -> Any:
    """A configuration with a shape for every layer; raises :class:`ModelError` for a family without such a class."""
    family = classes.family_of(dense)
    configs = {m.config_class.model_type.removeprefix(PRUNED): m.config_class for m in classes.model_classes()}
    if family not in configs:
        raise ModelError(
            f"profile hf-hetero: there is no model class for {family!r}; there are {', '.join(configs)}. Nearest: "
            "--profile padded keeps the original class, --profile dynamic needs none"
        )
    classes.register()
    cls = configs[family]
    values = _carried(dense, cls)
    # Biases that the whole family has need no flag.
    attention = values.get("enable_bias", False) or values.get("attention_bias", False)
    mlp = values.get("enable_bias", False) or values.get("mlp_bias", False)
    overrides: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        overrides[index] = {"num_attention_heads": layer.heads, cls.width: layer.width}
        if "num_key_value_heads" in values:
            overrides[index]["num_key_value_heads"] = layer.kv_heads
        if layer.attention_bias and not attention:
            overrides[index]["attention_output_bias"] = True
        if layer.mlp_bias and not mlp:
            overrides[index]["mlp_output_bias"] = True
    if "num_key_value_heads" in values:
        values["head_dim"] = head_size(dense)
    return cls(**values, per_layer_config=overrides)


def add_code(folder: Path, config: Any) -> None:
    """Copy the code of the model classes into the folder, and name it in ``config``."""
    source = Path(classes.__file__).with_name(classes.CODE)
    shutil.copyfile(source, folder / classes.CODE)
    config.auto_map = {
        "AutoConfig": f"{source.stem}.{type(config).__name__}",
        "AutoModelForCausalLM": f"{source.stem}.{config.architectures[0]}",
    }


# Profile padded


def padded_config(pruned: Pruned, tensors: Tensors) -> Any:
    """The original configuration, with the biases that compensation has added.

    Raises :class:`SpecError` for a class without a place for them.
    """
    config = copy.deepcopy(pruned.model.config)
    added = tensors.keys() - pruned.model.state_dict().keys()
    for site in pruned.sites:
        if f"{site.consumer}.bias" not in added:
            continue
        key = f"{site.kind}_bias"
        if not hasattr(config, key):
            raise SpecError(
                f"profile padded: compensation gives {site.consumer} a bias, and {type(pruned.model).__name__} has "
                "no place for one; nearest: --profile hf-hetero, or --set prune.compensate=none"
            )
        setattr(config, key, True)
    return config


# All profiles


def fitted(config: Any, tensors: Tensors) -> Tensors:
    """``tensors`` with zeros for the further biases of a model of ``config``; all others must match.

    Writes the model's class into ``config`` and removes any reference to code. Raises :class:`ModelError` naming the
    first tensor that does not fit.
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
            found[name] = PlannedTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
        if name in found and found[name].shape != shape:
            raise _unfit(model, f"{name} is {found[name].shape}, and {shape} was expected")
        if name not in found:
            raise _unfit(model, f"{name} is missing")
    over = found.keys() - parameters.keys() - dict(model.named_buffers()).keys()
    if over:
        raise _unfit(model, f"there is no place for {min(over)}")
    return found


def _unfit(model: Any, what: str) -> ModelError:
    return ModelError(
        f"the pruned weights do not fit a {type(model).__name__}: {what}; export with --profile hf-hetero or padded"
    )


def _carried(config: Any, cls: type) -> dict[str, Any]:
    """The fields of ``config`` that a configuration of class ``cls`` has too."""
    known = {field.name for field in dataclasses.fields(cls)} - NOT_CARRIED
    return {key: value for key, value in config.to_dict().items() if key in known}


def _changed(dense: Any, changes: dict[str, Any]) -> Any:
    config = copy.deepcopy(dense)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def _of_class(cls: type, dense: Any, changes: dict[str, Any]) -> Any:
    return cls(**{**_carried(dense, cls), **changes})
