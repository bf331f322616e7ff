"""Tiny random models with routed experts, and an own computation of what pruning them must give."""

import copy
from functools import cache

import torch
import transformers
from prunekit.registry import Catalog
from torch import nn

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
MLA = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
GROUPED = dict(n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, n_routed_experts=6)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
FAMILIES = {
    "mixtral": dict(num_local_experts=6),
    "qwen2_moe": dict(num_experts=6, shared_expert_intermediate_size=40),
    "qwen3_moe": dict(num_experts=6, norm_topk_prob=True),
    "olmoe": dict(num_experts=6),
    "gpt_oss": dict(num_local_experts=6, layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "deepseek_v3": dict(**GROUPED, **MLA, num_key_value_heads=4),
    "phimoe": dict(num_local_experts=6),
    "granitemoe": dict(num_local_experts=6),
    "jamba": dict(num_experts=6, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0)
    | dict(mamba_d_state=4, mamba_d_conv=2, mamba_expand=1, mamba_dt_rank=4, use_mamba_kernels=False),
    "glm4_moe": dict(**GROUPED),
    "dots1": dict(**GROUPED),
    "hunyuan_v1_moe": dict(num_experts=6, moe_topk=2, moe_intermediate_size=None),
    "mellum": dict(num_experts=6),
    "granitemoeshared": dict(num_local_experts=6, shared_intermediate_size=40),
    "exaone_moe": GROUPED | dict(mlp_layer_types=["dense", "sparse"], num_experts=6, num_shared_experts=1),
    "ernie4_5_moe": dict(moe_num_experts=6, moe_k=2, moe_layer_start_index=1, use_bias=True),
    "solar_open": GROUPED,
    "hy_v3": GROUPED | dict(mlp_layer_types=["dense", "sparse"], num_experts=6, num_shared_experts=1),
    "glm4_moe_lite": GROUPED | MLA | dict(mlp_layer_types=["dense", "sparse"], num_key_value_heads=4),
    "qwen3_next": dict(
        num_experts=6, shared_expert_intermediate_size=40, layer_types=["linear_attention", "full_attention"]
    )
    | LINEAR,
    "qwen3_5_moe_text": dict(
        num_experts=6, shared_expert_intermediate_size=40, layer_types=["linear_attention", "full_attention"]
    )
    | LINEAR,
    "minimax_m2": dict(num_local_experts=6, intermediate_size=24),
    "flex_olmo": dict(num_experts=6),
    "deepseek_v2": dict(**GROUPED, **MLA, num_key_value_heads=4),
    "granitemoe_swa": dict(
        num_local_experts=6,
        shared_intermediate_size=40,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    ),
    "lfm2_moe": dict(num_experts=6, layer_types=["conv", "full_attention"], num_dense_layers=1, use_expert_bias=True),
}
"""Model types, with what their configurations need besides :data:`SIZES`."""


@cache
def catalog():
    """All components."""
    return Catalog.discover()


def is_supported(family):
    return family in transformers.CONFIG_MAPPING


@cache
def built(family, seed=0, **more):
    """A tiny random model of a family; all 1-D tensors are random, too. Never prune it without ``remove()``."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **dict(more)})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name or "dt_" in name:
                continue
            scale = 0.25 if parameter.dim() > 1 else 0.3
            parameter.normal_(0, scale)
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.normal_(0, 0.2)
    return model.requires_grad_(False)


def experts_of(model):
    """By layer: the module with the 3-D tensors."""
    found = {}
    for layer, module in enumerate(model.model.layers):
        holders = [m for m in module.modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter)]
        if holders:
            found[layer] = holders[0]
    return found


def columns(experts, number):
    """What reads the channels of an expert, (D, I); writing to it writes to the model."""
    down = experts.down_proj[number]
    return down.t() if getattr(experts, "is_transposed", False) else down


def zeroed(model, kept, sites):
    """A copy of the dense model whose consumers read none of the dropped channels; ``kept`` by (layer, kind)."""
    copied = copy.deepcopy(model)
    for site in sites:
        if site.expert is None:
            weight = copied.get_submodule(site.consumer).weight
        else:
            weight = columns(experts_of(copied)[site.layer], site.expert)
        dropped = sorted(set(range(site.units)) - set(kept[site.layer, site.kind]))
        size = weight.shape[1] // site.units
        with torch.no_grad():
            weight.view_as(weight).unflatten(1, (site.units, size))[:, dropped] = 0
    return copied


def batches(count=3, rows=4, length=12, seed=1, padded=True):
    """Calibration batches; the last row is padded on the left."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 64, (rows, length), generator=random)
        mask = torch.ones_like(ids)
        if padded:
            mask[-1, : length // 2] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def logits(model, batch):
    """Of the real tokens, (n, V)."""
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
