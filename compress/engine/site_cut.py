"""A site in three parts: where it lies in the model, what is known of it, and the cut that is open now.

What holds for one batch alone is in :mod:`.batch`. Letters: k kept units, c their channels, C all channels; r kept rows
of a producer, D hidden size, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import (
    ChannelHistory,
    GroupPart,
    MaskApplier,
    ModelError,
    Producer,
    Rows,
    Scorer,
    Selection,
    Site,
    SiteScores,
    Strategy,
)
from ...registry.tensors.devices import device_of, is_offloaded, unautocast, weights_present
from .absent import Replaced, restore, unchanged
from .absent import replace as replace_forward
from .batch import Running, split
from .choosing import Choice
from .compensation import SiteCompensation
from .gathering import Gatherer, selects
from .kv_index import KV_INDEX
from .runtime import Runtime, Stages
from .shapes import checked
from .weights import differentiates, made_of, weights_version

Weights = tuple[Tensor, "Tensor | None"]
"""Weight and bias."""


@dataclass(frozen=True, eq=False)
class SiteBinding:
    """Where a site lies in the model; it never changes."""

    site: Site
    entry: nn.Module
    norm: nn.Module
    consumer: nn.Linear
    producers: tuple[tuple[nn.Linear, Producer], ...]
    attributes: tuple[tuple[nn.Module, str, int, Any], ...]
    """The sizes that the block's forward reads: module, name, size of one unit, and of the whole site."""
    activation: nn.Module | None
    own_norm: bool
    """Whether the norm serves this site alone."""

    @classmethod
    def of(cls, site: Site, model: nn.Module, own_norm: bool = True) -> SiteBinding:
        """Look up the site's modules in ``model``."""
        find: Callable[[str], Any] = model.get_submodule
        return cls(
            site=site,
            entry=find(site.entry),
            norm=find(site.norm),
            consumer=find(site.consumer),
            producers=tuple((find(producer.path), producer) for producer in site.producers),
            attributes=tuple(
                (find(a.path), a.attribute, a.per_unit, getattr(find(a.path), a.attribute))
                for a in site.shape_attributes
            ),
            activation=find(site.activation) if site.activation else None,
            own_norm=own_norm,
        )

    @property
    def parameters(self) -> int:
        """Parameters of the whole block, its norm included."""
        norm = [self.norm] if self.own_norm else []
        modules = nn.ModuleList([*norm, self.entry, *(linear for linear, _ in self.producers), self.consumer])
        return sum(parameter.numel() for parameter in modules.parameters())

    def check_read(self, called: Set[nn.Module]) -> None:
        """Raise :class:`ModelError` if the block has computed without calling all of its linear layers."""
        linears = [*((linear, producer.path) for linear, producer in self.producers)]
        linears.append((self.consumer, self.site.consumer))
        unread = [path for linear, path in linears if linear not in called]
        if unread:
            forward = self.entry.forward
            name = getattr(forward, "__qualname__", type(forward).__name__)
            raise ModelError(
                f"{self.site.label}: {self.site.entry} computed without calling {', '.join(unread)}, so that a cut "
                f"there has no effect; its forward, {name}, may have been replaced (by fused kernels, say): undo that, "
                "load the model again, or leave the layer out (skip_layers)"
            )


