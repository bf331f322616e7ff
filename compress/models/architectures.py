"""Model families as data: the names and places of their prunable sites."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from ...registry import Architecture, AttentionUnit, ModelError, Producer, Rows, ShapeAttribute, Site, hookimpl

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

PRUNED = "prunekit_"
"""Prefix of the model types of exported models whose layers have different shapes."""


class AttentionNames(BaseModel):
    """Names inside a decoder layer: separate query, key, value and output projections."""

    model_config = ConfigDict(frozen=True)

    norm: str
    module: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    head_count: str | None = None
    """Attribute of the module that its forward reads as the number of heads, if there is one."""


class MlpNames(BaseModel):
    """Names inside a decoder layer: the layers that compute the intermediate channels and the one that reads them."""

    model_config = ConfigDict(frozen=True)

    norm: str
    entry: str
    producers: tuple[str, ...]
    consumer: str
    activation: str | None = None
    """The activation's name if the MLP is not a module: its first half is ``activation(producer(x))``."""


class PreNormDecoder(Architecture):
    """A decoder whose layers normalize the residual stream before attention and before the MLP."""

    attention: AttentionNames
    mlp: MlpNames

    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        layers = range(sum(1 for _ in model.get_submodule(self.layers).children()))
        return [
            site
            for index in layers
            for site in (self._attention_site(model, index, attention_unit), self._mlp_site(model, index))
            if site is not None
        ]

    def _attention_site(self, model: nn.Module, index: int, unit: AttentionUnit) -> Site | None:
        names, layer = self.attention, f"{self.layers}.{index}"
        module = f"{layer}.{names.module}"
        query, key, value, output = (f"{module}.{n}" for n in (names.query, names.key, names.value, names.output))
        heads, kv_heads = heads_of(model.config, index)
        if not heads:
            return None  # an exported model without this attention
        size = head_size(model.config)
        per_group = heads // kv_heads
        if unit == "kv_group" or per_group == 1:
            units, unit_size = kv_heads, per_group * size
            producers: tuple[Producer, ...] = (
                Producer(query, (Rows(0, unit_size),)),
                Producer(key, (Rows(0, size),)),
                Producer(value, (Rows(0, size),)),
            )
            picks = 0
        else:
            units, unit_size = heads, size
            producers = (Producer(query, (Rows(0, size),)),)
            picks = per_group
        attributes = (ShapeAttribute(module, names.head_count, unit_size // size),) if names.head_count else ()
        return _site(
            model,
            layer=index,
            kind="attention",
            norm=f"{layer}.{names.norm}",
            entry=module,
            producers=producers,
            consumer=output,
            units=units,
            unit_size=unit_size,
            shape_attributes=attributes,
            query_heads_per_kv=picks,
        )

    def _mlp_site(self, model: nn.Module, index: int) -> Site | None:
        names, layer = self.mlp, f"{self.layers}.{index}"
        consumer = f"{layer}.{names.consumer}"
        config: Any = model.config
        if config.model_type.startswith(PRUNED) and not _has(model, consumer):
            return None  # an exported model without this MLP
        return _site(
            model,
            layer=index,
            kind="mlp",
            norm=f"{layer}.{names.norm}",
            entry=f"{layer}.{names.entry}",
            producers=tuple(Producer(f"{layer}.{name}", (Rows(0, 1),)) for name in names.producers),
            consumer=consumer,
            units=_linear(model, consumer).in_features,
            unit_size=1,
            activation=f"{layer}.{names.activation}" if names.activation else None,
        )


def heads_of(config: Any, layer: int) -> tuple[int, int]:
    """Numbers of query and key/value heads of a layer; in a pruned model they can differ between layers."""
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def head_size(config: Any) -> int:
    """Number of channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has(model: nn.Module, path: str) -> bool:
    """Whether the model has a linear layer there."""
    owner, _, name = path.rpartition(".")
    return hasattr(getattr(model.get_submodule(owner), name, None), "in_features")


def _linear(model: nn.Module, path: str) -> Any:
    """A linear layer, of torch or another library: it has ``weight``, ``bias``, ``in_features``, ``out_features``."""
    return model.get_submodule(path)


def _site(model: nn.Module, **fields: Any) -> Site:
    """A site that was checked against the model's shapes, with ``unit_parameters`` and ``outputs`` from them."""
    consumer = _linear(model, fields["consumer"])
    site = Site(**fields, unit_parameters=0, outputs=consumer.out_features)
    if consumer.in_features != site.channels:
        raise ModelError(
            f"{fields['consumer']} reads {consumer.in_features} channels, but {site.units} units of "
            f"{site.unit_size} make {site.channels}; this model needs an architecture adapter of its own"
        )
    per_unit = site.unit_size * site.outputs
    for producer in site.producers:
        linear = _linear(model, producer.path)
        rows = sum(segment.per_unit for segment in producer.segments)
        if rows * site.units != linear.out_features:
            raise ModelError(
                f"{producer.path} makes {linear.out_features} rows, but {site.units} units of {rows} make "
                f"{rows * site.units}; this model needs an architecture adapter of its own"
            )
        per_unit += rows * (linear.in_features + (linear.bias is not None))
    return Site(**fields, unit_parameters=per_unit, outputs=site.outputs)


class Llama(PreNormDecoder):
    """Llama 1, 2, 3.x, Mistral, Qwen2 and Qwen3, also pruned: q/k/v/o and gate/up/down projections."""

    name: Literal["llama"] = "llama"
    model_types: tuple[str, ...] = (*LLAMA_LIKE, *(PRUNED + family for family in LLAMA_LIKE))
    layers: str = "model.layers"
    attention: AttentionNames = AttentionNames(norm="input_layernorm", module="self_attn")
    mlp: MlpNames = MlpNames(
        norm="post_attention_layernorm",
        entry="mlp",
        producers=("mlp.gate_proj", "mlp.up_proj"),
        consumer="mlp.down_proj",
    )


class Opt(PreNormDecoder):
    """OPT: its MLP is not a module, its attention reads a head count. OPT-350m, with post-norm layers, is refused."""

    name: Literal["opt"] = "opt"
    model_types: tuple[str, ...] = ("opt", PRUNED + "opt")
    layers: str = "model.decoder.layers"
    attention: AttentionNames = AttentionNames(
        norm="self_attn_layer_norm", module="self_attn", output="out_proj", head_count="num_heads"
    )
    mlp: MlpNames = MlpNames(
        norm="final_layer_norm", entry="fc1", producers=("fc1",), consumer="fc2", activation="activation_fn"
    )

    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        config: Any = model.config
        if not config.do_layer_norm_before:
            raise ModelError(
                "this OPT has post-norm layers (do_layer_norm_before=False, as OPT-350m): its residual stream is not "
                "the norm's input, by which the probe ranks; use another OPT size"
            )
        return super().sites(model, attention_unit)


@hookimpl
def architectures() -> list[type[Architecture]]:
    return [Llama, Opt]
