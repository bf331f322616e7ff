"""Compensation: what dropped channels contributed is added to the weights and the bias of the rest."""

from __future__ import annotations

from ...registry import Compensator, NoCompensation, hookimpl
from .least_squares import LeastSquares
from .low_rank import LowRankLeastSquares
from .mean import Mean, ProbedMean, ProbeMean

__all__ = ["LeastSquares", "LowRankLeastSquares", "Mean", "ProbeMean", "ProbedMean", "compensators"]


@hookimpl
def compensators() -> list[type[Compensator]]:
    return [NoCompensation, Mean, ProbeMean, LeastSquares, LowRankLeastSquares]
