"""What dropped channels contributed, given back through the weights and the bias of the rest."""

from __future__ import annotations

from ...registry import Compensator, NoCompensation, hookimpl
from .least_squares import LeastSquares
from .low_rank import LowRankLeastSquares
from .mean import Mean, ProbeMean


@hookimpl
def compensators() -> list[type[Compensator]]:
    return [NoCompensation, Mean, ProbeMean, LeastSquares, LowRankLeastSquares]
