"""The compensator's role: what the dropped channels contributed to the output is compensated by what stays.

Letters: C channels entering the consumer, O its outputs; k kept and d dropped channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..component import Component
from ..tensors.moments import ChannelMoments

Slope = tuple[Tensor, ...]
"""Matrices whose product (d, k) predicts the dropped channels from the kept ones; an empty tuple: no prediction.

Where dense outputs are fitted the product is (C, k): what it predicts of every channel, without the kept ones as they
are. Where the dense residual stream is, it is (C + O, k), the last rows being what it predicts of the lag.
"""
Prepared = Tensor | tuple[Tensor, ...]
"""What a compensator computes of a covariance, once per site."""


@dataclass(eq=False)
class SiteCovariance:
    """The covariance of the channels that enter one consumer, and what is known of the cuts to come."""

    matrix: Tensor
    """(C, C) float32, about the channels' means. A compensator may write to it: nothing else reads it."""
    tokens: int
    """Calibration tokens that it was computed from."""
    kept: Tensor | None
    """Channels (k,) int64 ascending that calibration alone keeps; None where there are no calibrated scores."""
    once: bool
    """Whether the cut is made once: exactly ``kept`` stays. Otherwise every batch keeps as many, but its own."""
    parts: Sequence[ChannelMoments] = ()
    """Moments of consecutive parts of the text, none of them empty, where ``covariance_parts`` asks for them."""
    weight: Tensor | None = None
    """(O, C): the consumer's weight, given with the parts."""
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    """(C,) float32: the channels' means; empty where they are not known."""
    cross: Tensor | None = None
    """(C, C) float32: the covariance of the dense model's channels (rows) with these (columns), where dense outputs are
    fitted. (C + O, C) where the dense residual stream is: the last rows are of the lag."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Numbers that a compensator adds for results; ``ridge``, a share of the mean variance, is also in the notes."""


class MemoryPlan(NamedTuple):
    """Bytes that a compensator or a chooser needs for one site, besides the covariance itself."""

    working: int
    """While the site is prepared and, where its cut is made once, solved."""
    held: int
    """Afterwards: the slope of a cut made once, or the prepared part where cuts are made per batch."""
    limit: int | None = None
    """The most that all sites together may take; None: what is free."""


class Compensator(Component):
    """Compensates, without training, what the dropped channels contributed to the consumer's output.

    The consumer computes with the weight ``W_kept + W_cut @ slope`` and the bias ``bias + W @ mean - (W_kept + W_cut @
    slope) @ mean[kept]``, so that its mean output stays what it was. A component defines ``mean`` and ``slope``, both
    float32. A cut made once is folded into the weights once; where cuts are made per batch, every batch's is.
    """

    needs_covariance: ClassVar[bool] = False
    """Whether calibration computes the channels' covariance, C x C numbers per site, for :meth:`prepare`."""

    @property
    def covariance_parts(self) -> int:
        """Parts of the calibration text whose covariances :meth:`prepare` gets too, to try slopes on; 1: none."""
        return 1

    @property
    def fits_dense_outputs(self) -> bool:
        """Whether the consumer's outputs in the dense model are fitted, not its dense weights on pruned inputs.

        Needs ``sequential``. Calibration then runs the dense model, too, and :meth:`prepare` gets ``cross``. The
        product of a slope is (C, k), and the weight is ``W_kept + W @ slope``.
        """
        return False

    @property
    def fits_dense_stream(self) -> bool:
        """Whether the residual stream of the dense model after the site is fitted: its outputs, and the lag.

        The lag (O) is the residual stream of the dense model before the site less that of the pruned one. Needs
        ``fits_dense_outputs``. Of ``cross`` and of the product of a slope the first C rows are as there, the last O
        rows are of the lag: the weight is ``W_kept + W @ slope[:C] + slope[C:]``.
        """
        return False

    @property
    def uses_probe(self) -> bool:
        """Whether a probe of every batch is read: by :meth:`mean`, or to check mean and slope.

        A component that does has the options ``selector``, the probe where the strategy has none, and ``probe``, the
        probe's share in the mean, or ``check``. With ``probe`` at 0 and ``check`` false no probe is used, which is how
        cuts are frozen.
        """
        return False

    @property
    def checks_shares(self) -> bool:
        """Whether only shares of mean and slope are used: those, 0 to 1, that fit the probe of the batch best."""
        return False

    def mean(self, calibrated: Tensor, probe: Tensor | None) -> Tensor:
        """The channels' means to compensate with; calibrated (C,), the probe's (C,) if it is used -> (C,)."""
        return calibrated

    def prepare(self, covariance: SiteCovariance) -> Prepared | None:
        """What :meth:`slope` reads, once per site; None: no slope, the mean alone is compensated.

        Raises ``torch.linalg.LinAlgError`` for a covariance that cannot be solved; the run then names the site.
        """
        return covariance.matrix

    def slope(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        """The slope of one cut; kept (k,) and dropped (d,) int64 ascending, neither empty -> matrices of (d, k).

        Leaves ``prepared`` unchanged. Raises what :meth:`prepare` does.
        """
        return ()

    def memory_plan(self, channels: int, dropped: int, per_batch: bool) -> MemoryPlan:
        """Bytes for a site with so many channels, of which ``dropped`` go, cut once or per batch."""
        return MemoryPlan(0, 4 * channels * channels if per_batch else 4 * dropped * (channels - dropped))


class NoCompensation(Compensator):
    """Compensates nothing: what is dropped is gone."""

    name: Literal["none"] = "none"
