"""Checks of an architecture's routed experts on a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..roles.parts import Architecture
from ..sites import Site
from ..tensors.experts import activated, count_of, cut_router, linear_at, plain_expert
from .parts import draw, expect


@torch.no_grad()
def check_experts(architecture: Architecture, model: Any) -> None:
    """Raise :class:`AssertionError` unless the sites of routed experts fit the model.

    Sites are listed layer by layer and expert by expert. A channel's rows make that channel alone. In a pass of 12
    random tokens the experts compute what their matrices say, after their norm. A router that is cut chooses among the
    experts that are left.
    """
    channels, whole = (architecture.expert_sites(model, unit) for unit in ("channels", "whole"))
    by_layer: dict[int, list[Site]] = {}
    for site in channels:
        by_layer.setdefault(site.layer, []).append(site)
    layers = [site.layer for site in whole]
    expect(layers == sorted(by_layer), architecture, f"whole experts are in layers {layers}, channels in {[*by_layer]}")
    for site in whole:
        experts: Any = model.get_submodule(site.entry)
        count, mine = count_of(experts), by_layer[site.layer]
        numbers = [each.expert for each in mine]
        expect(numbers == [*range(count)], architecture, f"{site.label}: must list experts 0 to {count - 1}, in order")
        expect(
            site.units == count, architecture, f"{site.label}: there are {count} experts, the site says {site.units}"
        )
        for each in mine:
            _check_channels(architecture, model, experts, each)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            _check_call(architecture, model, experts, site)
        finally:
            for module, training in modes:
                module.training = training


def _check_channels(architecture: Architecture, model: Any, experts: Any, site: Site) -> None:
    """The rows of some channels make these channels."""
    producer, consumer = linear_at(model, site.producers[0].path), linear_at(model, site.consumer)
    real, said = (consumer.out_features, consumer.in_features), (site.outputs, site.units)
    expect(real == said, architecture, f"{site.label}: {site.consumer} is {real}, the site says {said}")
    kept = torch.arange(0, site.units, 2, device=producer.weight.device)
    made = draw(4, producer.out_features).to(producer.weight)
    of_rows, of_all = activated(experts, made[:, site.producers[0].rows(kept)]), activated(experts, made)[:, kept]
    same = of_rows.shape == of_all.shape and torch.allclose(of_rows, of_all)
    expect(same, architecture, f"{site.label}: the rows of a channel in {site.producers[0].path} make another channel")
    rows = len(site.producers[0].rows(kept[:1]))
    parameters = rows * (producer.in_features + (producer.bias is not None)) + consumer.out_features
    stated = f"{site.label}: a channel has {parameters} parameters, the site says {site.unit_parameters}"
    expect(site.unit_parameters == parameters, architecture, stated)


def _check_call(architecture: Architecture, model: Any, experts: nn.Module, site: Site) -> None:
    """What the experts return in a pass, and what their router chooses when it is cut."""
    path, router = site.entry, site.router or ""
    block, calls = model.get_submodule(path.rpartition(".")[0]), _passed(model, {path, router.rpartition(".")[0]})
    expect(path in calls, architecture, f"{site.label}: a pass never calls {path}")
    (states, index, weights), output = calls[path]
    weights = weights if weights.shape == index.shape else weights.gather(1, index)
    wanted = torch.zeros_like(states)
    for number in range(site.units):
        token, place = torch.where(index == number)
        wanted[token] += plain_expert(experts, number, states[token]) * weights[token, place, None]
    same = output.shape == wanted.shape and torch.allclose(output, wanted, rtol=1e-3, atol=1e-4)
    expect(same, architecture, f"{site.label}: {path} computes something else than its matrices say, expert by expert")
    if site.norm is not None:
        normed = _passed(model, {site.norm})[site.norm][1]
        same = normed.numel() == states.numel() and torch.equal(normed.reshape(states.shape), states)
        expect(same, architecture, f"{site.label}: {path} does not read what {site.norm} returns")
    expect(index.shape[1] <= site.least, architecture, f"{site.label}: {index.shape[1]} are chosen, not {site.least}")
    if site.least >= site.units:
        return
    chosen: list[Tensor] = []

    def choose_first(_: nn.Module, args: tuple) -> tuple:
        chosen.append(args[1])
        return args[0], args[1] * 0, args[2]

    handle = experts.register_forward_pre_hook(choose_first)
    entered, _ = calls[router.rpartition(".")[0]]
    try:
        with cut_router(block, model.get_submodule(router), site.units, torch.arange(1, site.units)):
            block(*entered)
    finally:
        handle.remove()
    fits = bool(chosen) and int(chosen[0].max()) < site.units - 1
    expect(fits, architecture, f"{site.label}: {router} chooses an expert that is gone, so it is not the router")
    same = torch.equal(*(each.sort(1).values for each in (chosen[0] + 1, index))) if not (index == 0).any() else True
    expect(same, architecture, f"{site.label}: {router} chooses others although none of those it chose is gone")


def _passed(model: Any, paths: set[str]) -> dict[str, tuple[tuple, Any]]:
    """What modules get and return in a pass on 12 random tokens, by their path."""
    calls: dict[str, tuple[tuple, Any]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, output, path=path: calls.__setitem__(path, (args, output))
        )
        for path in paths
    ]
    embeddings = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (2, 6), generator=torch.Generator().manual_seed(0))
    try:
        model(input_ids=ids.to(embeddings.weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
