"""PP computed as in its public code, without what prunekit does for speed: the baseline of a benchmark.

Arithmetic and decisions are the same. The score uses the full weight in every batch, the history uses vector norms over
the batch axis, and weights are indexed in their row-major layout.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...registry import MaskApplier, MeanSquare, Site, Statistic
from ...strategies.pp.scorer import PPsp


class VectorNorms(MeanSquare):
    """Mean square activation, computed by the vector norm over rows."""

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        if valid is not None:
            return super().measure(x, valid, mean)
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square() / x.shape[0]


class FullWeightPPsp(PPsp):
    """PPsp of the whole weight matrix, computed anew for every decision."""

    statistic: ClassVar[Statistic | None] = VectorNorms()
    dtype: str = "float32"

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        """The weight (O, C) itself, in the model's dtype."""
        return weight.to(getattr(torch, self.dtype))

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        """L2 norm over outputs of ``statistic[c] * W[o,c]^2``; (O, C), (C,) -> (C,)."""
        return (prepared.float().square() * statistic).norm(dim=0)


class IndexedSlice(MaskApplier):
    """Kept rows and columns, by indexing."""

    name: Literal["indexed_slice"] = "indexed_slice"

    def producer(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight[rows], None if bias is None else bias[rows]

    def consumer(self, weight: Tensor, columns: Tensor) -> Tensor:
        return weight[:, columns]
