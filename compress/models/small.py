"""Small random models of a type, on which an architecture is checked."""

from __future__ import annotations

from typing import Any

import torch

RECIPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    attention_bias=True, mlp_bias=True,
)  # fmt: skip
"""The configuration of a small model of most types."""

KV_HEADS = "num_key_value_heads"
"""A field that a type may lack; its models must not get one."""


def small_model(kind: str, **changes: Any) -> Any:
    """A small random model of a type; ``changes`` of its configuration, where None leaves a value of the recipe out.

    It has run once. Raises what transformers raises where the recipe does not fit the type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
    if not hasattr(AutoConfig.for_model(kind), KV_HEADS):
        options.pop(KV_HEADS, None)
    config = AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    return model
