"""The mean of what was dropped, given back as a bias: calibrated (FLAP), or corrected by what a probe shows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...registry import Compensator, ProbeSelector
from ..pp.selectors import SpreadProbe


class Mean(Compensator):
    """The calibrated mean contribution of the dropped channels as a bias (FLAP's baseline bias compensation)."""

    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, baseline bias compensation"
    name: Literal["mean"] = "mean"


class ProbedMean(Compensator):
    """A compensator whose mean is partly what a probe of the batch shows."""

    probe: float = Field(
        default=0.0, ge=0, le=1, description="the probe's share in the mean; the rest is calibration's"
    )

    selector: ProbeSelector = Field(
        default=SpreadProbe(), description="what to probe where the strategy probes nothing"
    )

    @property
    def probes_with(self) -> ProbeSelector | None:
        return self.selector

    @property
    def uses_probe(self) -> bool:
        return self.probe > 0

    def unprobed(self) -> Compensator:
        return self.model_copy(update={"probe": 0.0})

    def mean(self, calibrated: Tensor, probe: Tensor | None) -> Tensor:
        return calibrated.lerp(probe, self.probe) if self.uses_probe else calibrated


class ProbeMean(ProbedMean):
    """The mean contribution in this very batch, as far as a probe shows it, as a bias."""

    name: Literal["probe_mean"] = "probe_mean"
    probe: float = Field(
        default=0.5, gt=0, le=1, description="the probe's share in the mean; the rest is calibration's"
    )

    def unprobed(self) -> Compensator:
        return Mean()
