"""Configurations of exported models: of a stock class, of one with a shape for every layer, of the original class."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...registry import ModelError, SiteKind, SpecError
from ...registry.tensors.tokens import context_of
from ..models.architectures import head_size
from ..models.exported import classes
from ..models.language import auto_class
from ..pruning.pruned import Pruned
from .cut_model import LayerShape
from .family import Family
from .weights import PlannedTensor, Tensors

WITHOUT_WINDOW = ("llama", "mistral", "qwen2")
"""Families that compute the same function if no sliding window is in force; their classes allow different shapes."""


SIZES = {
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "width": "channels",
    "experts": "experts",
    "expert_width": "channels of each expert",
}
"""The sizes of a :class:`LayerShape`, as messages name them."""


def window_in_force(config: Any) -> bool:
    """Whether attention is limited to a sliding window that is shorter than the model's context."""
    window, used = getattr(config, "sliding_window", None), getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    inside = window is not None and 0 < window < (context_of(config) or 0)
    return used and inside and "sliding_attention" in kinds


def shortened(config: Any, layers: Sequence[LayerShape]) -> tuple[Any, list[LayerShape]]:
    """The configuration and the shapes without the layers of which nothing is left.

    Raises :class:`SpecError` where no layer is left.
    """
    left = [number for number, layer in enumerate(layers) if not layer.gone]
    if not left:
        raise SpecError("nothing is left of any layer, and no model has none; lower the ratio")
    if len(left) == len(layers):
        return config, list(layers)
    config = copy.deepcopy(classes.homogeneous(config))
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[number] for number in left]
    text.num_hidden_layers = len(left)
    return config, [layers[number] for number in left]


def lacking(layers: Sequence[LayerShape]) -> str | None:
    """The first layer without attention or MLP, such as "layer 3 has no MLP"; None: every layer has both."""
    for index, layer in enumerate(layers):
        if 0 in (layer.heads, layer.width):
            return f"layer {index} has no {'attention' if layer.heads == 0 else 'MLP'}"
    return None


def check_whole(profile: str, layers: Sequence[LayerShape]) -> None:
    """Raise :class:`SpecError` for a layer of which a part is left, in a format without empty blocks."""
    if found := lacking(layers):
        raise SpecError(
            f"profile {profile}: {found} left, and this format needs both in every layer; whole layers may go "
            "(strategies shortgpt and sleb). Nearest: --profile hf-hetero"
        )


# Profile hf-uniform


def uniform_config(dense: Any, layers: Sequence[LayerShape], family: Family) -> Any:
    """The configuration of a stock class for layers of one shape, that of ``dense`` or of another family.

    Raises :class:`SpecError` or :class:`ModelError` naming the nearest profile.
    """
    check_whole("hf-uniform", layers)
    layer, dense = _uniform_layer(layers, family), classes.homogeneous(dense)
    return stock_config(dense, layer, len(layers)) if is_ruled(family) else own_config(dense, layer, family)


def is_ruled(family: Family) -> bool:
    """Whether hf-uniform may write the family as another one, by rules of servers that know it well."""
    return family.kind in (*WITHOUT_WINDOW, "qwen3", "opt")


def own_config(dense: Any, layer: LayerShape, family: Family) -> Any:
    """The configuration of the family's own class, with the sizes of ``layer`` and flags for the biases that it has.

    Raises :class:`SpecError` where the class refuses them.
    """
    text, sizes = dense.get_text_config(), family.sizes
    heads, nearest = getattr(text, sizes.heads), family.nearest("hf-uniform")
    if sizes.head_size is None and layer.heads not in (None, heads):
        raise SpecError(_tied_heads(type(dense).__name__, layer.heads, heads, text.num_hidden_layers, nearest))
    family.check_biases("hf-uniform", _biased(layer, family))
    try:
        return _sized(dense, layer, family)
    except Exception as error:  # every class has rules of its own
        name, allowed = type(dense).__name__, _head_counts(dense, layer, family)
        if allowed:
            raise SpecError(
                f"profile hf-uniform: {name} allows {', '.join(map(str, allowed))} of {heads} query heads with this "
                f"hidden size, and {layer.heads} were to be kept; {nearest}; or {_mlps_alone(text.num_hidden_layers)}"
            ) from error
        raise SpecError(
            f"profile hf-uniform: {name} refuses {_shape(layer)} ({' '.join(str(error).split())[:200]}); {nearest}"
        ) from error


