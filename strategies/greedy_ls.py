"""Greedy allocation with least squares: as a cut made once, and with Probe Pruning's choice per batch."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..registry import Compensator, MaskApplier, Scorer, SparsityAllocator, Strategy, hookimpl
from .application import Slice
from .compensation.least_squares import LeastSquares
from .greedy import Greedy
from .pp import ProbePruning
from .pp.scorer import PPsp


class GreedyLeastSquares(Strategy):
    """PP's score once; the counts of every site by measured steps; kept channels absorb the dropped by least squares.

    Nothing is computed per batch. Calibrate it on text like that of its use, or on several kinds of text
    (docs/results/real-model).
    """

    paper: ClassVar[str] = "PPsp (PP, ICLR 2025); greedy steps; least-squares reconstruction (He et al., ICCV 2017)"

    name: Literal["greedy_ls"] = "greedy_ls"
    scorer: Scorer = PPsp()
    allocator: SparsityAllocator = Greedy()
    applier: MaskApplier = Slice()
    compensate: Compensator = LeastSquares()


class PPGreedyLeastSquares(ProbePruning):
    """Probe Pruning; the counts of every site by measured steps; least squares, as far as the probe confirms it.

    The probe that chooses the units also says which share of the compensation serves this batch.
    """

    paper: ClassVar[str] = "PP, ICLR 2025; greedy steps; least-squares reconstruction (He et al., ICCV 2017)"

    name: Literal["pp_greedy_ls"] = "pp_greedy_ls"
    allocator: SparsityAllocator = Greedy()
    compensate: Compensator = LeastSquares(check=True)


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [GreedyLeastSquares, PPGreedyLeastSquares]
