"""How alike two representations of the same tokens are, from covariances: linear CKA and SVCCA.

Letters: N tokens, P and Q dimensions of the two representations. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

RANK = 1e-10
"""Directions with less than this share of the largest one's variance are noise of the model's float32."""


class Products(NamedTuple):
    """Centred cross products of X (N, P) and Y (N, Q): X'X (P, P), Y'Y (Q, Q) and X'Y (P, Q)."""

    xx: Tensor
    yy: Tensor
    xy: Tensor


class Svcca(NamedTuple):
    """The mean canonical correlation, None where there is none, and how many directions each side kept."""

    value: float | None
    directions: tuple[int, int]


@dataclass
class Pair:
    """Running sums over the tokens of two representations; memory does not grow with their number.

    Each side is shifted by the mean of its first tokens, so that a large mean costs no digits.
    """

    tokens: int = 0
    _shift: list[Tensor] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)
    _products: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in more tokens, the same of both; (n, P) and (n, Q) of any floating dtype."""
        x, y = double(x), double(y)
        if not self.tokens:
            self._shift = [x.mean(0), y.mean(0)]
            self._sums = [torch.zeros_like(mean) for mean in self._shift]
            shapes = ((x, x), (y, y), (x, y))
            self._products = [x.new_zeros(a.shape[1], b.shape[1]) for a, b in shapes]
        x, y = x - self._shift[0], y - self._shift[1]
        for total, side in zip(self._sums, (x, y), strict=True):
            total += side.sum(0)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True):
            total.addmm_(a.T, b)
        self.tokens += x.shape[0]

    def finite(self) -> tuple[bool, bool]:
        """Whether everything taken in so far was finite, of either side."""
        x, y = (bool(torch.isfinite(total).all()) for total in self._sums)
        return x, y

    def products(self) -> Products:
        """The centred products of all tokens taken in."""
        sums = {0: (0, 0), 1: (1, 1), 2: (0, 1)}
        centred = []
        for index, total in enumerate(self._products):
            a, b = (self._sums[side] for side in sums[index])
            centred.append(total - torch.outer(a, b) / self.tokens)
        return Products(*centred)


def double(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where its device has no such numbers."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def linear_cka(products: Products) -> float | None:
    """Linear centred kernel alignment, ||X'Y||² / (||X'X|| ||Y'Y||), 0 to 1; None where a side does not vary.

    Kornblith et al., ICML 2019, arXiv 1905.00414. Blind to rotations and to one common scale of either side.
    """
    scale = products.xx.norm() * products.yy.norm()
    return (products.xy.norm().square() / scale).item() if scale > 0 else None


def svcca(products: Products, variance: float) -> Svcca:
    """Mean canonical correlation of the directions that hold ``variance`` of either side's variance, 0 to 1.

    Raghu et al., NeurIPS 2017, arXiv 1706.05806; the mean is over the smaller number of directions. Blind to
    rotations and scale, and with ``variance`` 1 to every invertible linear map of either side.
    """
    left, right = whitening(products.xx, variance), whitening(products.yy, variance)
    directions = left.shape[1], right.shape[1]
    if not min(directions):
        return Svcca(None, directions)
    correlations = torch.linalg.svdvals(left.T @ products.xy @ right).clamp(max=1)
    return Svcca(correlations.mean().item(), directions)


def whitening(square: Tensor, variance: float) -> Tensor:
    """Maps to the strongest directions that hold ``variance`` of it all, each at length 1; (P, P) -> (P, k)."""
    values, vectors = torch.linalg.eigh(square)
    values, vectors = values.flip(0), vectors.flip(1)
    real = values > RANK * values[0].clamp(min=0)
    before = values.clamp(min=0).cumsum(0) - values.clamp(min=0)
    kept = real & (before < variance * values.clamp(min=0).sum() * (1 - RANK))
    return vectors[:, kept] / values[kept].sqrt()
