"""The mean of the dropped channels, compensated by a bias: calibrated (FLAP), or corrected by a probe of the batch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...registry import Compensator, ProbeSelector
from ..pp.selectors import SpreadProbe


class Checked(Compensator):
    """A compensator of which every batch may use only a share."""

    check: bool = Field(
        default=False,
        description="use only shares of the mean and of the slope: those, 0 to 1, that fit a probe of the batch best",
    )
    selector: ProbeSelector = Field(default=SpreadProbe(), description="what to probe where the strategy has no probe")

    @property
    def uses_probe(self) -> bool:
        return self.check

    @property
    def checks_shares(self) -> bool:
        return self.check


class Mean(Checked):
    """The calibrated mean contribution of the dropped channels as a bias (FLAP's baseline bias compensation)."""

    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, baseline bias compensation"
    name: Literal["mean"] = "mean"


class ProbedMean(Checked):
    """A compensator whose mean is partly that of a probe of the batch."""

    probe: float = Field(
        default=0.0, ge=0, le=1, description="the probe's share in the mean; the rest is calibration's"
    )

    @property
    def uses_probe(self) -> bool:
        return self.check or self.probe > 0

    def mean(self, calibrated: Tensor, probe: Tensor | None) -> Tensor:
        return calibrated if probe is None or not self.probe else calibrated.lerp(probe, self.probe)


class ProbeMean(ProbedMean):
    """The mean contribution in this very batch, as far as a probe shows it, as a bias."""

    name: Literal["probe_mean"] = "probe_mean"
    probe: float = Field(
        default=0.5, gt=0, le=1, description="the probe's share in the mean; the rest is calibration's"
    )
