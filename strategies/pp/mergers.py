"""How the probe's statistic is merged with history, and how history is updated (PP)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import HistoryMerger, Site


class MovingAverage(HistoryMerger):
    """History as an exponential moving average of the statistics of whole batches."""

    momentum: float = Field(default=0.99, ge=0, le=1, description="weight of the old history; 1 freezes it")

    def update(self, history: Tensor, observed: Tensor) -> Tensor:
        return torch.lerp(observed, history, self.momentum)

    @property
    def updates(self) -> bool:
        return self.momentum < 1


class ImportanceScaled(MovingAverage):
    """Each entry weighted by its own size: ``r = P/(P+H)``, ``r*P + (1-r)*H`` (PP)."""

    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618, importance-scaled fusion"
    name: Literal["importance_scaled"] = "importance_scaled"

    def merge(self, probe: Tensor, history: Tensor, site: Site) -> Tensor:
        return torch.lerp(history, probe, probe / (probe + history + 1e-6))


class FixedRatio(MovingAverage):
    """A fixed share of probe and history."""

    name: Literal["fixed_ratio"] = "fixed_ratio"
    probe: float = Field(default=0.5, ge=0, le=1, description="the probe's share")

    def merge(self, probe: Tensor, history: Tensor, site: Site) -> Tensor:
        return torch.lerp(history, probe, self.probe)


class ProbeOnly(HistoryMerger):
    """The probe alone, without history (needs no calibration)."""

    uses_history: ClassVar[bool] = False
    name: Literal["probe_only"] = "probe_only"

    def merge(self, probe: Tensor, history: Tensor | None, site: Site) -> Tensor:
        return probe


class HistoryOnly(MovingAverage):
    """History alone: the statistic of the batches before, without a probe."""

    uses_probe: ClassVar[bool] = False
    name: Literal["history_only"] = "history_only"

    def merge(self, probe: Tensor | None, history: Tensor, site: Site) -> Tensor:
        return history
