"""PP as its public code computes it, without what prunekit does for speed: the "before" of a benchmark.

The arithmetic is the same, so are the decisions: the score is taken of the full weight in every batch, history from
vector norms over the batch axis, and weights are indexed as they lie, row by row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...registry import MaskApplier, MeanSquare, Statistic
from ...strategies.pp.scorer import PPsp


class VectorNorms(MeanSquare):
    """Mean square activation by way of the vector norm over rows."""

    name: Literal["vector_norms"] = "vector_norms"

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        if valid is not None:
            return super().measure(x, valid, mean)
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square() / x.shape[0]


class FullWeightPPsp(PPsp):
    """PPsp of the whole weight matrix, computed anew for every decision."""

    statistic: ClassVar[Statistic | None] = VectorNorms()
    name: Literal["full_weight_ppsp"] = "full_weight_ppsp"
    dtype: str = "float32"

    def prepare(self, weight: Tensor) -> Tensor:
        """The weight (O, C) itself, as the model has it."""
        return weight.to(getattr(torch, self.dtype))

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        return (prepared.float().square() * statistic).norm(dim=0)


class IndexedSlice(MaskApplier):
    """Kept rows and columns by indexing."""

    name: Literal["indexed_slice"] = "indexed_slice"

    def producer(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight[rows], None if bias is None else bias[rows]

    def consumer(self, weight: Tensor, columns: Tensor) -> Tensor:
        return weight[:, columns]
