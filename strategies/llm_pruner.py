"""LLM-Pruner: units by the first or second order of the loss, over all matrices of their group (Ma et al., 2023)."""

from __future__ import annotations

import math
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
from .allocation import Uniform
from .application import Slice

PAPER = "LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023, arXiv 2305.11627"


class TaylorScorer(GradientScorer):
    """The change of the loss without a unit, estimated by gradients at all matrices of its group (LLM-Pruner).

    With W a matrix, G its gradient and F the mean squared gradient over the sequences, a row counts sum |W G| (first
    order), |sum W G| (vector), sum |W^2 F| (second order), or sum |W G - W^2 F / 2| (mixed).
    """

    paper: ClassVar[str] = PAPER

    name: Literal["llm_pruner"] = "llm_pruner"
    importance: Literal["first_order", "vector", "second_order", "mixed"] = Field(
        default="first_order",
        description="first_order (in the published code param_first), vector (vectorize), second_order (param_second), "
        "mixed (param_mix); the last two take one backward pass for each sequence",
    )
    group: Literal["sum", "mean", "max", "product", "first"] = Field(
        default="sum", description="how the matrices of a group are combined; first takes query and gate (fc1) alone"
    )

    @property
    def needs_squares(self) -> bool:
        return self.importance in ("second_order", "mixed")

    @property
    def additive(self) -> bool:
        return self.importance in ("vector", "second_order")

    def reduce(self, matrix: MatrixGradient) -> Tensor:
        if self.importance == "first_order":
            return (matrix.weight * matrix.gradient).abs_().sum(1)
        if self.importance == "vector":
            return (matrix.weight * matrix.gradient).sum(1)
        assert matrix.squares is not None
        second = matrix.weight.square().mul_(matrix.squares)
        if self.importance == "second_order":
            return second.sum(1)
        return torch.addcmul(second.div_(-2), matrix.weight, matrix.gradient).abs_().sum(1)

    def combine(self, parts: Sequence[GroupPart], site: Site) -> Tensor:
        rows = math.gcd(*(part.values.shape[1] for part in parts))
        # Where a part has several heads for each of another one, their rows are added.
        by_row = torch.stack([part.values.abs().view(site.units, -1, rows).sum(1) for part in parts])
        if self.group == "first":
            return by_row[0].sum(1)
        if self.group == "max":
            return by_row.amax(0).sum(1)
        if self.group == "product":
            return by_row.prod(0).sum(1)
        return (by_row.mean(0) if self.group == "mean" else by_row.sum(0)).sum(1)


class LlmPruner(Strategy):
    """LLM-Pruner: drop the units whose loss, to first order, the model feels least; the same share in every layer.

    The published runs take 10 sequences of 64 tokens in one batch, and leave the first four and the last two of 32
    layers whole (skip_layers). For its global form set allocator: global_ranking.
    """

    paper: ClassVar[str] = PAPER

    name: Literal["llm_pruner"] = "llm_pruner"
    scorer: Scorer = TaylorScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [TaylorScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [LlmPruner]
