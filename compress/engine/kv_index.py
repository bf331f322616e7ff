"""Attention for query heads that were cut unevenly while all key/value heads stay."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...registry import ModelError

KV_INDEX = "prunekit_kv_index"
"""Attribute of an attention module: the key/value head of every query head that is left, (k,) int64, or (B, k)."""

PREFIX = "prunekit_"


def _indexed(base: str) -> Callable:
    """``base`` attention that repeats key/value heads by index where the module carries one."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        compute = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
        index = getattr(module, KV_INDEX, None)
        if index is None:
            return compute(module, query, key, value, attention_mask, **kwargs)
        if index.dim() == 2:
            row = torch.arange(len(index), device=index.device)[:, None]
            key, value = key[row, index], value[row, index]
        else:
            key, value = key.index_select(1, index), value.index_select(1, index)
        groups, module.num_key_value_groups = module.num_key_value_groups, 1
        try:
            return compute(module, query, key, value, attention_mask, **kwargs)
        finally:
            module.num_key_value_groups = groups

    return attention


def enable_kv_index(model: Any) -> None:
    """Switch a transformers model to an attention that uses :data:`KV_INDEX`, unless it has one already.

    It computes by the implementation that the user has set last. Raises :class:`ModelError` for any other than eager
    and sdpa.
    """
    base: str = model.config._attn_implementation
    if base.startswith(PREFIX):
        return
    if base not in ("eager", "sdpa"):
        raise ModelError(
            f"attention_unit: query_head needs attention eager or sdpa under grouped-query attention, this model has "
            f"{base!r}; load it with attn_implementation='sdpa', or call model.set_attn_implementation('sdpa'), or use "
            "attention_unit: kv_group"
        )
    name = PREFIX + base
    ALL_ATTENTION_FUNCTIONS.register(name, _indexed(base))
    # A name without a mask function of its own gets no mask at all, silently.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)


def disable_kv_index(model: Any) -> None:
    """Switch the model back to the implementation that the user has set last."""
    name: str = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))
