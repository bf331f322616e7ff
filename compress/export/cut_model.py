"""What a model that is cut once computes with: its kept units, its layers' shapes, its weights one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import ModelError, Producer, Site, SpecError
from ...registry.tensors.devices import stored_tensor, weights_present
from ..engine.site_cut import SiteCut
from ..models.architectures import heads_of
from ..pruning.pruned import Pruned
from .layers import LayerShape
from .tensors import PlannedTensor, Tensors

Place = Callable[[Tensor, Tensor, int], Tensor]
"""Puts what is kept (rows or columns, with their indices, along a dimension) where a format wants it."""


def sliced_tensors(pruned: Pruned) -> Tensors:
    """The weights of the smaller model; every tensor is cut only when it is made."""
    return _tensors(pruned, _sliced, lambda count, whole: count)


def padded_tensors(pruned: Pruned) -> Tensors:
    """The weights in the original shapes, what was dropped being zero."""
    return _tensors(pruned, _zero_filled, lambda count, whole: whole)


def dense_tensors(model: nn.Module) -> Tensors:
    """A model's parameters and persistent buffers as they are, tied ones once."""
    names = {name for name, _ in model.named_parameters()}  # shared ones are named once
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    found: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name in tied or (name in parameters and name not in names):
            continue
        found[name] = PlannedTensor(tuple(tensor.shape), tensor.dtype, _reader(model, name, tensor))
    return found


def layer_shapes(pruned: Pruned, tensors: Tensors) -> list[LayerShape]:
    """Every layer's shape, skipped layers included.

    Raises :class:`SpecError` where query heads are left unevenly over the key/value heads: no format has a place for
    that.
    """
    config, kept = pruned.model.config, pruned.sites_kept
    for site in pruned.all_sites:
        if site.query_heads_per_kv:
            _check_even(config, site, kept[site.layer, "attention"])
    counts = {place: len(units) for place, units in kept.items()}
    return shapes_of(config, pruned.all_sites, counts, lambda site: f"{site.consumer}.bias" in tensors)


def shapes_of(
    config: Any, sites: Sequence[Site], counts: Mapping[tuple[int, str], int], has_bias: Callable[[Site], bool]
) -> list[LayerShape]:
    """The shapes of layers that keep so many units, and whose consumers have a bias or not."""
    by_place, shapes = {(site.layer, site.kind): site for site in sites}, []
    for layer in sorted({layer for layer, _ in by_place}):
        attention, mlp = by_place[layer, "attention"], by_place[layer, "mlp"]
        heads, kv_heads = heads_of(config, layer)
        count = max(1, counts[layer, "attention"])
        if attention.query_heads_per_kv:
            heads = count
        else:
            heads, kv_heads = count * (heads // kv_heads), count
        width = max(1, counts[layer, "mlp"])
        shapes.append(LayerShape(heads, kv_heads, width, has_bias(attention), has_bias(mlp)))
    return shapes


def uneven_heads(layer: int, kv_heads: int, left: str) -> SpecError:
    """The error for query heads that are left unevenly over key/value heads."""
    return SpecError(
        f"layer {layer}: query heads are cut, and {left} of them are left for the {kv_heads} key/value heads; only "
        "equal numbers have a place in a checkpoint. Nearest: --set prune.attention_unit=kv_group cuts whole groups; "
        "--profile padded or dynamic keeps this cut"
    )


def _check_even(config: Any, site: Site, kept: Sequence[int]) -> None:
    kv_heads = heads_of(config, site.layer)[1]
    per_group = [0] * kv_heads
    for unit in kept:
        per_group[unit // site.query_heads_per_kv] += 1
    if len(set(per_group)) > 1 or not kept:
        left = ", ".join(map(str, per_group)) if kv_heads <= 8 else f"{min(per_group)} to {max(per_group)}"
        raise uneven_heads(site.layer, kv_heads, left)


def _tensors(pruned: Pruned, place: Place, length: Callable[[int, int], int]) -> Tensors:
    if pruned.strategy.dynamic:
        raise SpecError(f"strategy {pruned.strategy.name} decides per batch; freeze it before its weights are read")
    found = dense_tensors(pruned.model)
    for cut in pruned.cuts:
        if cut.whole:
            continue
        for linear, producer in cut.producers:
            rows = length(len(cut.weights.rows(producer.segments)), linear.out_features)
            name = f"{producer.path}.weight"
            found[name] = PlannedTensor(
                (rows, linear.in_features), linear.weight.dtype, _part(cut, linear, producer, place, 0)
            )
            if linear.bias is not None:
                found[f"{producer.path}.bias"] = PlannedTensor(
                    (rows,), linear.bias.dtype, _part(cut, linear, producer, place, 1)
                )
        linear, path = cut.consumer, cut.site.consumer
        columns = length(len(cut.weights.columns), linear.in_features)
        shape = (linear.out_features, columns)
        found[f"{path}.weight"] = PlannedTensor(shape, linear.weight.dtype, _consumer(cut, place, 0))
        if linear.bias is not None or cut.compensation.wanted:
            found[f"{path}.bias"] = PlannedTensor((linear.out_features,), linear.weight.dtype, _consumer(cut, place, 1))
    return found


def _part(cut: SiteCut, linear: nn.Linear, producer: Producer, place: Place, which: int) -> Callable[[], Tensor]:
    """Makes a producer's weight (0) or bias (1)."""

    def make() -> Tensor:
        with torch.no_grad(), weights_present(linear):
            made, rows = cut.weights.producer(linear, producer)[which], cut.weights.rows(producer.segments)
            return _settled(place(made, rows, linear.out_features))

    return make


def _consumer(cut: SiteCut, place: Place, which: int) -> Callable[[], Tensor]:
    """Makes the consumer's weight (0) or bias (1)."""

    def make() -> Tensor:
        linear = cut.consumer
        with torch.no_grad(), weights_present(linear):
            made = cut.consumer_weights(linear)[which]
            if which == 0:
                made = place(made.T, cut.weights.columns, linear.in_features).T
            return _settled(made)

    return make


def _sliced(made: Tensor, kept: Tensor, whole: int) -> Tensor:
    """What is kept alone, where the applier has left zeros in between."""
    return made if len(made) == len(kept) else made.index_select(0, kept)


def _zero_filled(made: Tensor, kept: Tensor, whole: int) -> Tensor:
    """What is kept at its place among zeros."""
    made = _sliced(made, kept, whole)
    return made.new_zeros(whole, *made.shape[1:]).index_copy_(0, kept, made)


def _reader(model: nn.Module, name: str, tensor: Tensor) -> Callable[[], Tensor]:
    def make() -> Tensor:
        values = stored_tensor(model, name) if tensor.device.type == "meta" else tensor
        if values is None:
            raise ModelError(f"{name} has no values to export; load the model with from_pretrained")
        return _settled(values)

    return make


def _settled(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
