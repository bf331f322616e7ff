"""FLAP: fluctuation-based adaptive structured pruning (An et al., AAAI 2024, arXiv 2312.11983)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ...registry import Compensator, MaskApplier, Scorer, SparsityAllocator, Strategy, hookimpl
from ..application import Slice
from ..compensation.mean import Mean
from .adaptive import GlobalAdaptive
from .scorer import FluctuationScorer


class Flap(Strategy):
    """FLAP: keep fluctuating channels, by one threshold for all layers, and add the mean of the others as a bias."""

    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983"

    name: Literal["flap"] = "flap"
    scorer: Scorer = FluctuationScorer(square_attention=True)
    allocator: SparsityAllocator = GlobalAdaptive()
    applier: MaskApplier = Slice()
    compensate: Compensator = Mean()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [FluctuationScorer]


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [GlobalAdaptive]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Flap]
