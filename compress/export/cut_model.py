"""The tensors and the layer shapes of a model that is cut once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import Producer, Site, SiteKind, SpecError
from ...registry.tensors.devices import weights_present
from ...registry.tensors.linears import is_transposed
from ..engine.open_cut import OpenCut
from ..engine.site_cut import SiteCut
from ..models.architectures import heads_of
from ..pruning.pruned import Pruned
from .weights import PlannedTensor, Tensors, dense_tensors, written


@dataclass(frozen=True)
class LayerShape:
    """The shape of a decoder layer."""

    heads: int
    """Query heads; 0: no attention."""
    kv_heads: int
    """Key/value heads."""
    width: int
    """MLP channels; 0: no MLP."""
    attention_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the MLP's output projection has a bias."""

    @property
    def gone(self) -> bool:
        """Whether nothing of the layer is left."""
        return not (self.heads or self.width)


Place = Callable[[Tensor, Tensor, int], Tensor]
"""Arranges kept rows (k, ...), with their indices (k,), in a tensor of the written shape; the integer is the number of
rows before the cut."""


def sliced_tensors(pruned: Pruned) -> Tensors:
    """The weights of the smaller model; every tensor is cut when it is written."""
    return _tensors(pruned, _sliced, lambda count, whole: count)


def padded_tensors(pruned: Pruned) -> Tensors:
    """The weights in their original shapes, with zeros for the dropped units."""
    return _tensors(pruned, _zero_filled, lambda count, whole: whole)


def layer_shapes(pruned: Pruned, tensors: Tensors) -> list[LayerShape]:
    """The shape of every layer, skipped layers included.

    Raises :class:`SpecError` if the key/value heads keep different numbers of query heads, which no format can hold.
    """
    config, kept = pruned.model.config, pruned.sites_kept
    for site in pruned.all_sites:
        if site.query_heads_per_kv:
            _check_even(config, site, kept[site.layer, "attention"])
    counts = {place: len(units) for place, units in kept.items()}
    return shapes_of(config, pruned.all_sites, counts, lambda site: f"{site.consumer}.bias" in tensors)


def shapes_of(
    config: Any, sites: Sequence[Site], counts: Mapping[tuple[int, SiteKind], int], has_bias: Callable[[Site], bool]
) -> list[LayerShape]:
    """The shape of every layer, from the kept units of its sites and from the biases of their consumers."""
    by_place = {(site.layer, site.kind): site for site in sites}
    shapes = []
    for layer in range(1 + max(layer for layer, _ in by_place)):
        attention, mlp = by_place.get((layer, "attention")), by_place.get((layer, "mlp"))
        heads = kv_heads = 0
        count, width = (counts.get((layer, kind), 0) for kind in ("attention", "mlp"))
        if attention is not None and count:
            heads, kv_heads = heads_of(config, layer)
            if attention.query_heads_per_kv:
                heads = count
            else:
                heads, kv_heads = count * (heads // kv_heads), count
        biases = (site is not None and has_bias(site) for site in (attention, mlp))
        shapes.append(LayerShape(heads, kv_heads, width, *biases))
    return shapes


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


def _check_even(config: Any, site: Site, kept: Sequence[int]) -> None:
    kv_heads = heads_of(config, site.layer)[1]
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
        if place is _sliced and (cut.site.selected or cut.site.unit_tensors):
            raise not_of_a_smaller_shape(cut.site)
    return found


def not_of_a_smaller_shape(site: Site) -> SpecError:
    """The error for an attention whose other tensors no checkpoint holds in a smaller shape."""
    what = [f"{each.path}.{each.name}" for each in site.unit_tensors] or [each.path for each in site.selected]
    return SpecError(
        f"{site.label}: {what[0]} belongs to all heads, and no checkpoint here has a place for an attention without "
        "some of them; nearest: --profile padded, or --profile dynamic"
    )


def _stored(linear: nn.Linear, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape that a weight (O, I) is stored in."""
    return shape[::-1] if is_transposed(linear) else shape


def _leave_out(found: Tensors, cut: SiteCut) -> None:
    """Remove the tensors of a block that is not there; raises :class:`SpecError` for one that leaves a constant."""
    site = cut.site
    if cut.compensation.wanted:
        raise constant_left(site)
    norm = (f"{site.norm}.",) if cut.binding.own_norm else ()
    block = (*norm, f"{site.entry}.", f"{site.consumer}.", *(f"{producer.path}." for producer in site.producers))
    for name in [name for name in found if name.startswith(block)]:
        del found[name]


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
