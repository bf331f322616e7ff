"""The compensator's role: what the dropped channels contributed is given back through what stays.

Letters: C channels entering the consumer, O its outputs; k kept and d dropped channels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

from ..component import Component
from ..errors import SpecError
from .parts import ProbeSelector

Slope = tuple[Tensor, ...]
"""Matrices whose product (d, k) predicts the dropped channels from the kept ones; none of them: no slope."""


class Compensator(Component):
    """Gives back, without training, what the dropped channels contributed to the consumer's output.

    The consumer computes with ``W_kept + W_cut @ slope``, and with a bias that keeps its mean output what it was
    before the cut: ``bias + W @ mean - (W_kept + W_cut @ slope) @ mean[kept]``. A component says what ``slope`` and
    ``mean`` are; both are float32. A cut made once is folded into the weights once, and a batch then costs no
    more than the bias; where cuts are made per batch, so is this.
    """

    keeps_mean: ClassVar[bool] = True
    """Whether there is anything to give back at all."""
    needs_covariance: ClassVar[bool] = False
    """Whether calibration has to gather the channels' covariance: C x C numbers for every site."""

    @property
    def uses_probe(self) -> bool:
        """Whether :meth:`mean` looks at a probe of every batch; where cuts are made once there is then one too."""
        return False

    @property
    def probes_with(self) -> ProbeSelector | None:
        """What to probe by where the strategy itself probes nothing."""
        return None

    @property
    def memory(self) -> int | None:
        """Bytes that covariances and solving may take; None: what is free."""
        return None

    @property
    def falls_back(self) -> bool:
        """Whether a site whose covariance cannot be solved gets the mean alone, and a note, instead of an error."""
        return False

    @property
    def ridge_share(self) -> float | None:
        """What is added to every variance before solving, as a share of their mean, for notes; None: nothing known."""
        return None

    def unprobed(self) -> Compensator:
        """The component that does the same without looking at batches, for a cut that is made once and exported.

        Raises :class:`SpecError` where there is none.
        """
        if self.uses_probe:
            raise SpecError(
                f"compensator {self.name} looks at a probe of every batch, and a model that is cut once and for all "
                "probes nothing; use compensate: mean, or export the strategy as it is (--profile dynamic)"
            )
        return self

    def fitted(self, covariance: Tensor, tokens: int) -> Self:
        """The component to use with a covariance (C, C) of so many tokens: itself, unless options depend on it."""
        return self

    def mean(self, calibrated: Tensor, probe: Tensor | None) -> Tensor:
        """The mean to reckon with for this batch; calibrated (C,), the probe's (C,) where it is used -> (C,)."""
        return calibrated

    def solve(self, covariance: Tensor, kept: Tensor, dropped: Tensor) -> Slope:
        """The slope for a cut that is made once; covariance (C, C), kept (k,) and dropped (d,) int64 ascending.

        ``k`` and ``d`` are at least 1. May write to the covariance, which nothing needs afterwards. Raises
        ``torch.linalg.LinAlgError`` where it cannot be solved; the run then names the site.
        """
        return ()

    def prepare(self, covariance: Tensor, usual: Tensor | None) -> Any:
        """What :meth:`slope` needs of a site's covariance (C, C), where cuts are made per batch.

        ``usual`` (k,) are the channels that calibration alone would keep, where the strategy can tell. May write to
        the covariance, and raises what :meth:`solve` does.
        """
        return covariance

    def slope(self, prepared: Any, kept: Tensor, dropped: Tensor) -> Slope:
        """The slope for this batch's cut, from what was prepared and stays as it is; see :meth:`solve`."""
        return ()

    def prepared_from(self, tensors: tuple[Tensor, ...]) -> Any:
        """What :meth:`prepare` gave, a tensor or a tuple of tensors, from the tensors of an exported folder."""
        return tensors[0] if len(tensors) == 1 else tensors

    def working_bytes(self, channels: int, dropped: int, per_batch: bool = False) -> int:
        """Bytes that solving one site, or preparing it where cuts are made per batch, takes besides its covariance."""
        return 0

    def held_bytes(self, channels: int) -> int:
        """Bytes that a site's prepared part takes for as long as cuts are made per batch."""
        return 4 * channels * channels


class NoCompensation(Compensator):
    """Gives nothing back: what is dropped is gone."""

    keeps_mean: ClassVar[bool] = False
    name: Literal["none"] = "none"
