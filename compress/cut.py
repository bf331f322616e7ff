"""One site's cut while a model runs: open with the kept units, closed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..registry import ChannelHistory, HistoryMerger, MaskApplier, Producer, Scorer, Site, Strategy
from ..registry.devices import device_of, is_offloaded, unautocast, weights_present
from .attention import KV_INDEX
from .compensation import SiteCompensation
from .stages import Stages

Made = TypeVar("Made")


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
    attributes: list[tuple[nn.Module, str, int]]
    """Modules, names and units' worth of the sizes that the block's forward reads."""
    history: ChannelHistory
    compensation: SiteCompensation
    stages: Stages
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
    probe_mean: Tensor | None = None
    """(C,) float32: the channels' mean in a probe of this batch, where compensation asks for it."""
    probing: bool = False
    residual: Tensor | None = None
    """Input of the site's norm, from the norm's call until the decision."""
    prepared: Any = None
    """What the scorer computed of the consumer's weight."""
    pending: tuple[Tensor, Tensor] | None = None
    """Columns (c,) and what history becomes there (T, c) once the batch has gone through."""
    _made: dict[tuple[nn.Module, str], tuple[tuple, Any]] = field(default_factory=dict)
    _made_of: Tensor | None = None
    _sizes: list[int] = field(default_factory=list)
    _prepared_of: tuple = ()
    _mean_output: tuple[tuple, Tensor] | None = None

    @classmethod
    def resolve(cls, site: Site, model: nn.Module, strategy: Strategy, stages: Stages) -> SiteCut:
        """Look up the site's modules in ``model`` and the components that serve it."""
        consumer = model.get_submodule(site.consumer)
        return cls(
            site=site,
            applier=strategy.applier.at(site),
            scorer=strategy.scorer.at(site),
            merger=strategy.merger.at(site) if strategy.merger else None,
            entry=model.get_submodule(site.entry),
            norm=model.get_submodule(site.norm),
            consumer=consumer,
            attributes=[(model.get_submodule(a.path), a.attribute, a.per_unit) for a in site.shape_attributes],
            history=ChannelHistory(site.channels, device_of(consumer)),
            compensation=SiteCompensation(site, strategy.compensate.at(site)),
            stages=stages,
            activation=model.get_submodule(site.activation) if site.activation else None,
            count=site.units,
        )

    @property
    def whole(self) -> bool:
        """Whether this site keeps everything, so that there is nothing to decide."""
        return self.count >= self.site.units

    def prepare(self) -> None:
        """The weights' part of the score, once for as long as the weights stay what they are."""
        state = _state_of(self.consumer)
        if self._prepared_of != state:
            with torch.no_grad(), weights_present(self.consumer):
                self.prepared, self._prepared_of = self.scorer.prepare(self.consumer.weight.detach().float()), state

    def open(self, kept: Tensor, probe_mean: Tensor | None = None) -> None:
        """Compute with ``kept`` (k,) int64 from now on; what was gathered for the same set is reused."""
        if probe_mean is not self.probe_mean:
            self._made.pop((self.consumer, "bias"), None)
        self.probe_mean = probe_mean
        if self.kept is kept:
            return
        self.rest()
        if self._made_of is not kept:
            self._made.clear()
        self.kept = self.computed = self._made_of = kept
        if not self.applier.resizes:
            return
        units = self._computed_units()
        self._sizes = [getattr(module, name) for module, name, _ in self.attributes]
        for module, name, per_unit in self.attributes:
            setattr(module, name, len(units) * per_unit)
        if self.site.query_heads_per_kv:
            setattr(self.entry, KV_INDEX, units // self.site.query_heads_per_kv)

    def close(self) -> None:
        """Compute with everything again; nothing of the cut is left on the model."""
        self.probe_mean = self._made_of = None
        self._made.clear()
        self.rest()

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

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes of this site's statistics and of the weights gathered for the kept units."""
        gathered = 0
        for (linear, _), (_, made) in self._made.items():
            tensors = made if isinstance(made, tuple) else (made,)
            own = (t for t in tensors if t is not None and t is not linear.weight and t is not linear.bias)
            gathered += sum(t.numel() * t.element_size() for t in own)
        return {"statistics": self.history.bytes + self.compensation.bytes, "gathered": gathered}

    def entering_consumer(self, x: Tensor) -> None:
        if self.observe is not None:
            self.observe(self, x)

    def producer_weights(self, linear: nn.Linear, producer: Producer) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that a producer computes with."""
        if self.kept is None:
            return linear.weight, linear.bias

        def gather() -> tuple[Tensor, Tensor | None]:
            with self.stages("gather"):
                return self.applier.producer(linear.weight, linear.bias, producer.rows(self._computed_units()))

        return self._kept_while_open(linear, "weights", gather)

    def consumer_weights(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the consumer computes with, what was dropped given back in both."""
        if self.kept is None:
            return linear.weight, linear.bias
        columns = self.site.columns(self._computed_units())

        def cut_weight() -> Tensor:
            with self.stages("gather"):
                weight = self.applier.consumer(linear.weight, columns)
            if not len(self.kept):
                return torch.zeros_like(weight)
            if not self.compensation.has_slope:
                return weight
            with self.stages("compensate"):
                return self.compensation.weight(linear.weight, weight, columns)

        weight = self._kept_while_open(linear, "weight", cut_weight)
        if not self.compensation.wanted:
            return weight, linear.bias
        return weight, self._kept_while_open(linear, "bias", lambda: self._mean_keeping_bias(linear, weight, columns))

    def _kept_while_open(self, linear: nn.Linear, what: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, kept while the cut is open and the weights stay what they are.

        Not kept where gradients go through the gathering itself, nor copies of offloaded weights: they are to leave
        memory when the layer's forward ends, and so is the copy. A bias is small enough to stay.
        """
        with unautocast(linear.weight):
            if _differentiates(linear) or (is_offloaded(linear) and what != "bias"):
                return make()
            state = _state_of(linear)
            known = self._made.get((linear, what))
            if known is None or known[0] != state:
                self._made[linear, what] = known = state, make()
            return known[1]

    def _computed_units(self) -> Tensor:
        """The kept units; where none is left unit 0 stands in, with a consumer weight of zero, because
        no attention implementation takes zero heads."""
        return self.kept if len(self.kept) else self.kept.new_zeros(1)

    def _mean_keeping_bias(self, linear: nn.Linear, weight: Tensor, columns: Tensor) -> Tensor:
        """The consumer's bias with which its mean output is what it was before the cut, (O,)."""
        with self.stages("compensate"):
            compensation, calibrated = self.compensation, self.history.mean
            # Sequential calibration probes nothing; what it runs on is what the calibrated mean is of.
            unprobed = compensation.compensator.uses_probe and self.probe_mean is None
            mean = calibrated if unprobed else compensation.compensator.mean(calibrated, self.probe_mean)
            if compensation.compensator.uses_probe or _differentiates(linear):
                return compensation.bias(linear, weight, columns, mean, linear.weight.float() @ mean)
            state = _state_of(linear)
            if self._mean_output is None or self._mean_output[0] != state:
                self._mean_output = state, linear.weight.float() @ mean
            return compensation.bias(linear, weight, columns, mean, self._mean_output[1])


def _differentiates(linear: nn.Linear) -> bool:
    """Whether gradients go through the layer's weight or bias, and so through what is made of them."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in linear.parameters(recurse=False))


def _state_of(linear: nn.Linear) -> tuple:
    """Changes whenever the layer's weight or bias is replaced, moved, cast or written to.

    Offloaded weights are new tensors in every forward, read from a store that nothing writes to: they never change.
    """
    if is_offloaded(linear):
        return "offloaded", torch.is_inference_mode_enabled()
    tensors = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    # Tensors made in inference mode do not count their versions; what is gathered in it is only of use in it.
    versions = tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
    return versions, torch.is_inference_mode_enabled()