class SiteState:
    """What is known of a site from calibration and earlier batches."""

    def __init__(self, binding: SiteBinding, strategy: Strategy):
        site = binding.site
        self.binding = binding
        self.statistic = strategy.scorer.statistic
        """What the history keeps of the activations; None for scores of the weights alone, or of gradients."""
        self.scores_producers = strategy.scorer.uses_producers
        """Whether the score depends on the producers' weights."""
        self.scores_gradients = strategy.scores_gradients
        self.gradients: tuple[GroupPart, ...] = ()
        """What the scorer made of the gradients of the site's matrices; empty before calibration, or if it reads
        none."""
        self.history = ChannelHistory(site.channels, device_of(binding.consumer))
        self.compensation = SiteCompensation(site, strategy.compensate)
        self.chooser = strategy.chooser
        """What orders the units jointly, if the strategy's scorer does."""
        self.choice: Choice | None = None
        """The order that it has found."""
        self.count = site.units
        """Units that the site keeps, the same in every batch."""
        self.whole = True
        """Whether it keeps everything, so that there is nothing to decide."""
        self.fixed: Tensor | None = None
        """(k,) int64 ascending: the kept units where they are decided once."""
        self.unscored = SiteScores(site)
        """What an allocator gets of the site where it has no scores."""
        self._prepared: tuple[tuple, Any] | None = None
        self._mean_output: tuple[tuple, Tensor] | None = None

    def keep(self, count: int) -> None:
        """Keep ``count`` units from now on."""
        self.count, self.whole = count, count >= self.binding.site.units

    @property
    def settled(self) -> bool:
        """Whether it keeps everything or nothing, so that no batch decides."""
        return self.whole or not self.count

    def fix(self, kept: Tensor | None) -> None:
        """Keep the units ``kept`` (k,) in every batch; None: they are decided per batch."""
        self.fixed = kept

    def describe_blocks(self, block: float, layer: float) -> None:
        """Give the allocator these statistics of the site's block and of its layer."""
        self.unscored = replace(self.unscored, block_statistic=block, layer_statistic=layer)

    def describe_weights(self, layer: float) -> None:
        """Give the allocator this statistic of the weights of the site's layer."""
        self.unscored = replace(self.unscored, weight_statistic=layer)

    def replace_history(self, history: ChannelHistory) -> None:
        """Replace the history."""
        self.history = history

    def restore(self, history: ChannelHistory, count: int, fixed: Tensor | None) -> None:
        """Use the results of an earlier calibration."""
        self.replace_history(history)
        self.keep(count)
        self.fix(fixed)

    def forget_weights(self) -> None:
        """Compute anew what was computed from the weights."""
        self._prepared = self._mean_output = None

    @property
    def has_scores(self) -> bool:
        """Whether there are scores before any batch: of the weights alone, of what calibration has shown, or of a
        chooser."""
        if self.chooser is not None:
            return self.choice is not None
        if self.scores_gradients:
            return bool(self.gradients)
        return self.statistic is None or self.history.positions > 0

    @property
    def calibrated(self) -> Any:
        """What calibration has shown, as the scorer reads it: the statistic (C,), reduced gradients, or None."""
        if self.scores_gradients:
            return self.gradients
        return None if self.statistic is None else self.history.summed()

    @property
    def bytes(self) -> int:
        """Bytes of the site's statistics, those of its compensation included."""
        return self.history.bytes + self.compensation.bytes

    def prepared(self, scorer: Scorer) -> Any:
        """The weights' part of the score, computed once for as long as the weights stay what they are."""
        known, linears = self._prepared, [self.binding.consumer]
        if known is not None and torch.compiler.is_compiling():
            return known[1]
        if self.scores_producers:
            linears += [linear for linear, _ in self.binding.producers]
        version = tuple(map(weights_version, linears))
        if known is None or known[0] != version:
            prepare: Any = scorer.prepare
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
                for linear in linears:
                    stack.enter_context(weights_present(linear))
                weight, *producers = [linear.weight.detach().float() for linear in linears]
                more = (producers,) if self.scores_producers else ()
                self._prepared = known = version, prepare(weight, self.binding.site, *more)
        return known[1]

    def mean_output(self, mean: Tensor) -> Tensor:
        """``W @ mean`` (O,) float32 for the calibrated mean (C,), computed once for as long as W stays what it is."""
        linear, known = self.binding.consumer, self._mean_output
        version = made_of(linear)
        if known is None or known[0] != version:
            self._mean_output = known = version, linear.weight.float() @ mean
        return known[1]


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
        known: dict[tuple[Rows, ...], Tensor] = {(Rows(0, site.unit_size),): self.columns}
        self.rows: dict[nn.Module, Tensor] = {}
        """(r,) int64 by producer: the units' rows."""
        for linear, producer in state.binding.producers:
            if producer.segments not in known:
                known[producer.segments] = producer.rows(kept)
            self.rows[linear] = known[producer.segments]
        self.fuses = shared.runtime.fused_gather and shared.selects and not stays
        """Whether kept rows and columns are read inside the matrix products, without copies."""
        self._copies: dict[tuple[nn.Module, str], tuple[tuple, Any]] = {}

    def forget_copies(self) -> None:
        """Copy weights anew when they are used next."""
        self._copies = {}

    def use_probe(self, mean: Tensor | None, shares: Tensor | None) -> None:
        """Compensate with the mean in this batch's probe (C,) and these shares (2,) of mean and slope.

        None: the calibrated mean, and the whole of both.
        """
        if mean is self.probe_mean and shares is self.shares:
            return
        outdated = {"bias"} if shares is self.shares or not self._has_slope else {"bias", "weight"}
        self.probe_mean, self.shares = mean, shares
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
            return self.state.compensation.best_shares(linear.weight, kept, added, states, real, mean)

    def keep_copies(self) -> None:
        """Keep copies from now on until the site is left."""
        self.keeps = True

    def producer(self, linear: nn.Linear, producer: Producer) -> Weights:
        """Weight (r, D) and bias (r,) of a producer."""
        shared = self.shared
        if self.keeps and (known := self._recall(linear, "producer")) is not None:
            return known
        with shared.stages.gather:
            weight, bias = shared.applier.producer(linear.weight, linear.bias, self.rows[linear])
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
        weight = self._recall(linear, "weight") if self.keeps else None
        if weight is None:
            weight = self._consumer_weight(linear)
            if self.keeps:
                self._store(linear, "weight", weight)
        return weight, self._bias(linear, weight)

    def constant(self, x: Tensor) -> Tensor:
        """What an absent block adds to the residual stream: nothing, or its mean output if that is compensated.

        x (..., D) is what the block reads -> (..., O), which may be one row for all tokens.
        """
        linear = self.state.binding.consumer
        if not self.state.compensation.wanted:
            return x.new_zeros(linear.out_features).expand(*x.shape[:-1], -1)
        added = self._recall(linear, "bias")
        if added is None:
            with torch.no_grad(), weights_present(linear):
                added = self._bias(linear, None)
        assert added is not None  # it is compensated
        return added.to(x).expand(*x.shape[:-1], -1)

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
            added = compensation.folded(linear.weight, self.columns)
            if compensation.compensator.checks_shares:  # read to find the shares, and to use them
                self._store(linear, "added", added)
        return added

    def _plain_weight(self, linear: nn.Linear) -> Tensor:
        """The kept columns of the weight (O, c), without compensation."""
        shared, compensation, site = self.shared, self.state.compensation, self.state.binding.site
        # Where a slope is added, the copy's layout is that of a weight which is kept.
        folded = self.stays and compensation.wanted and compensation.has_slope
        with shared.stages.gather:
            weight = shared.applier.consumer(linear.weight, self.columns)
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
                whole = linear.weight.float() @ target
            else:
                whole = state.mean_output(target)
            bias = whole if weight is None else state.compensation.bias(weight, self.columns, mean, whole)
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


