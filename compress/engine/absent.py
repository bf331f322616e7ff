"""Blocks that are not computed: their sites keep nothing, so they add nothing, or a constant, to the residual stream.

A key/value cache counts the tokens of an attention that is not computed, and holds nothing else of it: transformers
reads positions and masks from the first layer of the cache. Letters: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .copying import Hook

Replaced = tuple[nn.Module, Any, Any]
"""A module, the forward that was put on it, and the one that it had on itself before, or None."""


def replace(module: nn.Module, function: Any, *first: Any) -> Replaced:
    """Have ``module`` call ``function``, with these first arguments, instead of its forward."""
    own, ours = vars(module).get("forward"), Hook(function, *first)
    vars(module)["forward"] = ours
    return module, ours, own


def restore(replaced: Replaced) -> None:
    """Undo :func:`replace`, unless something else has set the forward since then."""
    module, ours, own = replaced
    if vars(module).get("forward") is ours:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def unchanged(x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
    """What the norm before an absent block returns: its input."""
    return x


class TokenCount(DynamicLayer):
    """A layer of a key/value cache that knows how many tokens it has, and has neither keys nor values of them."""

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


def count_tokens(cache: Any, layer: int, states: Tensor) -> None:
    """Add the tokens of states (B, T, D) to a layer of the cache whose attention is not computed."""
    layers = cache.layers
    while len(layers) <= layer:
        layers.append(cache.layer_class_to_replicate())
    here = layers[layer]
    if isinstance(here, DynamicLayer) and not (here.is_sliding or isinstance(here, TokenCount)):
        here = layers[layer] = TokenCount()  # layers of other kinds count their tokens without keys
    heads, size = (1, 0) if here.keys is None else here.keys.shape[1::2]
    nothing = states.new_zeros(len(states), heads, states.shape[1], size)
    here.update(nothing, nothing)
