"""Checks of an architecture on a model: what its sites say, and what happens to them in a pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..roles.parts import Architecture, SizeFields
from ..sites import AttentionUnit, Site
from ..tensors.caches import cache_among, counts_positions, without_caches
from ..tensors.linears import sizes_of
from .experts import check_experts
from .parts import expect


def check_sites(architecture: Architecture, model: nn.Module, attention_unit: AttentionUnit = "kv_group") -> None:
    """Raise :class:`AssertionError` unless the sites fit the model: names, shapes, parameters, order, and its passes.

    The model runs on 12 random tokens, with a key/value cache.
    """
    layers = len(list(model.get_submodule(architecture.layers).children()))
    sites = architecture.sites(model, attention_unit)
    wanted = [(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]
    found = [(site.layer, site.kind) for site in sites]
    in_order = bool(found) and found == [place for place in wanted if place in found]
    expect(in_order, architecture, f"must list sites layer by layer, attention before MLP, found {found}")
    missing = [f"layer {layer} {kind}" for layer, kind in wanted if (layer, kind) not in found]
    has_others = bool(architecture.leaves or architecture.expert_sites(model, "channels"))
    expect(
        has_others or not missing,
        architecture,
        f"lists no site for {', '.join(missing)}; say in leaves what such layers have instead, or list it",
    )
    for site in sites:
        shape = (site.outputs, site.channels)
        real = sizes_of(model.get_submodule(site.consumer))
        expect(real == shape, architecture, f"{site.label}: {site.consumer} is {real}, the site says {shape}")
        for path in (site.norm, site.entry, site.activation):
            if path is not None:
                model.get_submodule(path)
        unit, parameters = torch.tensor([0]), site.unit_size * site.outputs
        for producer in site.producers:
            linear: Any = model.get_submodule(producer.path)
            rows = producer.rows(torch.arange(site.units)).sort().values
            outputs, inputs = sizes_of(linear)
            whole = torch.equal(rows, torch.arange(outputs))
            expect(whole, architecture, f"{site.label}: units own {len(rows)} rows of {producer.path}, not all once")
            owned = len(producer.rows(unit)) - (producer.shared.per_unit if producer.shared else 0)
            parameters += owned * (inputs + (linear.bias is not None))
        parameters += check_entries(architecture, model, site)
        expect(
            site.unit_parameters == parameters,
            architecture,
            f"{site.label}: a unit has {parameters} parameters, the site says {site.unit_parameters}",
        )
        for attribute in site.shape_attributes:
            value = attrgetter(attribute.attribute)(model.get_submodule(attribute.path))
            stated = site.units * attribute.per_unit
            expect(
                value == stated,
                architecture,
                f"{attribute.path}.{attribute.attribute} is {value}, not {stated} ({site.units} units, "
                f"{attribute.per_unit} for each); name the attribute that has this number",
            )
    owner: Any = model
    if architecture.sizes is not None and attention_unit == "kv_group" and not has_others:
        wrong = wrong_size(architecture.sizes, owner.config.get_text_config(), sites)
        expect(wrong is None, architecture, f"sizes: {wrong}")
    check_pass(architecture, model, sites)
    check_experts(architecture, model)


def wrong_size(fields: SizeFields, config: Any, sites: Sequence[Site]) -> str | None:
    """What a language model's configuration says otherwise than its sites, of key/value groups and MLP channels."""
    for name in (fields.heads, fields.width):
        if not hasattr(config, name):
            return f"the configuration has no field {name}"
    heads = getattr(config, fields.heads)
    groups = (getattr(config, fields.kv_heads, None) if fields.kv_heads else None) or heads
    for site in sites:
        attends = site.kind == "attention"
        field = (fields.kv_heads or fields.heads) if attends else fields.width
        stated = groups if attends else getattr(config, field)
        if site.units != stated:
            return f"{field} is {stated}, and {site.label} has {site.units} units"
        if attends and site.channels % heads:
            return f"{fields.heads} is {heads}, and {site.label} has {site.channels} channels"
    return None


def check_entries(architecture: Architecture, model: nn.Module, site: Site) -> int:
    """Units own all entries of other tensors once, and arguments are the entry's own; returns one unit's parameters."""
    parameters, names = 0, _parameters(model.get_submodule(site.entry))
    for tensor in site.unit_tensors:
        entries = getattr(model.get_submodule(tensor.path), tensor.name)
        rows = tensor.rows.of(torch.arange(site.units))
        whole = torch.equal(rows, torch.arange(len(entries)))
        path = f"{tensor.path}.{tensor.name}"
        expect(
            whole, architecture, f"{site.label}: units own {len(rows)} entries of {path}, not all {len(entries)} once"
        )
        each = entries[:1] if isinstance(entries, torch.Tensor) else entries[0].parameters()
        parameters += tensor.rows.per_unit * sum(part.numel() for part in each)
    for name in (*(argument.name for argument in site.unit_arguments), *([site.residual] if site.residual else ())):
        expect(name in names, architecture, f"{site.label}: the forward of {site.entry} has no argument {name}")
    for name in site.position_tables:
        shape = tuple(getattr(model.get_submodule(site.entry), name).shape)
        fits = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
        expect(fits, architecture, f"{site.label}: {site.entry}.{name} is {shape}, not (1, 1, P, P)")
    for producer in site.selected:
        rows = producer.rows(torch.arange(site.units)).sort().values
        whole = torch.equal(rows, torch.arange(len(rows)))
        expect(whole, architecture, f"{site.label}: units select {len(rows)} outputs of {producer.path}, not all once")
    return parameters