def _head_counts(dense: Any, layer: LayerShape, family: Family) -> list[int]:
    """The numbers of query heads that the class allows, with as many of them to each key/value head."""
    if not layer.heads or not layer.kv_heads:
        return []
    heads, group, allowed = getattr(dense.get_text_config(), family.sizes.heads), layer.heads // layer.kv_heads, []
    for count in range(group, heads + 1, group):
        try:
            _sized(dense, replace(layer, heads=count, kv_heads=count // group), family)
        except Exception:  # as in own_config
            continue
        allowed.append(count)
    return allowed


def _sized(dense: Any, layer: LayerShape, family: Family) -> Any:
    """A configuration with the sizes of ``layer``; raises what the class raises for sizes that it refuses."""
    config, sizes = copy.deepcopy(dense), family.sizes
    text = config.get_text_config()
    if layer.heads is not None:
        setattr(text, sizes.heads, layer.heads)
        if sizes.kv_heads is not None and hasattr(text, sizes.kv_heads):
            setattr(text, sizes.kv_heads, layer.kv_heads)
        if sizes.head_size is not None:
            setattr(text, sizes.head_size, head_size(dense.get_text_config(), sizes))
    if layer.width is not None:
        setattr(text, sizes.width, layer.width)
    if family.expert_field is not None:
        setattr(text, family.expert_field, layer.experts or layer.expert_width)
    for kind in _biased(layer, family):
        setattr(text, f"{kind}_bias", True)
    return type(config).from_dict(config.to_dict())


def _biased(layer: LayerShape, family: Family) -> list[SiteKind]:
    """The blocks with biases that the stock model lacks."""
    biases: dict[SiteKind, bool] = {"attention": layer.attention_bias, "mlp": layer.mlp_bias}
    return [kind for kind, has in biases.items() if has and not family.has_bias(kind)]


def stock_config(dense: Any, layer: LayerShape, layers: int) -> Any:
    """The configuration of a stock class for ``layers`` layers of one shape, of families that servers know well.

    It is the family's own class if that class, and the servers that load it, allow the shape. Otherwise it is Llama for
    head counts that divide the hidden size, Mistral for other head counts, and Granite, with multipliers of 1, for
    other head counts with biases. Raises :class:`SpecError` naming the nearest profile.
    """
    import transformers

    family = dense.model_type
    if family == "opt":
        if layer.heads != dense.num_attention_heads:
            nearest = "nearest: --profile hf-hetero"
            raise SpecError(_tied_heads("OPTConfig", layer.heads, dense.num_attention_heads, layers, nearest))
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


def _uniform_layer(layers: Sequence[LayerShape], family: Family) -> LayerShape:
    """The shape of all layers; raises :class:`SpecError` naming the first layer that differs.

    Layers without a site of a kind have any shape there.
    """
    known = {name: [size for layer in layers if (size := getattr(layer, name)) is not None] for name in SIZES}
    first = {name: sizes[0] if sizes else None for name, sizes in known.items()}
    biases = any(layer.attention_bias for layer in layers), any(layer.mlp_bias for layer in layers)
    whole = replace(layers[0], **first, attention_bias=biases[0], mlp_bias=biases[1])
    for index, layer in enumerate(layers):
        if any(getattr(layer, name) not in (None, size) for name, size in first.items()):
            raise SpecError(
                f"profile hf-uniform: layer {index} keeps {_shape(layer)}, layer 0 {_shape(whole)}; a stock class has "
                f"one shape for all layers. {family.nearest('hf-uniform').capitalize()}; or prune all layers alike: no "
                "skip_layers, and allocator: {name: uniform, rounding: down}"
            )
    return whole


def _shape(layer: LayerShape) -> str:
    return ", ".join(f"{size} {what}" for name, what in SIZES.items() if (size := getattr(layer, name)) is not None)


def _tied_heads(name: str, kept: int | None, heads: int, layers: int, nearest: str) -> str:
    return (
        f"profile hf-uniform: {kept} of {heads} heads were to be kept, but {name} ties heads to the hidden size; "
        f"{nearest}; or {_mlps_alone(layers)}"
    )


def _mlps_alone(layers: int) -> str:
    whole = "[" + ", ".join(["0"] * layers) + "]"
    return (
        f"cut MLPs alone, by --set prune.ratio=null --set 'prune.allocator={{name: explicit, attention: {whole}, "
        "mlp: [0.4, ...]}' with a share for every layer"
    )


# Profile hf-hetero


def hetero_config(dense: Any, layers: Sequence[LayerShape], family: Family) -> Any:
    """A configuration with a shape for every layer; raises :class:`ModelError` for a family without such a class."""
    model = classes.class_of(family.kind)
    classes.register(family.kind)
    cls, sizes = model.config_class, family.sizes
    values = classes.carried(dense, cls)
    overrides: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        mine: dict[str, Any] = {}
        if layer.heads is not None:
            mine[sizes.heads] = layer.heads
            if sizes.kv_heads in values:
                mine[sizes.kv_heads] = layer.kv_heads
        if layer.width is not None:
            mine[sizes.width] = layer.width
        # Biases that the whole family has need no flag.
        if layer.attention_bias and not family.has_bias("attention"):
            mine["attention_output_bias"] = True
        if layer.mlp_bias and not family.has_bias("mlp"):
            mine["mlp_output_bias"] = True
        overrides[index] = mine
    if sizes.head_size is not None:
        values[sizes.head_size] = head_size(dense, sizes)
    if model not in classes.model_classes():
        values["pruned_blocks"] = family.blocks
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


def padded_config(pruned: Pruned, tensors: Tensors, family: Family) -> Any:
    """The original configuration, with the biases that compensation has added.

    Raises :class:`SpecError` for a class without a place for them.
    """
    config: Any = copy.deepcopy(pruned.model.config)
    text = config.get_text_config()
    added = tensors.keys() - pruned.model.state_dict().keys()
    biased = [site.kind for site in pruned.sites if f"{site.consumer}.bias" in added]
    family.check_biases("padded", biased)
    for kind in biased:
        setattr(text, f"{kind}_bias", True)
    return config


# All profiles


def fitted(config: Any, tensors: Tensors, nearest: str) -> Tensors:
    """``tensors`` with zeros for the further biases of a model of ``config``; all others must match.

    Writes the model's class into ``config`` and removes any reference to code. Raises :class:`ModelError` naming the
    first tensor that does not fit, and ``nearest``, what to do instead.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
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
            raise _unfit(model, f"{name} is {found[name].shape}, and {shape} was expected", nearest)
        if name not in found:
            raise _unfit(model, f"{name} is missing", nearest)
    over = found.keys() - parameters.keys() - dict(model.named_buffers()).keys()
    if over:
        raise _unfit(model, f"there is no place for {min(over)}", nearest)
    return found


def _unfit(model: Any, what: str, nearest: str) -> ModelError:
    return ModelError(f"the pruned weights do not fit a {type(model).__name__}: {what}; {nearest}")


def _changed(dense: Any, changes: dict[str, Any]) -> Any:
    config = copy.deepcopy(dense)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def _of_class(cls: type, dense: Any, changes: dict[str, Any]) -> Any:
    return cls(**{**classes.carried(dense, cls), **changes})
