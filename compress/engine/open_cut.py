"""The units that a site computes with now, and its weights cut to them.

Letters: k kept units, c their channels, C all channels; r kept rows of a producer, D hidden size, O outputs of the
consumer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import (
    MaskApplier,
    Producer,
    Rows,
    Selection,
)
from ...registry.tensors.devices import is_offloaded, unautocast, weights_present
from ...registry.tensors.linears import matrix_of
from .batch import Running
from .gathering import Gatherer, selects
from .runtime import Runtime, Stages
from .shapes import checked, written_to
from .site_state import SiteState
from .weights import differentiates, made_of, weights_version

Weights = tuple[Tensor, "Tensor | None"]
"""Weight and bias."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What all sites of a pruned model use together."""

    applier: MaskApplier
    runtime: Runtime
    gatherer: Gatherer
    stages: Stages
    running: Running
    selects: bool
    """Whether the applier returns plain selections."""
    reuses: bool
    """Whether producers may take over what they made of a probe."""

    @classmethod
    def of(cls, applier: MaskApplier, runtime: Runtime) -> Shared:
        """What a strategy with this applier uses."""
        plain = selects(applier)
        return cls(applier, runtime, Gatherer(runtime), Stages(), Running(), plain, plain and runtime.reuse_probe)


class OpenCut:
    """The units that a site computes with, and its weights cut to them."""

    def __init__(self, state: SiteState, shared: Shared, kept: Tensor, stays: bool):
        self.state, self.shared = state, shared
        self.kept = kept
        """(k,) int64 ascending."""
        self.stays = stays
        """Whether it serves several passes: its copies then have memory of their own."""
        self.keeps = stays
        """Whether copies are kept, to be used again."""
        self.once = state.fixed is not None
        """Whether the units were decided once."""
        self.probe_mean: Tensor | None = None
        """(C,) float32: the channels' mean in a probe of this batch, where compensation uses it."""
        self.shares: Tensor | None = None
        """(2,) float32: the shares of mean and slope that fit this probe best, where compensation checks them."""
        self.absent = shared.applier.resizes and not len(kept)
        """Whether the block is not computed at all."""
        site = state.binding.site
        self.columns = site.columns(kept)
        """(c,) int64: the units' channels."""
        known: dict[tuple, Tensor] = {((Rows(0, site.unit_size),), None): self.columns}
        self.rows: dict[nn.Module, Tensor] = {}
        """(r,) int64 by producer: the units' rows."""
        for linear, producer in state.binding.producers:
            place = producer.segments, producer.shared
            if place not in known:
                known[place] = producer.rows(kept)
            self.rows[linear] = known[place]
        self.fuses = shared.runtime.fused_gather and shared.selects and not stays
        """Whether kept rows and columns are read inside the matrix products, without copies."""
        self._copies: dict[tuple[nn.Module, str], tuple[tuple, Any]] = {}
        self.ready: dict[nn.Module, Any] = {}
        """Weight and bias by layer, for steps that have checked that all are as they were (:mod:`.steady`)."""

    def forget_copies(self) -> None:
        """Copy weights anew when they are used next."""
        self._copies, self.ready = {}, {}

    def make_ready(self) -> bool:
        """Whether all copies are kept; :attr:`ready` then has them."""
        consumer = self.state.binding.consumer
        weight = self._recall(consumer, "weight")
        self.ready = {linear: self._recall(linear, "producer") for linear, _ in self.state.binding.producers}
        self.ready[consumer] = None if weight is None else (weight, self._bias(consumer, weight))
        self.ready |= self.state.given
        return all(made is not None for made in self.ready.values())

    def use_probe(self, mean: Tensor | None, shares: Tensor | None) -> None:
        """Compensate with the mean in this batch's probe (C,) and these shares (2,) of mean and slope.

        None: the calibrated mean, and the whole of both.
        """
        if mean is self.probe_mean and shares is self.shares:
            return
        outdated = {"bias"} if shares is self.shares or not self._has_slope else {"bias", "weight"}
        self.probe_mean, self.shares, self.ready = mean, shares, {}
        self._copies = {key: made for key, made in self._copies.items() if key[1] not in outdated}

    @torch.no_grad()
    def best_shares(self, states: Tensor, real: Tensor | None, probe_mean: Tensor) -> Tensor:
        """The shares (2,) of mean and slope that fit a probe best.

        states (b, t, C): what enters the consumer; real (b, t) bool, or None where all are; probe_mean (C,).
        """
        linear, kept = self.state.binding.consumer, self.columns
        with self.shared.stages.compensate, weights_present(linear), unautocast(linear.weight):
            added = self._added(linear)
            if added is None:  # the share of the mean depends on nothing else of the tokens
                states, real = probe_mean[None, None], None
            mean = self._mean(probe_mean)
            return self.state.compensation.best_shares(matrix_of(linear), kept, added, states, real, mean)

    def keep_copies(self) -> None:
        """Keep copies from now on until the site is left."""
        self.keeps = True

    def producer(self, linear: nn.Linear, producer: Producer) -> Weights:
        """Weight (r, D) and bias (r,) of a producer."""
        if linear in self.state.given:
            return self.state.given[linear]
        shared = self.shared
        if self.keeps and (known := self._recall(linear, "producer")) is not None:
            return known
        with shared.stages.gather:
            whole = linear.weight.t() if linear.transposed else linear.weight
            before = None if shared.selects or torch.compiler.is_compiling() else weights_version(linear)
            weight, bias = shared.applier.producer(whole, linear.bias, self.rows[linear])
            if before is not None and before != weights_version(linear):
                raise written_to(self.state.binding.site, shared.applier, "producer")
            if isinstance(weight, Selection):
                place = None if self.stays else (self.state.binding.site.kind, producer.path)
                weight = shared.gatherer.copy(weight, linear, place, self.once)
            if isinstance(bias, Selection):
                bias = bias.copied()
            rows = len(self.rows[linear]) if shared.applier.resizes else linear.out_features
            self._check(weight, (rows, linear.in_features), f"producer (weight of {producer.path})")
            if linear.bias is not None:
                self._check(bias, (rows,), f"producer (bias of {producer.path})")
        if self.keeps:
            self._store(linear, "producer", (weight, bias))
        return weight, bias

    def _check(self, made: Any, shape: tuple[int, ...], method: str) -> None:
        checked(made, shape, method, "mask applier", self.shared.applier, self.state.binding.site)

    def consumer(self) -> Weights:
        """Weight (O, c) and bias (O,) of the consumer, compensation included."""
        linear = self.state.binding.consumer
        if linear in self.state.given:
            return self.state.given[linear]
        weight = self._recall(linear, "weight") if self.keeps else None
        if weight is None:
            weight = self._consumer_weight(linear)
            if self.keeps:
                self._store(linear, "weight", weight)
        return weight, self._bias(linear, weight)

    def constant(self, x: Tensor) -> Tensor:
        """What an absent block adds to the residual stream: nothing, or its mean output if that is compensated.

        x (..., D) is what the block reads -> (..., O), which the layer may write to.
        """
        linear = self.state.binding.consumer
        if not self.state.compensation.wanted:
            return x.new_zeros(*x.shape[:-1], linear.out_features)
        added = self._recall(linear, "bias")
        if added is None:
            with torch.no_grad(), weights_present(linear):
                added = self._bias(linear, None)
        assert added is not None  # it is compensated
        return added.to(x).repeat(*x.shape[:-1], 1)

    def _bias(self, linear: nn.Linear, weight: Tensor | None) -> Tensor | None:
        """The consumer's bias (O,), compensation included; a site that keeps nothing has only that of compensation.

        weight (O, c) is the consumer's; None: no unit is kept.
        """
        if not self.state.compensation.wanted:
            return linear.bias if len(self.kept) else None
        bias = self._recall(linear, "bias") if self.keeps else None
        if bias is None:
            bias = self._mean_keeping_bias(linear, weight)
            if self.keeps:
                self._store(linear, "bias", bias)
        return bias

    def copies(self) -> Iterator[Tensor]:
        """What is kept, without the model's own weights."""
        yield from (tensor for pair in self.state.given.values() for tensor in pair if tensor is not None)
        for (linear, _), (_, made) in self._copies.items():
            for tensor in made if isinstance(made, tuple) else (made,):
                if tensor is not None and tensor is not linear.weight and tensor is not linear.bias:
                    yield tensor

    def _consumer_weight(self, linear: nn.Linear) -> Tensor:
        compensation, plain = self.state.compensation, self._recall(linear, "plain")
        if plain is None:
            plain = self._plain_weight(linear)
            if self.once and self._has_slope and compensation.compensator.checks_shares:
                self._store(linear, "plain", plain)  # every batch adds its own share of the slope to it
        if not self._has_slope:
            return plain
        with self.shared.stages.compensate, unautocast(plain):
            return compensation.weight(plain, self.columns, self._added(linear), self.shares)

    @property
    def _has_slope(self) -> bool:
        """Whether kept channels take over anything of the dropped ones."""
        compensation = self.state.compensation
        return compensation.wanted and compensation.has_slope and len(self.kept) > 0

    def _added(self, linear: nn.Linear) -> Tensor | None:
        """What the slope adds to the kept columns, (O, k) float32; None: nothing."""
        if not self._has_slope:
            return None
        added, compensation = self._recall(linear, "added"), self.state.compensation
        if added is None:
            added = compensation.folded(matrix_of(linear), self.columns)
            if compensation.compensator.checks_shares:  # read to find the shares, and to use them
                self._store(linear, "added", added)
        return added

    def _plain_weight(self, linear: nn.Linear) -> Tensor:
        """The kept columns of the weight (O, c), without compensation."""
        shared, compensation, site = self.shared, self.state.compensation, self.state.binding.site
        # Where a slope is added, the copy's layout is that of a weight which is kept.
        folded = self.stays and compensation.wanted and compensation.has_slope
        with shared.stages.gather:
            whole = linear.weight.t() if linear.transposed else linear.weight
            before = None if shared.selects or torch.compiler.is_compiling() else weights_version(linear)
            weight = shared.applier.consumer(whole, self.columns)
            if before is not None and before != weights_version(linear):
                raise written_to(site, shared.applier, "consumer")
            if isinstance(weight, Selection):
                place = None if self.stays else (site.kind, site.consumer)
                weight = shared.gatherer.copy(weight, linear, place, self.once or folded)
            columns = len(self.columns) if shared.applier.resizes else linear.in_features
            self._check(weight, (linear.out_features, columns), f"consumer (weight of {site.consumer})")
        return weight

    def _mean_keeping_bias(self, linear: nn.Linear, weight: Tensor | None) -> Tensor:
        """The consumer's bias, (O,): with the whole mean, the mean output is what it was before the cut."""
        state = self.state
        with self.shared.stages.compensate, unautocast(linear.weight):
            mean = self._mean(self.probe_mean)
            of_batch = state.compensation.compensator.uses_probe and mean is not state.history.mean
            target = state.compensation.target_mean(mean)
            if of_batch or differentiates(linear) or torch.compiler.is_compiling():
                whole = matrix_of(linear).float() @ target
            else:
                whole = state.mean_output(target)
            bias = whole if weight is None else state.compensation.bias(weight, self.columns, mean, whole)
            if state.compensation.lag is not None:
                bias = bias + state.compensation.lag
            if self.shares is not None:
                there = mean[self.columns]
                bias = state.compensation.share_of_bias(bias, self._added(linear), there, self.shares)
            return (bias if linear.bias is None else bias + linear.bias).to(linear.weight.dtype)

    def _mean(self, probe_mean: Tensor | None) -> Tensor:
        """The mean to compensate with, (C,); probe_mean (C,) is that of a probe, where one is used."""
        compensator, calibrated = self.state.compensation.compensator, self.state.history.mean
        assert calibrated is not None  # calibration keeps it wherever anything is compensated
        # Sequential calibration has no probe: it runs on the batches whose mean is the calibrated one.
        unprobed = compensator.uses_probe and probe_mean is None
        return calibrated if unprobed else compensator.mean(calibrated, probe_mean)

    def _recall(self, linear: nn.Linear, what: str) -> Any:
        """The copy that was made before, if the weights have not changed since; None: there is none."""
        known = self._copies.get((linear, what))
        if known is None:
            return None
        if torch.compiler.is_compiling():  # a graph takes weights as they are, and what was made once too
            return known[1] if self.once else None
        return known[1] if self._may_store(linear, what) and known[0] == made_of(linear) else None

    def _store(self, linear: nn.Linear, what: str, made: Any) -> None:
        if not torch.compiler.is_compiling() and self._may_store(linear, what):
            self._copies[linear, what] = made_of(linear), made

    def _may_store(self, linear: nn.Linear, what: str) -> bool:
        """Not what gradients go through, nor copies of offloaded weights: both leave memory when the layer's forward
        ends. A bias is small enough to stay."""
        return not differentiates(linear) and (what == "bias" or not is_offloaded(linear))
