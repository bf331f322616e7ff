"""Where the prunable sites of a decoder are, by the names in its layers; more families are in :mod:`.families`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from ...registry import (
    Architecture,
    AttentionUnit,
    ExpertUnit,
    ModelError,
    Producer,
    Rows,
    ShapeAttribute,
    Site,
    SizeFields,
    hookimpl,
)
from .experts import EXPERTS, sites_of_experts

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

PRUNED = "prunekit_"
"""Prefix of the model types of exported models whose layers have different shapes."""


class AttentionNames(BaseModel):
    """Names inside a decoder layer: query, key, value and output projections, separate or in one layer."""

    model_config = ConfigDict(frozen=True)

    norm: str | None
    """None: the attention reads the residual stream itself, which is normalized after it."""
    module: str
    query: str = "q_proj"
    key: str | None = "k_proj"
    """None: the layers of ``query`` and ``value`` make the keys, too, head by head."""
    value: str | None = "v_proj"
    """None: the layer of ``query`` makes the values, too, head by head."""
    output: str = "o_proj"
    query_parts: int = 1
    """How many vectors of the head size the layer of ``query`` makes for each head, one after the other: 3 where it
    makes query, key and value. 0: the number of its rows says it, as in latent attention (MLA), where heads of queries
    and values have other sizes."""
    latent_query: str | None = None
    """The layer that is used instead of ``query`` where the model has it: it makes queries of a latent (MLA)."""
    head_count: str | None = None
    """Attribute of the module that its forward reads as the number of heads, if there is one."""
    kv_head_count: str | None = None
    """The same for key/value heads."""


class MlpNames(BaseModel):
    """Names inside a decoder layer: the layers that compute the intermediate channels and the one that reads them."""

    model_config = ConfigDict(frozen=True)

    norm: str | None
    """None: the MLP reads the residual stream itself, which is normalized after it."""
    entry: str
    producers: tuple[str, ...]
    consumer: str
    activation: str | None = None
    """The activation's name if the MLP is not a module: its first half is ``activation(producer(x))``."""
    fused: bool = False
    """Whether one layer makes gate and up: all rows of the gate, then all of up."""
    parallel_norm: str | None = None
    """The norm that is read where the layer has no ``norm``: in parallel blocks that of the attention."""
    beside_experts: bool = False
    """Whether it is a shared expert, and routed experts read the same norm."""


