"""The forward passes that time and memory are measured on: a prefill, and decode steps after one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import SpecError
from ..registry.tensors.tokens import context_length
from .inputs import clamped

SETTLE = 8
"""Tokens of the short pass that lets a model get over a change between pruned and dense."""


def prompt_length(evaluator: str, model: Any, length: int, steps: int) -> int:
    """Tokens of the prefill: ``length``, or the model's context where that is shorter.

    Raises :class:`SpecError`, naming ``evaluator``, where ``steps`` more positions do not fit in the context.
    """
    context, prompt = context_length(model), clamped(length, model)
    if context is not None and steps and prompt + steps > context:
        room = context - steps
        remedy = f"set length to {room} or less, or decode_steps: 0" if room > 0 else "lower decode_steps"
        raise SpecError(
            f"{evaluator}.decode_steps: a prefill of {prompt} tokens and {steps} steps after it take {prompt + steps} "
            f"positions, more than the model's context of {context}; {remedy}"
        )
    return prompt


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of ids (B, T), at every position and without a cache."""
    return model(input_ids=ids, use_cache=False).logits


def settle(model: Any, ids: Tensor) -> None:
    """A short pass on the beginning of ids (B, T): a cut that is made once is gathered, and its compensation
    folded in, in it."""
    prefill(model, ids[:1, :SETTLE])


@torch.no_grad()
def cached_prefill(model: Any, ids: Tensor) -> Any:
    """The key/value cache after ids (B, T); raises :class:`SpecError` for a model that keeps none."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if cache is None:
        raise SpecError(f"{type(model).__name__} keeps no key/value cache, so there are no decode steps; set them to 0")
    return cache


@torch.no_grad()
def decode_step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits (B, 1, V) of one more token for every row, ids (B, 1); ``cache`` grows by it."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits
