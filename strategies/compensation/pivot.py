"""Regressions of any set of channels on the rest, from one inverse: the principal pivot transform.

For a symmetric positive S and a base set of channels, ``pivot`` holds the regression of the others on the base. For
a set that differs from the base in m channels, the regression follows by solving an m x m system: the fewer channels
differ, the cheaper. (Tsatsomeros, Principal pivot transforms, Linear Algebra and its Applications 307, 2000.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import complement


def pivot(matrix: Tensor, base: Tensor) -> Tensor:
    """The principal pivot transform of a positive definite matrix (C, C) on base (k,) -> (C, C).

    With S in blocks of the base (1) and the others (2), it is ``S11^-1``, ``-S11^-1 S12`` in the base's rows, and the
    regression on the base ``S21 S11^-1``, the residual covariance ``S22 - S21 S11^-1 S12`` in the others' rows. Raises
    torch.linalg.LinAlgError if S11 is not positive definite.
    """
    others = complement(base, len(matrix))
    factor = torch.linalg.cholesky(matrix[base][:, base])
    across = matrix[base][:, others]
    regression = torch.cholesky_solve(across, factor)
    pivoted = torch.empty_like(matrix)
    pivoted[base[:, None], base] = torch.cholesky_inverse(factor)
    pivoted[base[:, None], others] = -regression
    pivoted[others[:, None], base] = regression.T
    pivoted[others[:, None], others] = matrix[others][:, others] - across.T @ regression
    return pivoted


def regression_on(kept: Tensor, dropped: Tensor, pivoted: Tensor, in_base: Tensor, corrected: bool = True) -> Tensor:
    """The regression (d, k) of dropped on kept channels, from a matrix pivoted on the channels ``in_base`` (C,) bool.

    ``kept`` (k,) and ``dropped`` (d,) are all channels together. Without the correction for channels that have moved
    in or out of the base it is the base's own regression as far as its channels are kept.
    """
    out, into = in_base[dropped], ~in_base[kept]
    slope = pivoted[dropped[:, None], kept]
    slope.masked_fill_(out[:, None], 0).masked_fill_(into, 0)
    moved = torch.cat([dropped[out], kept[into]])
    if not (corrected and len(moved)):
        return slope
    left = pivoted[dropped[:, None], moved]
    left[out] = torch.eye(len(moved), dtype=left.dtype, device=left.device)[: int(out.sum())]
    right = pivoted[moved[:, None], kept]
    right[:, into] = -torch.eye(len(moved), dtype=right.dtype, device=right.device)[:, int(out.sum()) :]
    block = pivoted[moved[:, None], moved]
    return slope.addmm_(left, torch.linalg.solve(block, right), alpha=-1)
