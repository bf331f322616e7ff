"""Prunable sites as data: the rows and columns of weights that belong to each unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SiteKind = str
"""``attention``, ``mlp``, ``expert0``, ``expert1`` ... for the channels of a routed expert, ``experts`` for whole
experts. Layer and kind together are the key of a site."""
SiteGroup = Literal["attention", "mlp", "expert", "experts"]
AttentionUnit = Literal["kv_group", "query_head"]
ExpertUnit = Literal["channels", "whole", "keep"]


@dataclass(frozen=True)
class Rows:
    """Rows of a producer's weight owned by the units: unit ``u`` owns ``offset + u*per_unit ...``."""

    offset: int
    per_unit: int

    def of(self, units: Tensor) -> Tensor:
        """Row indices of ``units``; (k,) int64 -> (k * per_unit,) int64 in the order of ``units``."""
        if self.per_unit == 1:
            return units + self.offset if self.offset else units
        within = torch.arange(self.per_unit, device=units.device)
        return (units[:, None] * self.per_unit + self.offset + within).reshape(-1)


@dataclass(frozen=True)
class Producer:
    """A linear layer whose output rows are cut with the site (q/k/v, gate/up, fc1)."""

    path: str
    segments: tuple[Rows, ...]
    shared: Rows | None = None
    """Rows of no unit, ``offset ... offset + per_unit``, which always stay: keys and values that all query heads read,
    in one layer with the queries. They come last."""

    def rows(self, units: Tensor) -> Tensor:
        """Rows of this producer that compute ``units``; (k,) int64 -> (r,) int64."""
        if len(self.segments) == 1 and self.shared is None:
            return self.segments[0].of(units)
        shared = () if self.shared is None else (self.shared.of(units.new_zeros(1)),)
        return torch.cat([*(segment.of(units) for segment in self.segments), *shared])


@dataclass(frozen=True)
class ShapeAttribute:
    """An attribute that the block's forward reads as a size: ``units * per_unit`` while the site is cut.

    ``config.NAME`` is read from the configuration, which the module shares with others: only this module sees the size.
    """

    path: str
    attribute: str
    per_unit: int = 1


@dataclass(frozen=True)
class UnitTensor:
    """A parameter, or a module list, with entries of the units in its first dimension: attention sinks, a norm per
    head."""

    path: str
    """The module that has it."""
    name: str
    rows: Rows


@dataclass(frozen=True)
class UnitArgument:
    """A tensor that the entry is called with, with entries of every unit: ALiBi biases, or a mask that holds them.

    Its heads are dimension 1 of four, (B or 1, H, queries, keys), else dimension 0, (H, 1, keys) or (B * H, 1, keys);
    one head there stands for all.
    """

    name: str
    per_unit: int = 1


@dataclass(frozen=True)
class Site:
    """One place that can be cut: a decoder layer's attention, its MLP, a routed expert, or its set of routed experts.

    Paths are module names from the model's root. Those of an expert's matrices have a tensor and a number after the
    module: ``...mlp.experts:down_proj:3`` (:func:`~prunekit.registry.linear_at`). C = ``units * unit_size`` channels
    enter the consumer.
    """

    layer: int
    kind: SiteKind
    norm: str | None
    """Norm whose input is the residual stream, before the site; None: the entry reads the residual stream itself."""
    entry: str
    """The site's first module: the attention, the MLP, or OPT's ``fc1``."""
    producers: tuple[Producer, ...]
    consumer: str
    """The linear layer that reads the C channels (o_proj, down_proj, fc2)."""
    units: int
    unit_size: int
    unit_parameters: int
    """Weights and biases of one unit."""
    outputs: int
    """Consumer outputs O."""
    shape_attributes: tuple[ShapeAttribute, ...] = ()
    query_heads_per_kv: int = 0
    """More than 0 where query heads are cut but key/value heads stay: the attention then selects the key/value head of
    each kept query head."""
    activation: str | None = None
    """Path of the activation of an MLP that is not a module: its first half is ``activation(producer(x))``."""
    selected: tuple[Producer, ...] = ()
    """Modules that compute all units although the site is cut, and whose output is then cut to these rows: a norm over
    the queries or keys of all heads. The linear layer before it stays whole, and is not a producer."""
    unit_tensors: tuple[UnitTensor, ...] = ()
    unit_arguments: tuple[UnitArgument, ...] = ()
    position_tables: tuple[str, ...] = ()
    """Buffers (1, 1, P, P) of the entry, which say what each position may attend to: local attention."""
    residual: str | None = None
    """Argument that the entry adds to what it returns, if it adds the residual stream itself."""
    linear_types: tuple[str, ...] = ()
    """Names of subclasses of ``nn.Linear`` that compute what it computes, if the site's layers have one."""
    returns: int | None = None
    """How many values the entry's forward returns: 1 for the block's output alone, more for a tuple that begins with
    it; None: 2 for an attention, 1 for an MLP. Where the site keeps nothing, the others are None."""
    norm_serves_others: bool = False
    """Whether modules outside the model's sites read the norm, too, such as routed experts. It is then computed even
    where the site keeps nothing."""
    expert: int | None = None
    """The expert's number, where the channels are those of a routed expert: only some tokens reach them."""
    router: str | None = None
    """The router's path, where the units are whole experts: its rows and biases are cut along."""
    least: int = 0
    """Units that must stay, such as the experts that the router chooses for every token."""
    reached: float = 1.0
    """The share of the tokens that reach a unit on average."""

    @property
    def channels(self) -> int:
        return self.units * self.unit_size

    @property
    def group(self) -> SiteGroup:
        """The kind without an expert's number: sites of a group have units of the same sort."""
        if self.expert is not None:
            return "expert"
        return "attention" if self.kind == "attention" else "experts" if self.router is not None else "mlp"

    @property
    def routed(self) -> bool:
        """Whether it is of routed experts, which a router chooses for every token."""
        return self.expert is not None or self.router is not None

    @property
    def label(self) -> str:
        return f"layer {self.layer} {self.kind}" if self.expert is None else f"layer {self.layer} expert {self.expert}"

    def columns(self, units: Tensor) -> Tensor:
        """Consumer columns (channels) of ``units``; (k,) int64 -> (k * unit_size,) int64."""
        return Rows(0, self.unit_size).of(units)


def owned_norms(sites: Sequence[Site]) -> set[str]:
    """The norms that nothing but one site reads: they go where that site keeps nothing.

    What a site adds as its residual may come through the norm, which then stays.
    """
    read = Counter(site.norm for site in sites if site.norm is not None)
    others = {site.norm for site in sites if site.norm_serves_others or site.residual is not None}
    return {norm for norm, times in read.items() if times == 1} - others


def complement(chosen: Tensor, count: int) -> Tensor:
    """The other of ``count`` indices, ascending, without a copy to the CPU; (k,) int64 -> (count - k,) int64."""
    taken = torch.zeros(count, dtype=torch.uint8, device=chosen.device).index_fill_(0, chosen, 1)
    return taken.argsort(stable=True)[: count - len(chosen)]
