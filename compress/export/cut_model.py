"""The tensors and the layer shapes of a model that is cut once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import Producer, Site, SiteKind, SizeFields, SpecError
from ...registry.sites import owned_norms
from ...registry.tensors.devices import weights_present
from ...registry.tensors.linears import is_transposed, sizes_of
from ..engine.open_cut import OpenCut
from ..engine.site_cut import SiteCut
from ..models.architectures import FIELDS, heads_of, layer_config
from ..models.language import text_config
from ..pruning.pruned import Pruned
from .expert_tensors import Place, cut_experts, planned_shapes
from .weights import PlannedTensor, Tensors, dense_tensors, written


@dataclass(frozen=True)
class LayerShape:
    """The shape of a decoder layer."""

    heads: int | None
    """Query heads; 0: no attention; None: an attention or another mixer that is not a site."""
    kv_heads: int | None
    """Key/value heads."""
    width: int | None
    """MLP channels; 0: no MLP; None: an MLP or experts that are not a site."""
    attention_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the MLP's output projection has a bias."""
    experts: int | None = None
    """Routed experts; None: it has none, or their number is not what is cut."""
    expert_width: int | None = None
    """Channels of each routed expert; None: it has none, or they are not what is cut."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and MLP channels."""
        return self.heads or 0, self.kv_heads or 0, self.width or 0

    @property
    def gone(self) -> bool:
        """Whether nothing of the layer is left."""
        return self.heads == 0 == self.width


def sliced_tensors(pruned: Pruned) -> Tensors:
    """The weights of the smaller model; every tensor is cut when it is written."""
    return _tensors(pruned, _sliced, lambda count, whole: count)


def padded_tensors(pruned: Pruned) -> Tensors:
    """The weights in their original shapes, with zeros for the dropped units."""
    return _tensors(pruned, _zero_filled, lambda count, whole: whole)


def layer_shapes(pruned: Pruned, tensors: Tensors, fields: SizeFields = FIELDS) -> list[LayerShape]:
    """The shape of every layer, skipped layers included.

    Raises :class:`SpecError` if the key/value heads keep different numbers of query heads, which no format can hold.
    """
    kept = pruned.sites_kept
    for site in pruned.all_sites:
        if site.query_heads_per_kv:
            _check_even(site, kept[site.layer, "attention"])
    counts = {place: len(units) for place, units in kept.items()}
    config = text_config(pruned.model)
    return shapes_of(config, pruned.all_sites, counts, lambda site: f"{site.consumer}.bias" in tensors, fields)


def shapes_of(
    config: Any,
    sites: Sequence[Site],
    counts: Mapping[tuple[int, SiteKind], int],
    has_bias: Callable[[Site], bool],
    fields: SizeFields = FIELDS,
) -> list[LayerShape]:
    """The shape of every layer, from the kept units of its sites and from the biases of their consumers.

    ``config`` is that of the language model, with the shapes before the cut in ``fields``.
    """
    by_place = {(site.layer, site.kind): site for site in sites}
    shapes = []
    for layer in range(config.num_hidden_layers):
        attention, mlp = by_place.get((layer, "attention")), by_place.get((layer, "mlp"))
        biases = (site is not None and has_bias(site) for site in (attention, mlp))
        heads = _heads_left(attention, counts, *heads_of(config, layer, fields))
        width = _width_left(mlp, counts, layer_config(config, layer), fields)
        attention_bias, mlp_bias = biases
        shapes.append(LayerShape(*heads, width, attention_bias, mlp_bias, *_experts_left(sites, counts, layer)))
    return shapes


def _experts_left(
    sites: Sequence[Site], counts: Mapping[tuple[int, SiteKind], int], layer: int
) -> tuple[int | None, int | None]:
    """Routed experts of a layer, and channels of each; None: not what is cut."""
    left = {site.kind: counts[layer, site.kind] for site in sites if site.layer == layer and site.routed}
    if len(set(left.values())) > 1:
        low, high = min(left.values()), max(left.values())
        raise SpecError(
            f"layer {layer}: its experts keep {low} to {high} channels, and no checkpoint has a place for experts of "
            "different sizes; nearest: --set prune.allocator=uniform, or --profile padded or dynamic keeps this cut"
        )
    return left.get("experts"), next((count for kind, count in left.items() if kind != "experts"), None)


