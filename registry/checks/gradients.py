"""The checks of scorers that read gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..roles.gradients import GradientScorer, MatrixGradient
from .parts import alike, both_kinds, expect, expect_tensor, expect_unchanged, tensors_in
from .scorers import some_matrices


def check_reduction(scorer: GradientScorer) -> None:
    """A matrix is reduced to one finite float32 number for each row, the same every time; its input is unchanged."""
    for site in both_kinds():
        for scale in (1.0, 0.0, 1e-12):
            for matrix, before in zip(
                some_matrices(scorer, site, scale), some_matrices(scorer, site, scale), strict=True
            ):
                found = expect_tensor(scorer.reduce(matrix), scorer, "the reduction", matrix.weight.shape[:1]).clone()
                for old, new in zip(tensors_in(before), tensors_in(matrix), strict=True):
                    expect_unchanged(scorer, "weight, gradient or squares", old, new)
                same = torch.equal(found, scorer.reduce(matrix))
                expect(same, scorer, "reduces the same gradient differently; draw with a seed of its own")


def check_row_order(scorer: GradientScorer) -> None:
    """A row's number follows it to another place in the matrix."""
    for site in both_kinds():
        for matrix in some_matrices(scorer, site):
            rows = torch.arange(len(matrix.weight)).flip(0)
            squares = None if matrix.squares is None else matrix.squares[rows]
            turned = replace(matrix, weight=matrix.weight[rows], gradient=matrix.gradient[rows], squares=squares)
            same = alike(scorer.reduce(turned), scorer.reduce(matrix)[rows])
            expect(same, scorer, "reduces a row by its number: in another order, rows get other numbers")


def check_additive(scorer: GradientScorer) -> None:
    """If it is ``additive``, the reduction of a sum is the sum of the reductions."""
    if not scorer.additive:
        return
    for site in both_kinds():
        pairs = zip(some_matrices(scorer, site), some_matrices(scorer, site, seed=10), strict=True)
        for one, other in pairs:
            other = replace(other, weight=one.weight)
            apart = scorer.reduce(one).double() + scorer.reduce(other).double()
            same = torch.allclose(apart, scorer.reduce(_sum(one, other)).double(), rtol=1e-4, atol=1e-5)
            expect(same, scorer, "is additive, and reduces a sum to something else than the sum of its reductions")


def _sum(one: MatrixGradient, other: MatrixGradient) -> MatrixGradient:
    """Both gradients together, of the same weight."""
    squares = None if one.squares is None or other.squares is None else one.squares + other.squares
    return replace(one, gradient=one.gradient + other.gradient, squares=squares)


GRADIENT_CHECKS: list[Callable] = [check_reduction, check_row_order, check_additive]