class SiteCut:
    """A site of a pruned model: its binding, its state, and its cut while one is open."""

    def __init__(self, number: int, binding: SiteBinding, state: SiteState, shared: Shared):
        self.number, self.binding, self.state, self.shared = number, binding, state, shared
        self.open_cut: OpenCut | None = None
        self.computed: Tensor | None = None
        """The units of the last cut that was open, to be read after the pass that closed it."""
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
        """(k,) int64 ascending while the cut is open."""
        return None if self.open_cut is None else self.open_cut.kept

    # Opening and closing.

    def open(
        self, kept: Tensor, probe_mean: Tensor | None = None, shares: Tensor | None = None, stays: bool = False
    ) -> None:
        """Compute with ``kept`` (k,) int64 from now on; if the last cut had the same tensor, its copies are reused.

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
                self._leave_out()
            elif self.shared.applier.resizes:
                binding = self.binding
                for module, name, per_unit, _ in binding.attributes:
                    setattr(module, name, len(kept) * per_unit)
                if binding.site.query_heads_per_kv:
                    setattr(binding.entry, KV_INDEX, kept // binding.site.query_heads_per_kv)
        open_cut.use_probe(probe_mean, shares)

    def cut_to(self, kept: Tensor, stays: bool) -> OpenCut:
        """The cut to ``kept`` (k,) that is to be opened next."""
        if self._suspended is None or self._suspended.kept is not kept:
            if stays:
                self.shared.gatherer.release(self.binding.site.kind)  # unused until a cut that does not stay
            self._suspended = OpenCut(self.state, self.shared, kept, stays)
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
        if binding.own_norm:
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
    added = open_cut.constant(split(cut.binding.entry, args, kwargs)[0])
    returns = site.returns or (2 if site.kind == "attention" else 1)
    return added if returns == 1 else (added, *[None] * (returns - 1))