class PreNormDecoder(Architecture):
    """A decoder whose layers contain an attention and an MLP, each under the same names in every layer.

    A layer may lack one of them where it has routed experts, or where :attr:`leaves` says what it has instead.
    """

    attention: AttentionNames
    mlp: MlpNames | None
    """None: no layer has an MLP that can be cut."""
    sizes: SizeFields | None = SizeFields()
    other_mlps: tuple[MlpNames, ...] = ()
    """Other forms of the MLP; a layer has the first that is there."""

    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        layers = range(sum(1 for _ in model.get_submodule(self.layers).children()))
        return [
            site
            for index in layers
            for site in (self._attention_site(model, index, attention_unit), self._mlp_site(model, index))
            if site is not None
        ]

    def expert_sites(self, model: nn.Module, unit: ExpertUnit) -> list[Site]:
        config: Any = model.config
        kind = config.get_text_config().model_type.removeprefix(PRUNED)
        return sites_of_experts(model, self.layers, unit, kind if kind in EXPERTS else self.name)

    @property
    def has_experts(self) -> bool:
        """Whether some layers have routed experts."""
        return not EXPERTS.keys().isdisjoint((self.name, *self.model_types))

    @property
    def _has_others(self) -> bool:
        """Whether a layer may lack an attention or an MLP."""
        return bool(self.leaves) or self.has_experts

    def _attention_site(self, model: nn.Module, index: int, unit: AttentionUnit) -> Site | None:
        names, layer = self.attention, f"{self.layers}.{index}"
        module = f"{layer}.{names.module}"
        heads, kv_heads = heads_of(model.config, index)
        if not heads or (self._has_others and not _has(model, f"{module}.{names.output}")):
            return None  # an exported model without this attention, or a mixer of another kind
        if names.key is None:
            kv_heads = heads
        per_group, size = heads // kv_heads, _linear(model, f"{module}.{names.output}").in_features // heads
        query = names.query
        if names.latent_query is not None and _has(model, f"{module}.{names.latent_query}"):
            query = names.latent_query
        whole_groups = unit == "kv_group" or per_group == 1
        units = kv_heads if whole_groups else heads
        made = [(query, names.query_parts * heads * size), (names.key, kv_heads * size), (names.value, kv_heads * size)]
        producers = []
        for name, rows in made[: None if whole_groups else 1]:
            if name is not None:
                path = f"{module}.{name}"
                rows = rows if names.query_parts else _linear(model, path).out_features
                producers.append(Producer(path, (Rows(0, rows // units),)))
        sizes = [(names.head_count, heads // units), (names.kv_head_count if whole_groups else None, 1)]
        check_by_head(model.get_submodule(module), module, heads, kv_heads, size, latent=not names.query_parts)
        return _site(
            model,
            layer=index,
            kind="attention",
            norm=f"{layer}.{names.norm}" if names.norm else None,
            entry=module,
            producers=tuple(producers),
            consumer=f"{module}.{names.output}",
            units=units,
            unit_size=heads // units * size,
            shape_attributes=tuple(ShapeAttribute(module, name, each) for name, each in sizes if name),
            query_heads_per_kv=0 if whole_groups else per_group,
        )

    def _mlp_site(self, model: nn.Module, index: int) -> Site | None:
        layer = f"{self.layers}.{index}"
        forms = [*([self.mlp] if self.mlp else []), *self.other_mlps]
        names = next((form for form in forms if _has(model, f"{layer}.{form.consumer}")), None)
        config: Any = model.config
        if names is None:
            if not forms or self._has_others or config.model_type.startswith(PRUNED):
                return None  # experts alone, or an exported model without this MLP
            names = forms[0]
        consumer, norm = f"{layer}.{names.consumer}", names.norm
        if norm is not None and names.parallel_norm and getattr(model.get_submodule(layer), norm, None) is None:
            norm = names.parallel_norm
        width = _linear(model, consumer).in_features
        segments = tuple(Rows(part * width, 1) for part in range(1 + names.fused))
        return _site(
            model,
            layer=index,
            kind="mlp",
            norm=f"{layer}.{norm}" if norm else None,
            entry=f"{layer}.{names.entry}",
            producers=tuple(Producer(f"{layer}.{name}", segments) for name in names.producers),
            consumer=consumer,
            units=width,
            unit_size=1,
            activation=f"{layer}.{names.activation}" if names.activation else None,
            norm_serves_others=names.beside_experts,
        )


def check_by_head(attention: nn.Module, path: str, heads: int, kv_heads: int, size: int, latent: bool) -> None:
    """Raise :class:`ModelError` for weights that belong to heads and are in no linear layer: norms of each head, sinks.

    A cut of heads would leave them as they are.
    """
    by_head = {heads, kv_heads} | (set() if latent else {heads * size, kv_heads * size})
    by_head -= {1, size}
    for name, module in attention.named_modules():
        if hasattr(module, "in_features"):
            continue
        found = [own for own, tensor in module.named_parameters(recurse=False) if by_head & {*tensor.shape}]
        if isinstance(module, nn.ModuleList) and len(module) in by_head:
            found.append("")
        if found:
            raise ModelError(
                f"{'.'.join(part for part in (path, name, found[0]) if part)} has an entry for each head, which no cut "
                "of heads changes here; this model needs an architecture adapter of its own"
            )


def layer_config(config: Any, layer: int) -> Any:
    """The configuration of a layer; in a pruned model layers can have their own."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


FIELDS = SizeFields()


def heads_of(config: Any, layer: int, fields: SizeFields = FIELDS) -> tuple[int, int]:
    """Numbers of query and key/value heads of a layer."""
    config = layer_config(config, layer)
    heads = getattr(config, fields.heads)
    return heads, (getattr(config, fields.kv_heads, None) if fields.kv_heads else None) or heads


def head_size(config: Any, fields: SizeFields = FIELDS) -> int:
    """Number of channels of one attention head."""
    stated = getattr(config, fields.head_size, None) if fields.head_size else None
    return stated or config.hidden_size // getattr(config, fields.heads)


def _has(model: nn.Module, path: str) -> bool:
    """Whether the model has a linear layer there."""
    try:
        return hasattr(model.get_submodule(path), "in_features")
    except AttributeError:
        return False


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
    sizes: SizeFields | None = SizeFields(kv_heads=None, width="ffn_dim", head_size=None)
    attention: AttentionNames = AttentionNames(
        norm="self_attn_layer_norm", module="self_attn", output="out_proj", head_count="num_heads"
    )
    mlp: MlpNames = MlpNames(
        norm="final_layer_norm", entry="fc1", producers=("fc1",), consumer="fc2", activation="activation_fn"
    )

    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        config: Any = model.config
        if not getattr(config, "do_layer_norm_before", True):
            raise ModelError(
                "this OPT has post-norm layers (do_layer_norm_before=False, as OPT-350m): its residual stream is not "
                "the norm's input, by which the probe ranks; use another OPT size"
            )
        return super().sites(model, attention_unit)


@hookimpl
def architectures() -> list[type[Architecture]]:
    return [Llama, Opt]
