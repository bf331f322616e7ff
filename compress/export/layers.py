"""The shapes of a pruned model's layers, as every format needs them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer is made of once it is cut."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    width: int
    """MLP channels."""
    attention_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the MLP's output projection has a bias."""
