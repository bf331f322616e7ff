"""Every served model type, by tiny random models: what is cut equals an independent zeroing (tests/family_checks.py).

A new line of the table of families brings its own test. Where the general recipe does not build a tiny model of a type,
``CONFIGS`` says what differs.
"""

import pytest
import torch
import transformers
from prunekit.compress.models.architectures import PRUNED
from prunekit.registry import Catalog

from tests.family_checks import check_family, cover

RECIPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    attention_bias=True, mlp_bias=True,
)  # fmt: skip
"""A tiny model of most types."""

CATALOG = Catalog.discover(block="")
ARCHITECTURES = [entry.component() for entry in CATALOG.of_role("architectures")]
TYPES = [kind for each in ARCHITECTURES for kind in each.model_types if not kind.startswith(PRUNED)]

WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
MLA = dict(
    q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, num_key_value_heads=8,
    head_dim=None,
)  # fmt: skip
MOE = dict(
    num_experts=4, n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
    topk_group=1, n_shared_experts=1, num_shared_experts=1,
)  # fmt: skip
FIRST_DENSE = MOE | dict(first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"])
GRANITE = dict(residual_multiplier=0.6, attention_multiplier=0.3, embedding_multiplier=2.0)

CONFIGS: dict[str, dict] = {
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, num_key_value_heads=None),
    "mistral": dict(sliding_window=4),
    "qwen3": WINDOW | dict(use_sliding_window=True),
    "ministral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "vaultgemma": WINDOW,
    "cohere2": WINDOW,
    "cwm": WINDOW,
    "exaone4": WINDOW,
    "granite": GRANITE,
    "hyperclovax": GRANITE,
    "smollm3": dict(no_rope_layers=[1, 0]),
    "helium": dict(head_dim=4),
    "phi": dict(qk_layernorm=True, head_dim=4),
    "stablelm": dict(use_qkv_bias=True),
    "starcoder2": dict(use_bias=True, residual_dropout=0.0, embedding_dropout=0.0),
    "persimmon": dict(num_key_value_heads=None, head_dim=None),
    "youtu": MLA,
    "minicpm3": MLA,
    "mixtral": MOE,
    "phimoe": MOE,
    "granitemoe": MOE | GRANITE,
    "granitemoeshared": MOE | GRANITE | dict(shared_intermediate_size=24),
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    "qwen3_moe": MOE | dict(mlp_only_layers=[0]),
    "mellum": FIRST_DENSE | WINDOW,
    "hunyuan_v1_moe": MOE | dict(moe_topk=2),
    "dots1": FIRST_DENSE,
    "glm4_moe": FIRST_DENSE | dict(use_qk_norm=True),
    "exaone_moe": FIRST_DENSE | WINDOW,
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1, use_bias=True),
    "solar_open": MOE,
    "hy_v3": FIRST_DENSE,
    "deepseek_v3": FIRST_DENSE | MLA,
    "glm4_moe_lite": FIRST_DENSE | MLA,
}
"""What a tiny model of a type needs besides the recipe; None leaves a value of the recipe out."""


def tiny(kind: str, **changes):
    """A tiny random model of a type."""
    options = {**RECIPE, **CONFIGS.get(kind, {}), **changes}
    config = transformers.AutoConfig.for_model(
        kind, **{key: value for key, value in options.items() if value is not None}
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", TYPES)
def test_family(kind):
    """12 of the 48 combinations of strategy, unit, attention and padding; four types together run all of them."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    check_family(tiny(kind), cover(TYPES.index(kind)), CATALOG)
