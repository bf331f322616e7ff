"""Whole experts go: those that add least to their tokens (REAP), or those that the router chooses least often."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..registry import (
    ExpertStatistic,
    ExpertUnit,
    MaskApplier,
    Scorer,
    SparsityAllocator,
    Statistic,
    Strategy,
    hookimpl,
)
from .allocation import Uniform
from .application import Slice


class WeightedNorm(ExpertStatistic):
    """The router's weight times the L2 norm of the expert's output, mean over the tokens that reach it."""

    name: Literal["weighted_norm"] = "weighted_norm"

    def value(self, weights: Tensor, norms: Tensor) -> Tensor:
        return weights * norms


class Frequency(ExpertStatistic):
    """The share of the tokens that reach the expert."""

    over_all: ClassVar[bool] = True
    name: Literal["frequency"] = "frequency"

    def value(self, weights: Tensor, norms: Tensor) -> Tensor:
        return (weights != 0).float()


class ExpertScorer(Scorer):
    """Scores experts by their statistic alone."""

    def score(self, prepared: None, statistic: Any) -> Tensor:
        return statistic


class ReapScorer(ExpertScorer):
    """Mean of the router's weight times the norm of the expert's output, over the tokens that reach the expert."""

    paper: ClassVar[str] = "REAP the Experts (Lasby et al., 2025), arXiv 2510.13999"
    statistic: ClassVar[Statistic | None] = WeightedNorm()
    name: Literal["reap"] = "reap"


class ExpertFrequencyScorer(ExpertScorer):
    """How often the router chooses the expert."""

    statistic: ClassVar[Statistic | None] = Frequency()
    name: Literal["expert_frequency"] = "expert_frequency"


class Reap(Strategy):
    """REAP: whole experts that add least to the tokens that reach them go, with their rows of the router."""

    paper: ClassVar[str] = "REAP the Experts (Lasby et al., 2025), arXiv 2510.13999"

    name: Literal["reap"] = "reap"
    experts: ExpertUnit = Field(default="whole", description=Strategy.model_fields["experts"].description)
    scorer: Scorer = ReapScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


class ExpertFrequency(Strategy):
    """Expert frequency: whole experts that the router chooses least often go, with their rows of the router."""

    paper: ClassVar[str] = "a baseline of REAP the Experts (Lasby et al., 2025), arXiv 2510.13999"

    name: Literal["expert_frequency"] = "expert_frequency"
    experts: ExpertUnit = Field(default="whole", description=Strategy.model_fields["experts"].description)
    scorer: Scorer = ExpertFrequencyScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [ReapScorer, ExpertFrequencyScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Reap, ExpertFrequency]