def check_model_types(architecture: Architecture) -> None:
    """It names the model types that it serves."""
    types = architecture.model_types
    expect(bool(types) and all(isinstance(t, str) for t in types), architecture, "names no config.model_type")


Call = tuple[nn.Module, tuple, dict[str, Any]]
"""A module that was called, and its arguments."""


def _out_of_order(site: Site, producers: Sequence[str], calls_of: Mapping[str, int]) -> str:
    """Which two of a site's modules a pass calls in the wrong order; empty where it calls none."""
    apart = [(site.norm, site.entry)] if site.norm else []
    apart += [(path, site.consumer) for path in producers]
    for first, then in [*apart, *((site.entry, path) for path in producers)]:
        if calls_of[first] > calls_of[then]:
            return f"{then} before {first}"
        if first == then and (first, then) in apart:
            return f"{first} once, for both"
    return ""


@torch.no_grad()
def check_pass(architecture: Architecture, model: Any, sites: Sequence[Site]) -> None:
    """A pass calls each site's norm, entry, producers and consumer in this order, and its block can run again alone.

    A probe runs the block again, without the key/value cache. It must compute the same, and leave the cache as it is.
    """
    with recorded(model) as calls:
        output = model(input_ids=check_tokens(model), use_cache=True)
        first, cache = list(calls), cache_among(output)
        for site in sites:
            producers = [producer.path for producer in (*site.producers, *site.selected)]
            calls_of = {path: _call(architecture, site, path, model, first) for path in _paths(site)}
            norm, entry, consumer = (calls_of.get(path or "", -1) for path in (site.norm, site.entry, site.consumer))
            wrong_order = _out_of_order(site, producers, calls_of)
            before_it = f"{site.norm}, then " if site.norm else ""
            expect(
                not wrong_order,
                architecture,
                f"{site.label}: a pass must call {before_it}{site.entry}, then {', '.join(producers)}, then "
                f"{site.consumer}; it calls {wrong_order}",
            )
            if site.norm is not None:
                normed, read = first[norm][0].forward(*first[norm][1]), _read(*first[entry])
                expect(
                    normed.numel() == read.numel() and torch.equal(normed.reshape(read.shape), read),
                    architecture,
                    f"{site.label}: {site.entry} does not read what {site.norm} returns",
                )
            if site.activation is not None:
                continue
            before, wrong = _lengths(cache), _undeclared(site, *first[entry])
            del calls[:]
            try:
                _run_alone(*first[entry])
            except (TypeError, RuntimeError) as error:
                wrong = wrong or str(error)
            expect(
                before == _lengths(cache),
                architecture,
                f"{site.label}: {site.entry} writes to the key/value cache although it is called without one, as a "
                "probe does; the cache must be an argument of its own, with a method get_seq_length",
            )
            expect(not wrong, architecture, f"{site.label}: {site.entry} cannot run as in a probe: {wrong}")
            seen = first[consumer][1][0], calls[_call(architecture, site, site.consumer, model, calls)][1][0]
            expect(
                seen[0].shape == seen[1].shape and torch.allclose(*seen, rtol=1e-3, atol=1e-4),
                architecture,
                f"{site.label}: {site.entry} computes something else when it is called again without the key/value "
                "cache, as a probe does",
            )


def check_tokens(model: Any) -> torch.Tensor:
    """12 random tokens for a model; (2, 6) int64."""
    embeddings = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (2, 6), generator=torch.Generator().manual_seed(0))
    return ids.to(embeddings.weight.device)


def _run_alone(entry: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    names = _parameters(entry)
    arguments = without_caches({**dict(zip(names, args, strict=False)), **kwargs})
    entry.forward(arguments.pop(names[0]), **arguments)


def _undeclared(site: Site, entry: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    """What an MLP is called with that its site does not name; a probe ahead of the MLP has its first argument alone."""
    if site.kind == "attention":
        return ""
    names = _parameters(entry)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    others = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    others = [name for name in others if name not in (names[0], site.residual)]
    return f"it is called with {others[0]!r}, too, and the site's residual does not name it" if others else ""


def _read(entry: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a block reads: its first argument."""
    return args[0] if args else kwargs[_parameters(entry)[0]]


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _lengths(cache: Any) -> list[int]:
    layers = [] if cache is None else range(len(cache))
    return [int(cache.get_seq_length(layer)) for layer in layers if counts_positions(cache, layer)]


def _paths(site: Site) -> list[str]:
    norm = [site.norm] if site.norm else []
    return [*norm, site.entry, *(producer.path for producer in (*site.producers, *site.selected)), site.consumer]


def _call(architecture: Architecture, site: Site, path: str, model: nn.Module, calls: Sequence[Call]) -> int:
    """The number of a module's first call."""
    module = model.get_submodule(path)
    found = [number for number, call in enumerate(calls) if call[0] is module]
    expect(bool(found), architecture, f"{site.label}: a pass never calls {path}")
    return found[0]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """Within it, without dropout, every call of a module is added to the list."""
    calls: list[Call] = []
    modes = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for module in model.modules()
    ]
    model.eval()
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
