"""Where the routed experts of model families are: names inside a decoder layer, by model type."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ...registry import ExpertUnit, Site, expert_sites

ROUTED = "routed experts"
"""What a family or a strategy that does not cut them leaves whole."""


class ExpertNames(NamedTuple):
    """Names inside a decoder layer. A layer without these experts has a dense MLP."""

    block: str = "mlp"
    """The block that calls router and experts."""
    router: str = "gate"
    """The router, in the block."""
    norm: str | None = "post_attention_layernorm"
    """The norm whose input is the residual stream, before the block; None: the block reads that stream itself."""
    experts: str = "experts"
    """The module with the 3-D tensors, in the block."""


LIKE_MIXTRAL = (
    "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text olmoe mellum hunyuan_v1_moe ernie4_5_moe deepseek_v2 "
    "deepseek_v3 glm4_moe glm4_moe_lite dots1 exaone_moe solar_open hy_v3 minimax_m2"
)
GRANITE = ExpertNames(block="block_sparse_moe", router="router")

EXPERTS: dict[str, ExpertNames] = {
    **dict.fromkeys(LIKE_MIXTRAL.split(), ExpertNames()),
    **dict.fromkeys(("gpt_oss", "phimoe"), ExpertNames(router="router")),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa"), GRANITE),
    "flex_olmo": ExpertNames(norm=None),
    "jamba": ExpertNames(block="feed_forward", router="router", norm="pre_ff_layernorm"),
    "lfm2_moe": ExpertNames(block="feed_forward", norm="ffn_norm"),
}
"""Families whose experts can be cut, each by the names of its layers."""


def sites_of_experts(model: Any, layers: str, unit: ExpertUnit, kind: str) -> list[Site]:
    """The sites of a model's routed experts, layer by layer; none for a model type that is not in :data:`EXPERTS`.

    Raises :class:`~prunekit.registry.ModelError` for experts that cannot be cut.
    """
    names = EXPERTS.get(kind)
    if names is None or unit == "keep":
        return []
    stack: Any = model.get_submodule(layers)
    return [
        site
        for index, layer in enumerate(stack)
        if _has_experts(layer, names)
        for site in _of_layer(model, f"{layers}.{index}", index, names, unit)
    ]


def _of_layer(model: Any, path: str, index: int, names: ExpertNames, unit: ExpertUnit) -> list[Site]:
    block, norm = f"{path}.{names.block}", f"{path}.{names.norm}" if names.norm else None
    return expert_sites(model, index, norm, f"{block}.{names.experts}", f"{block}.{names.router}", unit)


def _has_experts(layer: nn.Module, names: ExpertNames) -> bool:
    return hasattr(getattr(layer, names.block, None), names.experts)