def _heads_left(
    site: Site | None, counts: Mapping[tuple[int, SiteKind], int], heads: int, kv_heads: int
) -> tuple[int | None, int | None]:
    """Query and key/value heads of a layer that had ``heads`` and ``kv_heads``."""
    if site is None:
        return (None, None) if heads else (0, 0)
    count = counts[site.layer, "attention"]
    if not count or site.query_heads_per_kv:
        return count, kv_heads if count else 0
    return count * (heads // kv_heads), count


def _width_left(
    site: Site | None, counts: Mapping[tuple[int, SiteKind], int], config: Any, fields: SizeFields
) -> int | None:
    """MLP channels of a layer of this configuration."""
    if site is not None:
        return counts[site.layer, "mlp"]
    return 0 if getattr(config, fields.width, None) == 0 else None


def without_layers(tensors: Tensors, sites: Sequence[Site], layers: Sequence[LayerShape]) -> Tensors:
    """``tensors`` under the names that they have where the layers that are gone do not count."""
    stack = sites[0].consumer.partition(f".{sites[0].layer}.")[0]
    left = [number for number, layer in enumerate(layers) if not layer.gone]
    moved = {f"{stack}.{number}.": f"{stack}.{place}." for place, number in enumerate(left)}

    def name_of(name: str) -> str:
        number = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
        before = f"{stack}.{number}."
        return moved[before] + name.removeprefix(before) if number else name

    return {name_of(name): tensor for name, tensor in tensors.items()}


def uneven_heads(layer: int, kv_heads: int, left: str) -> SpecError:
    """The error for a cut that leaves different numbers of query heads to the key/value heads."""
    return SpecError(
        f"layer {layer}: query heads are cut, and {left} of them are left for the {kv_heads} key/value heads; only "
        "equal numbers have a place in a checkpoint. Nearest: --set prune.attention_unit=kv_group cuts whole groups; "
        "--profile padded or dynamic keeps this cut"
    )


def constant_left(site: Site) -> SpecError:
    """The error for a block that is gone and leaves its compensated mean."""
    return SpecError(
        f"{site.label} keeps nothing, and its compensated mean is a constant that no smaller model can hold; nearest: "
        "--profile padded, or --set prune.compensate=none"
    )


def _check_even(site: Site, kept: Sequence[int]) -> None:
    kv_heads = site.units // site.query_heads_per_kv
    per_group = [0] * kv_heads
    for unit in kept:
        per_group[unit // site.query_heads_per_kv] += 1
    if len(set(per_group)) > 1:
        left = ", ".join(map(str, per_group)) if kv_heads <= 8 else f"{min(per_group)} to {max(per_group)}"
        raise uneven_heads(site.layer, kv_heads, left)


def _tensors(pruned: Pruned, place: Place, length: Callable[[int, int], int]) -> Tensors:
    if pruned.strategy.dynamic:
        raise SpecError(f"strategy {pruned.strategy.name} decides per batch; freeze it before its weights are read")
    found = dense_tensors(pruned.model)
    for cut in pruned.cuts:
        if cut.whole:
            continue
        opened = cut.open_cut
        if opened is None:
            raise SpecError(
                "the model runs unpruned here; read its weights before remove(), and outside of dense() and suspended()"
            )
        if cut.site.routed:
            continue
        if not len(opened.kept) and place is _sliced:
            _leave_out(found, cut)
            continue
        for linear, producer in cut.binding.producers:
            rows = length(len(opened.rows[linear]), linear.out_features)
            shapes = {"weight": _stored(linear, (rows, linear.in_features)), "bias": (rows,)}
            for which, name in enumerate(("weight", "bias")[: 1 + (linear.bias is not None)]):
                make = partial(_producer, opened, linear, producer, place, which)
                found[f"{producer.path}.{name}"] = PlannedTensor(shapes[name], getattr(linear, name).dtype, make)
        linear, path = cut.binding.consumer, cut.site.consumer
        dtype = linear.weight.dtype
        shape = (linear.out_features, length(len(opened.columns), linear.in_features))
        make = partial(_consumer_weight, opened, linear, place)
        found[f"{path}.weight"] = PlannedTensor(_stored(linear, shape), dtype, make)
        if linear.bias is not None or cut.compensation.wanted:
            found[f"{path}.bias"] = PlannedTensor(shape[:1], dtype, partial(_consumer_bias, opened, linear))
        if place is _sliced:
            check_shapes(cut.site)
    cut_experts(found, pruned.model, pruned.cuts, place, place is _sliced)
    return found


def cut_shapes(
    model: nn.Module,
    sites: Sequence[Site],
    counts: Mapping[tuple[int, SiteKind], int],
    has_bias: Callable[[Site], bool],
) -> Tensors:
    """The tensors of the smaller model, without values: what :func:`sliced_tensors` will give for these counts."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes |= {name: tuple(shapes_of_buffer) for name, shapes_of_buffer in _persistent(model)}
    shapes |= planned_shapes(model, sites, counts)
    norms = owned_norms(sites)
    for site in sites:
        if site.routed:
            continue
        count = counts[site.layer, site.kind]
        if not count:
            for name in _block(shapes, site, site.norm in norms):
                del shapes[name]
            continue
        for producer in site.producers:
            rows, linear = len(producer.rows(torch.arange(count))), model.get_submodule(producer.path)
            shapes[f"{producer.path}.weight"] = _stored(linear, (rows, sizes_of(linear)[1]))
            if f"{producer.path}.bias" in shapes:
                shapes[f"{producer.path}.bias"] = (rows,)
        consumer = model.get_submodule(site.consumer)
        shapes[f"{site.consumer}.weight"] = _stored(consumer, (site.outputs, count * site.unit_size))
        if has_bias(site):
            shapes[f"{site.consumer}.bias"] = (site.outputs,)
    dtype = torch.float32
    return {name: PlannedTensor(shape, dtype, partial(torch.empty, shape)) for name, shape in shapes.items()}


def _persistent(model: nn.Module) -> Iterable[tuple[str, torch.Size]]:
    """Names and shapes of the buffers that are in the state dict."""
    state = model.state_dict().keys()
    return ((name, buffer.shape) for name, buffer in model.named_buffers() if name in state)


def check_shapes(site: Site) -> None:
    """Raise :class:`SpecError` for an attention whose other tensors no checkpoint holds in a smaller shape."""
    what = [*(f"{each.path}.{each.name}" for each in site.unit_tensors), *(each.path for each in site.selected)]
    if what:
        raise SpecError(
            f"{site.label}: {what[0]} belongs to all heads, and no checkpoint here has a place for an attention "
            "without some of them; nearest: --profile padded, or --profile dynamic"
        )


def _stored(linear: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape that a weight (O, I) is stored in."""
    return shape[::-1] if is_transposed(linear) else shape


def _leave_out(found: Tensors, cut: SiteCut) -> None:
    """Remove the tensors of a block that is not there; raises :class:`SpecError` for one that leaves a constant."""
    if cut.compensation.wanted:
        raise constant_left(cut.site)
    for name in _block(found, cut.site, cut.binding.own_norm):
        del found[name]


def _block(names: Iterable[str], site: Site, with_norm: bool) -> list[str]:
    """The tensors among ``names`` that go with a block."""
    paths = [site.entry, site.consumer, *(producer.path for producer in site.producers)]
    paths += [site.norm] if with_norm and site.norm else []
    return [name for name in names if name.startswith(tuple(f"{path}." for path in paths))]


def _producer(cut: OpenCut, linear: nn.Linear, producer: Producer, place: Place, which: int) -> Tensor:
    """A producer's weight (0) or bias (1)."""
    with torch.no_grad(), weights_present(linear):
        made = cut.producer(linear, producer)[which]
        assert made is not None  # a bias is planned only for a layer that has one
        placed = place(made, cut.rows[linear], linear.out_features)
        return written(placed.T if is_transposed(linear) and not which else placed)


def _consumer_weight(cut: OpenCut, linear: nn.Linear, place: Place) -> Tensor:
    with torch.no_grad(), weights_present(linear):
        weight, _ = cut.consumer()
        placed = place(weight.T, cut.columns, linear.in_features)
        return written(placed if is_transposed(linear) else placed.T)


def _consumer_bias(cut: OpenCut, linear: nn.Linear) -> Tensor:
    with torch.no_grad(), weights_present(linear):
        _, bias = cut.consumer()
        return written(torch.zeros_like(linear.bias) if bias is None else bias)  # None: the site keeps nothing


def _sliced(made: Tensor, kept: Tensor, whole: int) -> Tensor:
    """The kept rows alone, also if the applier has left the others as zeros."""
    return made if len(made) == len(kept) else made.index_select(0, kept)


def _zero_filled(made: Tensor, kept: Tensor, whole: int) -> Tensor:
    """The kept rows at their places among rows of zeros."""
    made = _sliced(made, kept, whole)
    return made.new_zeros(whole, *made.shape[1:]).index_copy_(0, kept, made)
