"""GISP: heads and channels of all layers in one ranking by weight times gradient, cut in many small steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import (
    GradientScorer,
    GroupPart,
    MaskApplier,
    MatrixGradient,
    Scorer,
    Site,
    SparsityAllocator,
    Strategy,
    hookimpl,
)
from .application import Slice
from .global_ranking import GlobalRanking

PAPER = "From Local to Global: Revisiting Structured Pruning Paradigms for LLMs (GISP), ACL 2026, arXiv 2510.18030"


class GispScorer(GradientScorer):
    """The mean of |weight times gradient| over all weights of a unit (GISP), so that heads and channels compare."""

    paper: ClassVar[str] = PAPER

    name: Literal["gisp"] = "gisp"
    size: Literal["weights", "as_shipped"] = Field(
        default="weights",
        description="what a unit's sum is divided by: its number of weights; as_shipped, as the published code does: "
        "4 x head size x hidden size, and 3 x MLP width (instead of hidden size), which cuts more of the MLPs",
    )

    def reduce(self, matrix: MatrixGradient) -> Tensor:
        return (matrix.weight * matrix.gradient).abs_().sum(1)

    def combine(self, parts: Sequence[GroupPart], site: Site) -> Tensor:
        sums = torch.stack([part.values.sum(1) for part in parts]).sum(0)
        if self.size == "weights":
            return sums / sum(part.entries for part in parts)
        return sums / (3 * site.units if site.kind == "mlp" else 4 * site.unit_size * site.outputs)


class Gisp(Strategy):
    """GISP: all heads and channels in one ranking by |weight times gradient|, cut in steps.

    Every step computes new scores by a backward pass of the whole text through the model as cut so far. The paper takes
    112 steps for 7B models and 280 for 13B; attention_unit: query_head cuts what its code cuts. With another scorer,
    its score is used in steps.
    """

    paper: ClassVar[str] = PAPER

    name: Literal["gisp"] = "gisp"
    steps: int = Field(default=16, ge=1, description="steps in which the ratio is reached, all equally large")
    scorer: Scorer = GispScorer()
    allocator: SparsityAllocator = GlobalRanking()
    applier: MaskApplier = Slice()

    def schedule(self, ratio: float) -> Sequence[float]:
        return [ratio * step / self.steps for step in range(1, self.steps)] + [ratio] if ratio else [ratio]


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [GispScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Gisp]
