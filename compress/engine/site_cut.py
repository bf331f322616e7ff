"""One site's cut while a model runs: open with the kept units, closed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...registry import ChannelHistory, HistoryMerger, MaskApplier, Producer, Scorer, Site, Strategy
from ...registry.tensors.devices import device_of, weights_present
from .compensation import SiteCompensation
from .cut_weights import CutWeights, selects, state_of
from .gathering import Gatherer
from .kv_index import KV_INDEX
from .probe_reuse import Probed
from .watching import Stages

if TYPE_CHECKING:
    from .records import Decision


@dataclass(eq=False)
class SiteCut:
    """A site with everything that changes: its history, its kept units, the weights cut to them."""

    site: Site
    applier: MaskApplier
    scorer: Scorer
    merger: HistoryMerger | None
    entry: nn.Module
    norm: nn.Module
    consumer: nn.Module
    producers: list[tuple[nn.Module, Producer]]
    attributes: list[tuple[nn.Module, str, int]]
    """Modules, names and units' worth of the sizes that the block's forward reads."""
    history: ChannelHistory
    compensation: SiteCompensation
    weights: CutWeights
    activation: nn.Module | Callable[[Tensor], Tensor] | None = None
    observe: Callable[[SiteCut, Tensor], None] | None = None
    """Sees what enters the consumer, (B, T, c) or (B*T, c)."""
    wants_mean: bool = False
    """Whether calibration tracks the mean even where nothing of this strategy reads it."""
    count: int = 0
    """Units this site keeps; constant over batches."""
    fixed: Tensor | None = None
    """The kept units of a strategy that decides once."""
    kept: Tensor | None = None
    """(k,) int64 ascending while the cut is open."""
    computed: Tensor | None = None
    """The units of the last cut that was open; a forward pass that closes it leaves them here to be read."""
    probing: bool = False
    probed: Probed | None = None
    """What producers made of this batch's probe, from the probe until the batch has gone through the site."""
    decided_ahead: Decision | None = None
    """What was decided for this batch before it came to the site."""
    residual: Tensor | None = None
    """Input of the site's norm, from the norm's call until the decision."""
    prepared: Any = None
    """What the scorer computed of the consumer's weight."""
    pending: tuple[Tensor, Tensor] | None = None
    """Columns (c,) and what history becomes there (T, c) once the batch has gone through."""
    _sizes: list[int] = field(default_factory=list)
    _prepared_of: tuple = ()

    @classmethod
    def resolve(cls, site: Site, model: nn.Module, strategy: Strategy, stages: Stages, gatherer: Gatherer) -> SiteCut:
        """Look up the site's modules in ``model`` and the components that serve it."""
        consumer = model.get_submodule(site.consumer)
        applier, compensation = strategy.applier, SiteCompensation(site, strategy.compensate)
        return cls(
            site=site,
            applier=applier,
            scorer=strategy.scorer,
            merger=strategy.merger,
            entry=model.get_submodule(site.entry),
            norm=model.get_submodule(site.norm),
            consumer=consumer,
            producers=[(model.get_submodule(producer.path), producer) for producer in site.producers],
            attributes=[(model.get_submodule(a.path), a.attribute, a.per_unit) for a in site.shape_attributes],
            history=ChannelHistory(site.channels, device_of(consumer)),
            compensation=compensation,
            weights=CutWeights(site, applier, gatherer, compensation, stages, selects(applier)),
            activation=model.get_submodule(site.activation) if site.activation else None,
            count=site.units,
        )

    @property
    def whole(self) -> bool:
        """Whether this site keeps everything, so that there is nothing to decide."""
        return self.count >= self.site.units

    @property
    def statistics_bytes(self) -> int:
        """Bytes of this site's statistics, what compensation learnt included."""
        return self.history.bytes + self.compensation.bytes

    def prepare(self) -> None:
        """The weights' part of the score, once for as long as the weights stay what they are."""
        if torch.compiler.is_compiling() and self._prepared_of:
            return
        state = state_of(self.consumer)
        if self._prepared_of != state:
            with torch.no_grad(), weights_present(self.consumer):
                weight = self.consumer.weight.detach().float()
                self.prepared, self._prepared_of = self.scorer.prepare(weight, self.site), state

    def open(self, kept: Tensor, probe_mean: Tensor | None = None, stays: bool = False) -> None:
        """Compute with ``kept`` (k,) int64 from now on; what was gathered for the same set is reused.

        ``stays`` says that other sites are going to be cut before this one is done with.
        """
        self.weights.with_mean(probe_mean)
        if self.kept is kept:
            return
        self.rest()
        self.weights.of(kept, stays, self.fixed is not None)
        self.kept = self.computed = kept
        if not self.applier.resizes:
            return
        units = self.weights.units
        self._sizes = [getattr(module, name) for module, name, _ in self.attributes]
        for module, name, per_unit in self.attributes:
            setattr(module, name, len(units) * per_unit)
        if self.site.query_heads_per_kv:
            setattr(self.entry, KV_INDEX, units // self.site.query_heads_per_kv)

    def prefetch(self, kept: Tensor, stays: bool) -> None:
        """Gather for a cut that is going to be opened with the same ``kept`` (k,) and ``stays``."""
        self.weights.of(kept, stays, self.fixed is not None)
        self.weights.prefetching = True
        try:
            for linear, producer in self.producers:
                self.weights.producer(linear, producer)
            once = self.fixed is not None and not self.compensation.compensator.uses_probe
            if once or not self.compensation.wanted:  # else the batch has a say in it
                self.weights.consumer(self.consumer, self.history)
        finally:
            self.weights.prefetching = False

    def refresh(self) -> None:
        """Make anew what is kept of weights that have changed since: compiled code takes it as it finds it."""
        if self.fixed is not None:
            self.prefetch(self.fixed, stays=True)
        elif self.merger is not None and not self.whole:
            self.prepare()

    def close(self) -> None:
        """Compute with everything again; nothing of the cut is left on the model, and its own memory is given back."""
        self.rest()
        self.weights.release()
        self.probed = None

    def rest(self) -> None:
        """Compute with everything for a while: what was gathered waits for the same set to be opened again."""
        if self.kept is None:
            return
        self.kept = None
        for (module, name, _), size in zip(self.attributes, self._sizes, strict=bool(self._sizes)):
            setattr(module, name, size)
        self._sizes = []
        if hasattr(self.entry, KV_INDEX):
            delattr(self.entry, KV_INDEX)

    # What the site's linear layers compute.

    def produce(self, linear: nn.Linear, producer: Producer, x: Tensor) -> Tensor:
        """What a producer makes of x (..., D): all rows in a probe, else the kept ones, (..., r)."""
        if self.probing or self.kept is None:
            made = functional.linear(x, linear.weight, linear.bias)
            if self.probing and self.probed is not None:
                self.probed.outputs[linear] = made
            return made
        if self.weights.fuses(linear, x):
            return self.weights.fused_producer(linear, producer, x)
        weight, bias = self.weights.producer(linear, producer)
        if self.probed is not None and self.probed.covers(linear, x):
            made = self.probed.linear(linear, weight, bias, self.weights.rows(producer.segments))
            return made.view(*x.shape[:-1], weight.shape[0])
        return functional.linear(x, weight, bias)

    def consume(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """What the consumer makes of x (..., c): itself in a probe, else (..., O)."""
        if self.probing:
            return x  # the block's own forward then returns what enters the consumer
        if self.observe is not None:
            self.observe(self, x)
        if self.kept is not None and not self.compensation.wanted and self.weights.fuses(linear, x, columns=True):
            return self.weights.fused_consumer(linear, x)
        return functional.linear(x, *self.consumer_weights(linear))

    def consumer_weights(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight (O, c) and bias (O,) that the consumer computes with."""
        return (linear.weight, linear.bias) if self.kept is None else self.weights.consumer(linear, self.history)
