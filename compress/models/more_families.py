"""Model families whose layers need more than names and fused linear layers: heads in other tensors than linear weights,
ALiBi, sizes in a shared configuration, ``Conv1D``, caches of layers without keys and values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from ...registry import (
    Architecture,
    AttentionUnit,
    ModelError,
    Producer,
    Rows,
    ShapeAttribute,
    Site,
    SizeFields,
    UnitArgument,
    hookimpl,
)
from .architectures import AttentionNames, Llama, MlpNames, PreNormDecoder, site_of
from .experts import ROUTED
from .families import GATE_UP, GRANITE_EXPERT, INTERLEAVED, expert, family, mlp

LINEAR_ATTENTION = "linear attention"
FEED_FORWARD = {
    "entry": "feed_forward",
    "producers": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "consumer": "feed_forward.down_proj",
}
TWO_LAYERS = mlp("dense_h_to_4h", "dense_4h_to_h")
NORMS_OF_ALL = {"norms_of_all": ("q_norm", "k_norm")}
SINKS = {"by_head": ("sinks",)}
BLOCKS = "transformer.h"


class DiffLlama(Llama):
    """DiffLlama: heads work in pairs, one of the first half with one of the second; a pair is cut as one."""

    name: Literal["diffllama"] = "diffllama"  # type: ignore[assignment]  # another name than the base's
    model_types: tuple[str, ...] = ("diffllama",)
    form: str = "heads in pairs"
    sizes: SizeFields | None = None

    def _attention_site(self, model: nn.Module, index: int, unit: AttentionUnit) -> Site | None:
        site = super()._attention_site(model, index, unit)
        if site is None:
            return None
        if site.query_heads_per_kv:
            raise ModelError(
                "attention_unit: query_head: DiffLlama computes with pairs of query heads, of which several share "
                "two key/value heads; use attention_unit: kv_group"
            )
        pairs = site.units // 2

        def halves(rows: Rows) -> tuple[Rows, ...]:
            return rows, Rows(rows.offset + pairs * rows.per_unit, rows.per_unit)

        return replace(
            site,
            units=pairs,
            unit_size=2 * site.unit_size,
            unit_parameters=2 * site.unit_parameters,
            producers=tuple(Producer(each.path, halves(each.segments[0])) for each in site.producers),
        )


class Falcon(PreNormDecoder):
    """Falcon: 7B with one key/value head, 40B with groups, RW with ALiBi; parallel blocks or not."""

    name: Literal["falcon"] = "falcon"
    model_types: tuple[str, ...] = ("falcon",)
    layers: str = BLOCKS
    form: str = "query, key and value in one layer, in three layouts"
    sizes: SizeFields | None = None
    attention: AttentionNames = AttentionNames(norm="input_layernorm", module="self_attention", output="dense")
    mlp: MlpNames = MlpNames(
        norm="post_attention_layernorm",
        entry="mlp",
        producers=("mlp.dense_h_to_4h",),
        consumer="mlp.dense_4h_to_h",
        parallel_norm="input_layernorm",
    )
    linear_types: tuple[str, ...] = ("FalconLinear",)

    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        if not hasattr(model.get_submodule(f"{self.layers}.0"), "ln_attn"):
            return super().sites(model, attention_unit)
        norms = [("attention", "ln_attn"), ("mlp", "ln_mlp")]
        two = self.model_copy(update={part: getattr(self, part).model_copy(update={"norm": n}) for part, n in norms})
        return super(Falcon, two).sites(model, attention_unit)

    def _attention_site(self, model: nn.Module, index: int, unit: AttentionUnit) -> Site | None:
        names, layer = self.attention, f"{self.layers}.{index}"
        module = f"{layer}.{names.module}"
        attention: Any = model.get_submodule(module)
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
        per_group = heads // kv_heads
        by_query = unit == "query_head" and per_group > 1
        if by_query and attention.new_decoder_architecture:
            raise ModelError(
                "attention_unit: query_head: this Falcon's groups must keep the same number of query heads, whose rows "
                "lie between those of the keys; use attention_unit: kv_group"
            )
        units = heads if by_query else kv_heads
        rows = Rows(0, size if by_query else (per_group + 2) * size)
        shared = Rows(heads * size, 2 * size) if by_query else None
        counts = [("num_heads", heads // units), *([] if by_query else [("num_kv_heads", 1)])]
        return site_of(
            model,
            layer=index,
            kind="attention",
            norm=f"{layer}.{names.norm}",
            entry=module,
            producers=(Producer(f"{module}.query_key_value", (rows,), shared),),
            consumer=f"{module}.{names.output}",
            units=units,
            unit_size=heads // units * size,
            shape_attributes=tuple(ShapeAttribute(module, name, each) for name, each in counts),
            unit_arguments=(UnitArgument("alibi"), UnitArgument("attention_mask")) if attention.config.alibi else (),
            linear_types=self.linear_types,
        )


unwritten = partial(family, sizes=None)
"""A family of which no export writes smaller attentions, MLPs or experts; fewer whole experts it may write."""

TIED = {"kv_heads": None, "head_size": None}

FAMILIES: tuple[type[PreNormDecoder], ...] = (
    # The cache is called layer_past, or its layers are of several kinds.
    family(
        "gpt_neox",
        layers="gpt_neox.layers",
        attention=INTERLEAVED | {"module": "attention"},
        mlp=TWO_LAYERS,
        sizes=TIED,
        form="parallel blocks, query, key and value interleaved in one layer, two-layer MLP",
    ),
    unwritten(
        "gptj",
        layers=BLOCKS,
        attention={"norm": "ln_1", "module": "attn", "output": "out_proj", "head_count": "num_attention_heads"},
        mlp=mlp("fc_in", "fc_out", norm="ln_1"),
        form="parallel blocks, two-layer MLP",
    ),
    unwritten(
        "gpt_neo",
        layers=BLOCKS,
        attention={
            "norm": "ln_1",
            "module": "attn.attention",
            "output": "out_proj",
            "head_count": "num_heads",
            "position_tables": ("bias",),
        },
        mlp=mlp("c_fc", "c_proj", norm="ln_2"),
        form="local attention, two-layer MLP",
    ),
    family(
        "jamba",
        mlp=FEED_FORWARD | {"norm": "pre_ff_layernorm"},
        form="attention in some layers",
        leaves="state-space mixers",
    ),
    family(
        "qwen3_next qwen3_5_moe_text",
        attention={"query_parts": 2},
        other_mlps=expert("mlp.shared_expert"),
        sizes={"width": "shared_expert_intermediate_size"},
        form="attention in some layers, gated; shared expert",
        leaves=LINEAR_ATTENTION,
    ),
    family(
        "qwen3_5_text",
        attention={"query_parts": 2},
        form="attention in some layers, gated",
        leaves=LINEAR_ATTENTION,
    ),
    family(
        "lfm2 lfm2_moe",
        attention={"norm": "operator_norm", "output": "out_proj"},
        mlp={
            "norm": "ffn_norm",
            "entry": "feed_forward",
            "producers": ("feed_forward.w1", "feed_forward.w3"),
            "consumer": "feed_forward.w2",
        },
        form="attention in some layers",
        leaves="short convolutions",
    ),
    # Rotary tables as one complex tensor.
    unwritten(
        "llama4_text",
        mlp=FEED_FORWARD,
        other_mlps=expert("feed_forward.shared_expert"),
        form="shared expert, or a dense MLP",
        leaves=ROUTED,
    ),
    # Sizes of the shared configuration.
    family(
        "phi3",
        attention={
            "query": "qkv_proj",
            "fused": True,
            "head_count": "config.num_attention_heads",
            "kv_head_count": "num_key_value_heads",
        },
        mlp=GATE_UP,
        form="query, key and value in one layer, fused gate_up",
    ),
    # Sinks, and norms over all heads.
    unwritten("gpt_oss", attention=SINKS, mlp=None, form="attention sinks, no dense MLP"),
    unwritten(
        "granitemoe_swa",
        attention=SINKS,
        mlp=None,
        other_mlps=GRANITE_EXPERT,
        form="attention sinks, shared expert",
    ),
    unwritten("granite_swa", attention=SINKS, form="attention sinks"),
    unwritten("olmo2 olmo3", attention={"norm": None, **NORMS_OF_ALL}, mlp={"norm": None}, form="norms over all heads"),
    unwritten(
        "flex_olmo", attention={"norm": None, **NORMS_OF_ALL}, mlp=None, form="norms over all heads, no dense MLP"
    ),
    unwritten("olmoe minimax_m2", attention=NORMS_OF_ALL, mlp=None, form="norms over all heads, no dense MLP"),
    # Conv1D and FalconLinear, ALiBi, heads in pairs.
    unwritten(
        "gpt2",
        layers=BLOCKS,
        attention={
            "norm": "ln_1",
            "module": "attn",
            "query": "c_attn",
            "fused": True,
            "output": "c_proj",
            "width": "split_size",
        },
        mlp=mlp("c_fc", "c_proj", norm="ln_2"),
        form="Conv1D, query, key and value in one layer, two-layer MLP",
    ),
    Falcon,
    unwritten(
        "bloom",
        layers=BLOCKS,
        attention=INTERLEAVED
        | {
            "module": "self_attention",
            "head_count": "num_heads",
            "arguments_by_head": ("alibi",),
            "residual": "residual",
        },
        mlp=TWO_LAYERS | {"residual": "residual"},
        form="ALiBi, query, key and value interleaved in one layer, two-layer MLP",
    ),
    unwritten(
        "mpt",
        layers="transformer.blocks",
        attention={
            "norm": "norm_1",
            "module": "attn",
            "query": "Wqkv",
            "fused": True,
            "output": "out_proj",
            "head_count": "n_heads",
            "arguments_by_head": ("position_bias",),
        },
        mlp={
            "norm": "norm_2",
            "entry": "ffn",
            "producers": ("ffn.up_proj",),
            "consumer": "ffn.down_proj",
            "residual": "residual",
        },
        form="ALiBi, query, key and value in one layer, two-layer MLP",
    ),
    DiffLlama,
)

SHARED_KEYS = (
    "its last layers read keys and values that earlier layers have computed, so that heads cannot be cut layer by layer"
)
REFUSED = {
    "bitnet": "its blocks normalize all channels together before the output projection reads them, so that all must be "
    "computed whatever is cut",
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), SHARED_KEYS),
}
"""Model types that no architecture can serve, and why."""


@hookimpl
def architectures() -> list[type[Architecture]]:
    return list(FAMILIES)
