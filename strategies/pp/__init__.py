"""Probe Pruning (Le et al., ICLR 2025, arXiv 2502.15618) and its upper bound, full-batch probing."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ...registry import HistoryMerger, MaskApplier, ProbeSelector, Scorer, SparsityAllocator, Strategy, hookimpl
from ..allocation import Uniform
from ..application import Slice
from .mergers import FixedRatio, HistoryOnly, ImportanceScaled, ProbeOnly
from .scorer import PPsp
from .selectors import HiddenNorm, RandomProbe, ResidualNorm, SpreadProbe, WholeBatch


class ProbePruning(Strategy):
    """Probe Pruning without a name: the base of strategies that change some of its parts."""

    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618"

    scorer: Scorer = PPsp()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()
    selector: ProbeSelector | None = Field(default=ResidualNorm(), description="which part of a batch to probe")
    merger: HistoryMerger | None = Field(default=ImportanceScaled(), description="how the probe and history are merged")


class PP(ProbePruning):
    """Probe Pruning: probe a few crucial hidden states of every batch, then drop the weakest units."""

    name: Literal["pp"] = "pp"


class FullBatchProbing(ProbePruning):
    """Full-batch probing: PP that probes every row and position; the paper's upper bound, at twice the cost."""

    name: Literal["full_batch_probing"] = "full_batch_probing"
    selector: ProbeSelector | None = Field(default=WholeBatch(), description="which part of a batch to probe")


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [PP, FullBatchProbing]


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [PPsp]


@hookimpl
def probe_selectors() -> list[type[ProbeSelector]]:
    return [ResidualNorm, HiddenNorm, RandomProbe, SpreadProbe, WholeBatch]


@hookimpl
def history_mergers() -> list[type[HistoryMerger]]:
    return [ImportanceScaled, FixedRatio, ProbeOnly, HistoryOnly]
