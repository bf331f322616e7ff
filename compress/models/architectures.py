"""Where the prunable sites of a decoder are, by the names in its layers; more families are in :mod:`.families`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

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
    UnitArgument,
    UnitTensor,
    hookimpl,
)
from ...registry.tensors.linears import is_linear, sizes_of
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
    width: str | None = None
    """Attribute of the module that its forward reads as the number of the queries' rows."""
    fused: bool = False
    """Whether the layer of ``query`` makes all rows of the queries, then all of the keys, then all of the values."""
    norms_of_all: tuple[str, str] | None = None
    """The norms of the queries and of the keys, if each reads all heads together: heads are cut after them."""
    by_head: tuple[str, ...] = ()
    """Tensors and module lists with an entry for each query head, where the model has them: sinks, norms per head."""
    by_kv_head: tuple[str, ...] = ()
    """The same for key/value heads."""
    arguments_by_head: tuple[str, ...] = ()
    """Arguments with an entry for each query head, such as ALiBi."""
    position_tables: tuple[str, ...] = ()
    """Buffers that say what each position may attend to, if not only the mask says it."""
    residual: str | None = None
    """Argument that the attention adds to its output, if it adds the residual stream itself."""


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
    residual: str | None = None
    """Argument that the MLP adds to its output, if it adds the residual stream itself."""


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
    linear_types: tuple[str, ...] = ()
    """Names of subclasses of ``nn.Linear`` that compute what it computes, if the layers have one."""

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
        if names.key is None and not names.fused:
            kv_heads = heads
        per_group, size = heads // kv_heads, sizes_of(model.get_submodule(f"{module}.{names.output}"))[1] // heads
        query = names.query
        if names.latent_query is not None and _has(model, f"{module}.{names.latent_query}"):
            query = names.latent_query
        whole_groups = unit == "kv_group" or per_group == 1
        units = kv_heads if whole_groups else heads
        made = [(query, names.query_parts * heads * size), (names.key, kv_heads * size), (names.value, kv_heads * size)]
        producers: list[Producer] = []
        if names.fused:
            queries, keys = heads * size, kv_heads * size
            cut = tuple(Rows(queries + part * keys, size) for part in range(2 if whole_groups else 0))
            shared = None if whole_groups else Rows(queries, 2 * keys)
            producers.append(Producer(f"{module}.{query}", (Rows(0, queries // units), *cut), shared))
        for name, rows in () if names.fused else made[: None if whole_groups else 1]:
            if name is not None:
                path = f"{module}.{name}"
                rows = rows if names.query_parts else sizes_of(model.get_submodule(path))[0]
                producers.append(Producer(path, (Rows(0, rows // units),)))
        selected: tuple[Producer, ...] = ()
        if names.norms_of_all:
            norms = [f"{module}.{name}" for name in names.norms_of_all]
            before = {f"{module}.{names.query}": norms[0], f"{module}.{names.key}": norms[1]}
            selected = tuple(replace(each, path=before[each.path]) for each in producers if each.path in before)
            producers = [each for each in producers if each.path not in before]
        sizes = [
            (names.head_count, heads // units),
            (names.kv_head_count if whole_groups else None, 1),
            (names.width, heads // units * size),
        ]
        tensors = [
            *(unit_tensor(module, name, heads // units) for name in names.by_head),
            *(unit_tensor(module, name, 1) for name in names.by_kv_head if whole_groups),
        ]
        known = {*names.by_head, *names.by_kv_head, *(f"{name}.weight" for name in names.norms_of_all or ())}
        latent = not names.query_parts
        check_by_head(model.get_submodule(module), module, heads, kv_heads, size, latent, known)
        return site_of(
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
            selected=selected,
            unit_tensors=tuple(tensor for tensor in tensors if hasattr(_owner(model, tensor), tensor.name)),
            unit_arguments=tuple(UnitArgument(name, heads // units) for name in names.arguments_by_head),
            position_tables=names.position_tables,
            residual=names.residual,
            linear_types=self.linear_types,
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
        width = sizes_of(model.get_submodule(consumer))[1]
        segments = tuple(Rows(part * width, 1) for part in range(1 + names.fused))
        return site_of(
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
            residual=names.residual,
            linear_types=self.linear_types,
        )


def unit_tensor(module: str, name: str, per_unit: int) -> UnitTensor:
    """The tensor or module list ``name`` of an attention, with so many entries for each unit."""
    owner, _, last = f"{module}.{name}".rpartition(".")
    return UnitTensor(owner, last, Rows(0, per_unit))


def _owner(model: nn.Module, tensor: UnitTensor) -> nn.Module | None:
    """The module that has a tensor; None where this model has none."""
    try:
        return model.get_submodule(tensor.path)
    except AttributeError:
        return None


def check_by_head(
    attention: nn.Module, path: str, heads: int, kv_heads: int, size: int, latent: bool, known: Collection[str] = ()
) -> None:
    """Raise :class:`ModelError` for weights that belong to heads and are in no linear layer: norms of each head, sinks.

    A cut of heads would leave them as they are, unless they are ``known``: names inside the attention.
    """
    by_head = {heads, kv_heads} | (set() if latent else {heads * size, kv_heads * size})
    by_head -= {1, size}
    for name, module in attention.named_modules():
        if is_linear(module):
            continue
        found = [own for own, tensor in module.named_parameters(recurse=False) if by_head & {*tensor.shape}]
        if isinstance(module, nn.ModuleList) and len(module) in by_head:
            found.append("")
        found = [own for own in found if f"{name}.{own}".strip(".") not in known]
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
        return is_linear(model.get_submodule(path))
    except AttributeError:
        return False


def site_of(model: nn.Module, **fields: Any) -> Site:
    """A site that was checked against the model's shapes, with ``unit_parameters`` and ``outputs`` from them."""
    outputs, channels = sizes_of(model.get_submodule(fields["consumer"]))
    site = Site(**fields, unit_parameters=0, outputs=outputs)
    if channels != site.channels:
        raise ModelError(
            f"{fields['consumer']} reads {channels} channels, but {site.units} units of "
            f"{site.unit_size} make {site.channels}; this model needs an architecture adapter of its own"
        )
    per_unit = site.unit_size * site.outputs
    for producer in site.producers:
        linear: Any = model.get_submodule(producer.path)
        made, inputs = sizes_of(linear)
        rows = sum(segment.per_unit for segment in producer.segments)
        shared = producer.shared.per_unit if producer.shared else 0
        if rows * site.units + shared != made:
            raise ModelError(
                f"{producer.path} makes {made} rows, but {site.units} units of {rows} make "
                f"{rows * site.units + shared}; this model needs an architecture adapter of its own"
            )
        per_unit += rows * (inputs + (linear.bias is not None))
    per_unit += sum(parameters_of(model, tensor) for tensor in site.unit_tensors) // site.units
    return Site(**fields, unit_parameters=per_unit, outputs=site.outputs)


def parameters_of(model: nn.Module, tensor: UnitTensor) -> int:
    """Number of parameters of a tensor with entries of units, or of a module list."""
    found = getattr(model.get_submodule(tensor.path), tensor.name)
    return found.numel() if isinstance(found, Tensor) else sum(p.numel() for p in found.parameters())


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
    form: str = "two-layer MLP, not a module"
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
