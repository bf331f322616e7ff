"""The tensors of routed experts in a smaller model: whole experts are gone, or channels of all experts alike.

E experts, D hidden size, I channels of one expert; k kept experts, or channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import Site, SiteKind, SpecError
from ...registry.tensors.experts import DOWN, ExpertLinear, count_of, linear_at, tensors_by_expert, up_of
from ..engine.site_cut import SiteCut
from .weights import PlannedTensor, Tensors, written

Shapes = dict[str, tuple[int, ...]]
Place = Callable[[Tensor, Tensor, int], Tensor]
"""Arranges kept rows (k, ...), with their indices (k,), in a tensor of the written shape; the integer is the number of
rows before the cut."""


def layers_of_experts(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """The sites of routed experts, together where they are of one layer."""
    routed = (site for site in sites if site.routed)
    return (list(group) for _, group in groupby(routed, lambda site: site.entry))


def check_biases(model: nn.Module, sites: Iterable[Site], counts: Mapping[tuple[int, SiteKind], int]) -> None:
    """Raise :class:`SpecError` where compensation would give experts biases that they lack."""
    for site in sites:
        if site.expert is not None and counts[site.layer, site.kind] < site.units:
            _check_bias(site, linear_at(model, site.consumer))


def _check_bias(site: Site, consumer: nn.Linear) -> None:
    if consumer.bias is None:
        raise SpecError(
            f"{site.label}: compensation gives it a bias, and these experts have no place for one; nearest: --set "
            "prune.compensate=none, or --profile dynamic"
        )


def planned_shapes(model: nn.Module, sites: Iterable[Site], counts: Mapping[tuple[int, SiteKind], int]) -> Shapes:
    """The shapes of the experts' and routers' tensors, by name; every expert of a layer keeps as many channels."""
    found: Shapes = {}
    for group in layers_of_experts(sites):
        first = group[0]
        count = counts[first.layer, first.kind]
        if first.expert is None:
            for name, (tensor, dim) in _by_expert(model, first).items():
                found[name] = (*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])
        else:
            rows = len(first.producers[0].rows(torch.arange(count)))
            found |= _channel_shapes(model.get_submodule(first.entry), first.entry, rows, count)
    return found


def _channel_shapes(experts: Any, path: str, rows: int, columns: int) -> Shapes:
    """Of experts whose first matrices make ``rows``, and whose second ones read ``columns``."""
    made, read = ExpertLinear(experts, up_of(experts), 0), ExpertLinear(experts, DOWN, 0)
    up, down = (rows, made.in_features), (read.out_features, columns)
    shapes: Shapes = {up_of(experts): up[::-1] if made.turned else up, DOWN: down[::-1] if made.turned else down}
    for linear, name, outputs in ((made, up_of(experts), rows), (read, DOWN, read.out_features)):
        if linear.bias is not None:
            shapes[f"{name}_bias"] = (outputs,)
    return {f"{path}.{name}": (count_of(experts), *shape) for name, shape in shapes.items()}


def _by_expert(model: nn.Module, site: Site) -> dict[str, tuple[Tensor, int]]:
    """The tensors with an entry for each expert of a layer, and in which dimension, by name in the state dict."""
    assert site.router is not None  # its units are whole experts
    holder, router = model.get_submodule(site.entry), model.get_submodule(site.router)
    above = site.router.rpartition(".")[0]
    block = model.get_submodule(above)
    paths = {block: above, **{module: f"{site.router}.{path}".strip(".") for path, module in router.named_modules()}}
    found: dict[str, tuple[Tensor, int]]
    found = {f"{site.entry}.{name}": (own, 0) for name, own in holder.named_parameters() if len(own) == site.units}
    for (module, name), dim in tensors_by_expert(block, router, site.units).items():
        found[f"{paths[module]}.{name}"] = getattr(module, name), dim
    return found


def cut_experts(found: Tensors, model: nn.Module, cuts: Sequence[SiteCut], place: Place, sliced: bool) -> None:
    """Replace the experts' and routers' tensors of layers that are cut.

    ``place`` arranges kept rows; ``sliced``: they alone are written, and are as many in every expert of a layer.
    """
    by_site = {cut.site: cut for cut in cuts}
    for group in layers_of_experts(by_site):
        mine = [by_site[site] for site in group]
        opened = [cut.open_cut for cut in mine if cut.open_cut is not None]
        if not opened:
            continue
        site, kept = mine[0].site, opened[0].kept
        if site.expert is None:
            for name, (tensor, dim) in _by_expert(model, site).items():
                shape = (*tensor.shape[:dim], len(kept), *tensor.shape[dim + 1 :])
                found[name] = PlannedTensor(shape, tensor.dtype, partial(_chosen, tensor, dim, kept))
            continue
        for cut in mine:
            if cut.compensation.wanted:
                _check_bias(cut.site, cut.binding.consumer)
        experts: Any = mine[0].binding.entry
        linear, _ = mine[0].binding.producers[0]
        rows = len(opened[0].rows[linear]) if sliced else linear.out_features
        columns = len(opened[0].columns) if sliced else linear_at(model, site.consumer).in_features
        for name, shape in _channel_shapes(experts, site.entry, rows, columns).items():
            part = name.rpartition(".")[2]
            found[name] = PlannedTensor(shape, found[name].dtype, partial(_stacked, mine, part, place))


def _chosen(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    return written(tensor.index_select(dim, kept.to(tensor.device)))


@torch.no_grad()
def _stacked(cuts: Sequence[SiteCut], name: str, place: Place) -> Tensor:
    """The tensor ``name`` of all experts of a layer, (E, ...)."""
    return written(torch.stack([_of_expert(cut, name, place) for cut in cuts]))


def _of_expert(cut: SiteCut, name: str, place: Place) -> Tensor:
    opened, consumer = cut.open_cut, cut.binding.consumer
    (linear, producer), *_ = cut.binding.producers
    if opened is None:  # it keeps all, as the others do
        return getattr(cut.binding.entry, name)[cut.site.expert]
    which = int(name.endswith("_bias"))
    if not name.startswith(DOWN):
        made = opened.producer(linear, producer)[which]
        assert made is not None  # a bias is planned only where there is one
        made = place(made, opened.rows[linear], linear.out_features)
        return made if which else _stored(made, linear)
    made = opened.consumer()[which]
    assert made is not None
    return made if which else _stored(place(made.T, opened.columns, consumer.in_features).T, linear)


def _stored(matrix: Tensor, linear: Any) -> Tensor:
    """A matrix (O, I) as the experts' tensor holds it."""
    return matrix.T if linear.turned else matrix
