"""The profile hf-uniform: a stock transformers class that has room for the pruned shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ...registry import ModelError, SpecError
from ..models.architectures import head_size
from ..models.exported.classes import family_of
from .configs import carried, window_in_force
from .hetero import homogeneous
from .layers import LayerShape

WITHOUT_WINDOW = ("llama", "mistral", "qwen2")
"""Families that compute the same thing where no sliding window is in force; their classes differ in what may vary."""


def uniform_layer(layers: Sequence[LayerShape]) -> LayerShape:
    """The shape that all layers have; raises :class:`SpecError` naming the first that differs."""
    first = layers[0]
    for index, layer in enumerate(layers):
        if (layer.heads, layer.kv_heads, layer.width) != (first.heads, first.kv_heads, first.width):
            raise SpecError(
                f"profile hf-uniform: layer {index} keeps {_shape(layer)}, layer 0 {_shape(first)}; a stock class has "
                "one shape for all layers. Nearest: --profile hf-hetero, or prune all layers alike "
                "(--set prune.skip_layers=[])"
            )
    biases = any(layer.attention_bias for layer in layers), any(layer.mlp_bias for layer in layers)
    return LayerShape(first.heads, first.kv_heads, first.width, *biases)


def stock_config(dense: Any, layers: Sequence[LayerShape]) -> Any:
    """The configuration of a stock class for layers that are all alike.

    The family's own class where it, and what serves it, has room. Llama takes head counts that divide the hidden size,
    Mistral any others, Granite (with multipliers that change nothing) biases beside such head counts. Raises
    :class:`SpecError` or :class:`ModelError` naming the nearest profile that can.
    """
    import transformers

    layer, family, dense = uniform_layer(layers), family_of(dense), homogeneous(dense)
    if family == "opt":
        if layer.heads != dense.num_attention_heads:
            raise SpecError(opt_heads(layer.heads, dense.num_attention_heads, len(layers)))
        return _same(dense, {"ffn_dim": layer.width})
    sizes = {
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "intermediate_size": layer.width,
        "head_dim": head_size(dense),
    }
    given = layer.attention_bias or layer.mlp_bias
    if family == "qwen3":
        if layer.mlp_bias or (layer.attention_bias and not getattr(dense, "attention_bias", False)):
            # transformers' Qwen3 has room for one in attention, but vLLM's drops it without a word.
            raise SpecError(
                "profile hf-uniform: Qwen3 has no place for the biases that this compensation gives; nearest: "
                "--profile hf-hetero, or --set prune.compensate=none"
            )
        return _same(dense, sizes)
    if family not in WITHOUT_WINDOW:
        raise ModelError(
            f"profile hf-uniform: model type {family!r} is not known to have a stock class for pruned shapes; nearest: "
            "--profile padded, or --profile dynamic"
        )
    # vLLM's Qwen2 takes no head size but the hidden size by the number of heads.
    whole_heads = layer.heads == dense.num_attention_heads
    if not given and (family == "mistral" or (family == "qwen2" and whole_heads)):
        return _same(dense, sizes)
    if family == "llama" and not given and dense.hidden_size % layer.heads == 0:
        return _same(dense, sizes)
    if window_in_force(dense):
        raise SpecError(
            f"profile hf-uniform: {family} with a sliding window has no other class, and these "
            f"{'biases' if given else 'head counts'} need one; nearest: --profile hf-hetero, or --profile padded"
        )
    # Qwen2 has biases on queries, keys and values; the output's is zero where there was none.
    own = {
        "attention_bias": layer.attention_bias or family == "qwen2" or getattr(dense, "attention_bias", False),
        "mlp_bias": layer.mlp_bias or getattr(dense, "mlp_bias", False),
    }
    if dense.hidden_size % layer.heads == 0:
        return _other(dense, transformers.LlamaConfig, {**sizes, **own})
    if not (own["attention_bias"] or own["mlp_bias"]):
        return _other(dense, transformers.MistralConfig, {**sizes, "sliding_window": None})
    neutral = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": head_size(dense) ** -0.5,
    }
    return _other(dense, transformers.GraniteConfig, {**sizes, **own, **neutral})


def opt_heads(kept: int, heads: int, layers: int) -> str:
    """Why OPT's heads cannot be cut in a stock class, and what can be had instead."""
    whole = "[" + ", ".join(["0"] * layers) + "]"
    return (
        f"profile hf-uniform: {kept} of OPT's {heads} heads were to be kept, but its stock class ties heads to the "
        "hidden size. Nearest: --profile hf-hetero; or cut the MLP alone, by --set prune.ratio=null --set "
        f"'prune.allocator={{name: explicit, attention: {whole}, mlp: [0.4, ...]}}' with a share for every layer"
    )


def _same(dense: Any, changes: dict[str, Any]) -> Any:
    config = copy.deepcopy(dense)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def _other(dense: Any, cls: type, changes: dict[str, Any]) -> Any:
    return cls(**{**carried(dense, cls), **changes})


def _shape(layer: LayerShape) -> str:
    return f"{layer.heads} query heads, {layer.kv_heads} key/value heads and {layer.width} channels"
