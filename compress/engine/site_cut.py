"""A site in three parts: where it lies, what is known of it (:mod:`.site_state`), and its cut while one is open
(:mod:`.open_cut`).

What holds for one batch alone is in :mod:`.batch`. Letters: k kept units, c their channels, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...registry import (
    ChannelHistory,
    Site,
)
from .absent import Replaced, restore, unchanged
from .absent import replace as replace_forward
from .batch import split
from .compensation import SiteCompensation
from .grouped_cut import GroupedCut
from .kv_index import KV_INDEX
from .open_cut import OpenCut, Shared, Weights
from .site_state import SiteBinding, SiteState


class SiteCut:
    """A site of a pruned model: its binding, its state, and its cut while one is open."""

    def __init__(self, number: int, binding: SiteBinding, state: SiteState, shared: Shared):
        self.number, self.binding, self.state, self.shared = number, binding, state, shared
        self.open_cut: OpenCut | None = None
        self.computed: Tensor | None = None
        """The units of the last cut that was open, or was chosen for later passes; read after the pass."""
        self._suspended: OpenCut | None = None
        self._replaced: list[Replaced] = []
        """The modules of the block while it is not computed."""

    # Properties.

    @property
    def site(self) -> Site:
        return self.binding.site

    @property
    def history(self) -> ChannelHistory:
        return self.state.history

    @property
    def compensation(self) -> SiteCompensation:
        return self.state.compensation

    @property
    def count(self) -> int:
        """Units that the site keeps, the same in every batch."""
        return self.state.count

    @property
    def whole(self) -> bool:
        return self.state.whole

    @property
    def settled(self) -> bool:
        return self.state.settled

    @property
    def absent(self) -> bool:
        """Whether the block is not computed now."""
        return self.open_cut is not None and self.open_cut.absent

    @property
    def fixed(self) -> Tensor | None:
        """(k,) int64 ascending: the kept units where they are decided once."""
        return self.state.fixed

    @property
    def kept(self) -> Tensor | None:
        """(k,) int64 ascending, or (B, k) where rows have their own, while the cut is open."""
        return None if self.open_cut is None else self.open_cut.kept

    # Opening and closing.

    def open(
        self, kept: Tensor, probe_mean: Tensor | None = None, shares: Tensor | None = None, stays: bool = False
    ) -> None:
        """Compute with ``kept`` (k,) int64 from now on, or (B, k), each row with its own; if the last cut had the same
        tensor, its copies are reused.

        probe_mean (C,) and the shares (2,) of mean and slope are those of a probe. ``stays``: whether the cut serves
        several passes.
        """
        open_cut = self.open_cut
        if open_cut is None or open_cut.kept is not kept:
            if open_cut is not None:
                self.suspend()
            open_cut = self.cut_to(kept, stays)
            self.open_cut, self._suspended, self.computed = open_cut, None, kept
            if open_cut.absent:
                if not self.site.routed:  # other experts of the block stay
                    self._leave_out()
            elif self.shared.applier.resizes:
                binding = self.binding
                for module, name, per_unit, _ in binding.attributes:
                    setattr(module, name, kept.shape[-1] * per_unit)
                if binding.site.query_heads_per_kv:
                    setattr(binding.entry, KV_INDEX, kept // binding.site.query_heads_per_kv)
        open_cut.use_probe(probe_mean, shares)

    def cut_to(self, kept: Tensor, stays: bool) -> OpenCut:
        """The cut to ``kept`` (k,) or (B, k) that is to be opened next."""
        if self._suspended is None or self._suspended.kept is not kept:
            if stays:
                self.shared.gatherer.release(self.binding.site.kind)  # unused until a cut that does not stay
            made = OpenCut if kept.dim() == 1 else GroupedCut
            self._suspended = made(self.state, self.shared, kept, stays)
        return self._suspended

    def suspend(self) -> None:
        """Compute with all units; the cut's copies are kept for the case that the same units are opened next."""
        if self.open_cut is None:
            return
        self._suspended, self.open_cut = self.open_cut, None
        while self._replaced:
            restore(self._replaced.pop())
        if self.shared.applier.resizes:
            for module, name, _, whole in self.binding.attributes:
                setattr(module, name, whole)
            if self.binding.site.query_heads_per_kv:
                vars(self.binding.entry).pop(KV_INDEX, None)

    def _leave_out(self) -> None:
        """Compute neither the norm nor the block. Where a block is not one module, its linear layers do it."""
        binding = self.binding
        if binding.own_norm and binding.norm is not None:
            self._replaced.append(replace_forward(binding.norm, unchanged))
        if binding.activation is None:
            self._replaced.append(replace_forward(binding.entry, _added, self))

    def reopen(self, before: OpenCut | None) -> None:
        """Open the cut that was open before; None: compute with all units."""
        if before is None:
            self.suspend()
        else:
            self.open(before.kept, before.probe_mean, before.shares, before.stays)

    def close(self) -> None:
        """Compute with all units, leave nothing of the cut on the model, and free its memory."""
        self.suspend()
        self._suspended = None

    def copy_ahead(self, kept: Tensor, stays: bool) -> None:
        """Copy weights for a cut that will be opened with the same ``kept`` (k,) and ``stays``."""
        ahead, compensation = self.cut_to(kept, stays), self.state.compensation
        ahead.keep_copies()
        for linear, producer in self.binding.producers:
            ahead.producer(linear, producer)
        once = ahead.once and not compensation.compensator.uses_probe
        if once or not compensation.wanted:  # else the weight, or its bias, depends on the batch
            ahead.consumer()

    def forget_weights(self) -> None:
        """Compute and copy anew what was made of the weights."""
        self.state.forget_weights()
        for open_cut in (self.open_cut, self._suspended):
            if open_cut is not None:
                open_cut.forget_copies()

    def refresh(self) -> None:
        """Renew copies of weights that have changed since: compiled code does not check them."""
        if self.open_cut is not None and self.open_cut.once:
            if self.open_cut.absent:
                return
            for linear, producer in self.binding.producers:
                self.open_cut.producer(linear, producer)
            if not self.state.compensation.compensator.uses_probe:
                self.open_cut.consumer()

    def own_computed(self) -> None:
        """Copy the computed units: the next pass of a CUDA graph overwrites them."""
        if self.computed is not None:
            self.computed = self.computed.clone()

    def consumer_weights(self) -> Weights:
        """Weight (O, c) and bias (O,) that the consumer computes with."""
        linear = self.binding.consumer
        return (linear.weight, linear.bias) if self.open_cut is None else self.open_cut.consumer()

    def copies(self) -> Iterator[Tensor]:
        """Copies of weights that are kept now."""
        latest = self.open_cut or self._suspended
        return iter(()) if latest is None else latest.copies()


def _added(cut: SiteCut, /, *args: Any, **kwargs: Any) -> Any:
    """What the entry of an absent block returns."""
    site, open_cut = cut.site, cut.open_cut
    assert open_cut is not None  # it is absent
    states, others = split(cut.binding.entry, args, kwargs)
    added = open_cut.constant(states)
    if site.residual is not None:
        added = added + others[site.residual]
    returns = site.returns or (2 if site.kind == "attention" else 1)
    return added if returns == 1 else (added, *[None] * (returns - 1))
