"""A plain transformers model sliced to given widths: the lower bound of what a decision per batch can take."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import Site, SiteKind, SpecError
from ...registry.tensors.linears import is_transposed
from ..engine.config_view import CONFIG, ConfigView, use_view


def sharing_copy(model: nn.Module) -> Any:
    """A copy of ``model`` with its weights in the same memory until one of the two replaces them."""
    shared = {id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def sliced(model: nn.Module, sites: Sequence[Site], counts: Mapping[tuple[int, SiteKind], int]) -> Any:
    """A copy of ``model`` with the first ``counts`` units of each site, in linear layers of that size.

    Raises :class:`SpecError` for query heads of key/value groups, of which a plain model has the same number in each
    group, and for layers that have more of each unit than the rows and columns of ``nn.Linear``.
    """
    cut = [site for site in sites if counts.get((site.layer, site.kind), site.units) < site.units]
    if any(site.query_heads_per_kv for site in cut):
        raise SpecError(
            "--arms: there is no ideal arm where query heads are cut under grouped-query attention, because no plain "
            "model has such shapes; leave it out, or cut whole key/value groups"
        )
    for site in cut:
        linears = [model.get_submodule(path) for path in (site.consumer, *(each.path for each in site.producers))]
        if site.selected or site.unit_tensors or site.unit_arguments or any(map(is_transposed, linears)):
            raise SpecError(
                f"--arms: there is no ideal arm for {site.label}, because no plain model has such a layer without some "
                "of its units; leave it out"
            )
    small = sharing_copy(model)
    for site in cut:
        count = counts[site.layer, site.kind]
        units = torch.arange(count, device=next(model.parameters()).device)
        for producer in site.producers:
            linear, rows = small.get_submodule(producer.path), producer.rows(units)
            bias = None if linear.bias is None else linear.bias[rows]
            small.set_submodule(producer.path, _linear(linear.weight[rows], bias))
        consumer = small.get_submodule(site.consumer)
        columns = site.columns(units)
        small.set_submodule(site.consumer, _linear(consumer.weight[:, columns].contiguous(), consumer.bias))
        for attribute in site.shape_attributes:
            module, name = small.get_submodule(attribute.path), attribute.attribute
            if name.startswith(CONFIG):
                use_view(module, view := ConfigView(module.config))
                module, name = view, name.removeprefix(CONFIG)
            setattr(module, name, count * attribute.per_unit)
    return small


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return linear.requires_grad_(False)
