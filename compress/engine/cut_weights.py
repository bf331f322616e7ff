"""The weights and biases that one site computes with while its cut is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...registry import ChannelHistory, MaskApplier, Producer, Rows, Selection, Site
from ...registry.tensors.devices import is_offloaded, unautocast
from ...registry.tensors.kernels import usable_on
from .compensation import SiteCompensation
from .gathering import Gatherer, Key
from .watching import Stages

Made = TypeVar("Made")

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class CutWeights:
    """Cuts a site's weights to its kept units, gives back what was dropped, and keeps what is of use for a while."""

    site: Site
    applier: MaskApplier
    gatherer: Gatherer
    compensation: SiteCompensation
    stages: Stages
    selects: bool
    """Whether the applier returns selections."""
    units: Tensor | None = None
    """(k,) int64 ascending: the units to compute with, since :meth:`of`."""
    stays: bool = False
    """Whether they serve several passes, so that what is gathered is not to be overwritten by other sites."""
    fixed: bool = False
    """Whether they were chosen once and for all."""
    prefetching: bool = False
    """Whether what is made now is for a cut that has not been opened yet."""
    probe_mean: Tensor | None = None
    """(C,) float32: the channels' mean in a probe of this batch, where compensation asks for it."""
    _of: Tensor | None = None
    _rows: dict[tuple[Rows, ...], Tensor] = field(default_factory=dict)
    _made: dict[tuple[nn.Module, str], tuple[tuple, Any]] = field(default_factory=dict)
    _mean_output: tuple[tuple, Tensor] | None = None

    def of(self, kept: Tensor, stays: bool, fixed: bool = False) -> None:
        """Compute with ``kept`` (k,) from now on; what was made for the same tensor is used again."""
        self.stays, self.fixed = stays, fixed
        if self._of is not kept:
            self._made.clear()
            self._rows.clear()
            # Where no unit is left unit 0 stands in, with a consumer weight of zero: no attention takes zero heads.
            self._of, self.units = kept, kept if len(kept) else kept.new_zeros(1)

    def with_mean(self, probe_mean: Tensor | None) -> None:
        """Give back the mean that this batch's probe (C,) has; None: the calibrated one."""
        if probe_mean is not self.probe_mean:
            self.probe_mean = probe_mean
            self._made = {key: made for key, made in self._made.items() if key[1] != "bias"}

    def release(self) -> None:
        """Let everything that was made go."""
        self._of = self.units = self.probe_mean = None
        self._made.clear()
        self._rows.clear()

    def gathered(self) -> Iterator[Tensor]:
        """What was made, as far as it is not the model's own."""
        for (linear, _), (_, made) in self._made.items():
            for tensor in made if isinstance(made, tuple) else (made,):
                if tensor is not None and tensor is not linear.weight and tensor is not linear.bias:
                    yield tensor

    @property
    def columns(self) -> Tensor:
        """Channels (c,) of the units."""
        return self.rows((Rows(0, self.site.unit_size),))

    def rows(self, segments: tuple[Rows, ...]) -> Tensor:
        """The units' rows (r,) of a producer that they own in ``segments``."""
        if segments not in self._rows:
            parts = [segment.of(self.units) for segment in segments]
            self._rows[segments] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._rows[segments]

    def producer(self, linear: nn.Linear, producer: Producer) -> tuple[Tensor, Tensor | None]:
        """Weight (r, D) and bias (r,) of a producer."""

        def gather() -> tuple[Tensor, Tensor | None]:
            with self.stages("gather"):
                weight, bias = self.applier.producer(linear.weight, linear.bias, self.rows(producer.segments))
                if isinstance(weight, Selection):
                    weight = self.gatherer.rows(linear, weight, self._memory(producer.path))
                return weight, bias.copied() if isinstance(bias, Selection) else bias

        return self._kept(linear, "weights", gather)

    def consumer(self, linear: nn.Linear, history: ChannelHistory) -> tuple[Tensor, Tensor | None]:
        """Weight (O, c) and bias (O,) of the consumer, what was dropped given back in both."""
        weight = self._kept(linear, "weight", lambda: self._consumer_weight(linear))
        if not self.compensation.wanted:
            return weight, linear.bias
        return weight, self._kept(linear, "bias", lambda: self._mean_keeping_bias(linear, weight, history))

    # Reading what is kept inside the product, without gathering it.

    def fuses(self, linear: nn.Linear, x: Tensor, columns: bool = False) -> bool:
        """Whether the layer can, and is to, read kept rows, or ``columns``, where they lie.

        Not where a copy serves several passes, nor across the grain: a row, or a column, must lie in one piece.
        """
        wanted = self.gatherer.runtime.fused_gather and self.selects and not self.stays
        if not wanted or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or not len(self._of):
            return False
        weight = linear.weight
        if is_offloaded(linear) or weight.stride(0 if columns else 1) != 1:
            return False
        return x.dtype == weight.dtype and x.dtype in FUSED_DTYPES and usable_on(weight)

    def fused_producer(self, linear: nn.Linear, producer: Producer, x: Tensor) -> Tensor:
        """A producer's kept rows of x (..., D) -> (..., r)."""
        from .fused_linear import linear_of_rows

        rows = self.rows(producer.segments)
        return linear_of_rows(
            x, linear.weight, rows, None if linear.bias is None else linear.bias.index_select(0, rows)
        )

    def fused_consumer(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """The consumer of x (..., c), nothing given back -> (..., O)."""
        from .fused_linear import linear_of_columns

        return linear_of_columns(x, linear.weight, self.columns, linear.bias)

    def _consumer_weight(self, linear: nn.Linear) -> Tensor:
        # What is kept beside a weight folded from it would only take room.
        folded = self.stays and self.compensation.has_slope
        with self.stages("gather"):
            weight = self.applier.consumer(linear.weight, self.columns)
            if isinstance(weight, Selection):
                memory = None if folded else self._memory(self.site.consumer)
                once = self.fixed or folded
                weight = self.gatherer.columns(linear, weight, memory, once)
        if not len(self._of):
            return torch.zeros_like(weight)
        if not self.compensation.has_slope:
            return weight
        with self.stages("compensate"):
            return self.compensation.weight(linear.weight, weight, self.columns)

    def _mean_keeping_bias(self, linear: nn.Linear, weight: Tensor, history: ChannelHistory) -> Tensor:
        """The consumer's bias with which its mean output is what it was before the cut, (O,)."""
        with self.stages("compensate"):
            compensation, calibrated = self.compensation, history.mean
            # Sequential calibration probes nothing; what it runs on is what the calibrated mean is of.
            unprobed = compensation.compensator.uses_probe and self.probe_mean is None
            mean = calibrated if unprobed else compensation.compensator.mean(calibrated, self.probe_mean)
            if compensation.compensator.uses_probe or differentiates(linear) or torch.compiler.is_compiling():
                return compensation.bias(linear, weight, self.columns, mean, linear.weight.float() @ mean)
            state = state_of(linear)
            if self._mean_output is None or self._mean_output[0] != state:
                self._mean_output = state, linear.weight.float() @ mean
            return compensation.bias(linear, weight, self.columns, mean, self._mean_output[1])

    def _memory(self, path: str) -> Key | None:
        """The memory that gathered weights share with all sites of this kind; None: what stays has its own."""
        if self.stays:
            self.gatherer.release(self.site.kind)  # nobody uses it meanwhile
            return None
        return self.site.kind, path.rpartition(".")[2]

    def _kept(self, linear: nn.Linear, what: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, kept where it serves several passes, while the units and the weights stay what they are.

        Not kept where gradients go through the gathering itself, nor copies of offloaded weights: they are to leave
        memory when the layer's forward ends, and so is the copy. A bias is small enough to stay.
        """
        if torch.compiler.is_compiling():  # a graph takes weights as they are; what was made once, it takes as well
            known = self._made.get((linear, what)) if self.fixed else None
            return make() if known is None else known[1]
        with unautocast(linear.weight):
            known = self._made.get((linear, what))
            if known is None and not (self.stays or self.prefetching):
                return make()
            if differentiates(linear) or (is_offloaded(linear) and what != "bias"):
                return make()
            state = state_of(linear)
            if known is None or known[0] != state:
                self._made[linear, what] = known = state, make()
            return known[1]


def selects(applier: MaskApplier) -> bool:
    """Whether an applier returns selections, which the engine may copy in its own way, or read in place."""
    weight, first = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    made = (*applier.producer(weight, weight[0], first), applier.consumer(weight, first))
    return all(isinstance(part, Selection) for part in made)


def differentiates(linear: nn.Linear) -> bool:
    """Whether gradients go through the layer's weight or bias, and so through what is made of them."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in linear.parameters(recurse=False))


def state_of(linear: nn.Linear) -> tuple:
    """Changes whenever the layer's weight or bias is replaced, moved, cast or written to.

    Offloaded weights are new tensors in every forward, read from a store that nothing writes to: they never change.
    """
    if is_offloaded(linear):
        return "offloaded", torch.is_inference_mode_enabled()
    tensors = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    # Tensors made in inference mode do not count their versions; what is gathered in it is only of use in it.
    versions = tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
    return versions, torch.is_inference_mode_enabled()
