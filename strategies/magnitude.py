"""Magnitude pruning: the size of the consumer's weights alone, no calibration."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..registry import MaskApplier, Scorer, Site, SparsityAllocator, Statistic, Strategy, hookimpl
from .allocation import Uniform
from .application import Slice


class MagnitudeScorer(Scorer):
    """L2 norm of the channel's weights in the consumer."""

    statistic: ClassVar[Statistic | None] = None
    name: Literal["magnitude"] = "magnitude"

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        """``||W[:,c]||_2``; (O, C) -> (C,)."""
        return weight.norm(dim=0)

    def score(self, prepared: Tensor, statistic: Tensor | None) -> Tensor:
        return prepared


class Magnitude(Strategy):
    """Magnitude: drop the units whose output weights are smallest; needs no data."""

    paper: ClassVar[str] = "magnitude-sp in FLAP, AAAI 2024, arXiv 2312.11983"

    name: Literal["magnitude"] = "magnitude"
    scorer: Scorer = MagnitudeScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [MagnitudeScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Magnitude]
