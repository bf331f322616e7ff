"""Least squares by a covariance of low rank: cheap enough to be solved anew for every batch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import MemoryPlan, Prepared, SiteCovariance, Slope
from ...registry.errors import LinAlgError
from .least_squares import Regression

SUBSPACE_ITERATIONS = 4
OVERSAMPLING = 8


class LowRankLeastSquares(Regression):
    """Least squares through a few factors that the channels have in common; a bias keeps the mean."""

    paper: ClassVar[str] = "factor model of the covariance, solved by Woodbury's identity"
    name: Literal["low_rank_least_squares"] = "low_rank_least_squares"
    rank: int = Field(default=64, ge=1, description="number of common factors")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the search for the leading factors")

    def memory_plan(self, channels: int, dropped: int, per_batch: bool) -> MemoryPlan:
        plan = super().memory_plan(channels, dropped, per_batch)
        return plan._replace(held=4 * channels * (self.rank + 1)) if per_batch else plan

    def _prepared(self, covariance: SiteCovariance, ridge: Tensor) -> Prepared:
        """The covariance as ``loadings @ loadings.T`` plus a diagonal: (C, r) and (C,), the ridge included."""
        matrix = covariance.matrix
        vectors, values = leading_eigenpairs(matrix, min(self.rank, len(matrix)), self.seed)
        loadings = vectors * values.clamp(min=0).sqrt()
        rest = (matrix.diagonal() - loadings.square().sum(1)).clamp(min=0)
        if not bool(ridge > 0):
            raise LinAlgError("all channels are constant")
        return loadings, rest + ridge

    def _regression(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        """``F_d (1 + F_k' S_k^-1 F_k)^-1 F_k' S_k^-1``, as two matrices (d, r) and (r, k)."""
        factors, specific = prepared
        loadings = factors[kept]
        weighted = loadings / specific[kept, None]
        inner = loadings.T @ weighted
        inner.diagonal().add_(1)
        return factors[dropped], torch.cholesky_solve(weighted.T, torch.linalg.cholesky(inner))

    def _working_bytes(self, channels: int, dropped: int, per_batch: bool) -> int:
        return 4 * 6 * channels * (self.rank + OVERSAMPLING)


def leading_eigenpairs(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (C, r) and eigenvalues (r,) of a symmetric positive matrix, by subspace iteration."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + OVERSAMPLING, len(matrix))
    basis = torch.randn(len(matrix), width, generator=generator).to(matrix)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, inner = torch.linalg.eigh(basis.T @ (matrix @ basis))
    return basis @ inner[:, -rank:], values[-rank:]
