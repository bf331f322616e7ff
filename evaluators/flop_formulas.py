"""Operations of what torch's own counter passes over: attention on CPUs, matrix times vector, solving linear systems.

Leading terms as in Golub and Van Loan, Matrix Computations, with two operations for each multiply-add. What has no
formula in either place counts as nothing: decompositions by QR, eigenvalues and singular values among it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Size


def formulas() -> dict[Any, Any]:
    """Operation -> formula of shapes, for ``FlopCounterMode(custom_mapping=...)``."""
    return {
        getattr(torch.ops.aten, name): formula for name, formula in FORMULAS.items() if hasattr(torch.ops.aten, name)
    }


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Two matrix products for every query head; shapes (B, H, Tq, d), (B, Hkv, Tk, d), (B, Hkv, Tk, dv)."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _added_product(start: Size, left: Size, right: Size, **_: Any) -> int:
    """(..., m, k) by (..., k, n), in place: torch counts it only where it makes a new tensor."""
    return 2 * prod(left) * right[-1]


def _matrix_vector(matrix: Size, vector: Size, **_: Any) -> int:
    """(m, n) by (n,)."""
    return 2 * prod(matrix)


def _added_matrix_vector(start: Size, matrix: Size, vector: Size, **_: Any) -> int:
    return _matrix_vector(matrix, vector)


def _dot(one: Size, other: Size, **_: Any) -> int:
    return 2 * prod(one)


def _outer(start: Size, column: Size, row: Size, **_: Any) -> int:
    """(m, n) plus the product of (m,) and (n,), as a matrix product counts it."""
    return 2 * prod(column) * prod(row)


def _cholesky(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): n^3 / 3."""
    return prod(matrix) * matrix[-1] // 3


def _lu(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): 2 n^3 / 3."""
    return 2 * prod(matrix) * matrix[-1] // 3


def _inverse(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): 2 n^3, the factors included."""
    return 2 * prod(matrix) * matrix[-1]


def _triangular_solve(matrix: Size, right: Size, *_: Any, **__: Any) -> int:
    """(..., n, n), and m right sides as rows or columns: n^2 for each."""
    return _right_sides(matrix, right) * matrix[-1] ** 2


def _factored_solve(right: Size, factor: Size, *_: Any, **__: Any) -> int:
    """Two triangular systems: 2 n^2 for each right side."""
    return 2 * _triangular_solve(factor, right)


def _lu_solve(factor: Size, pivots: Size, right: Size, *_: Any, **__: Any) -> int:
    return 2 * _triangular_solve(factor, right)


def _solve(matrix: Size, right: Size, *_: Any, **__: Any) -> int:
    """The factors, and two triangular systems for each right side."""
    return _lu(matrix) + 2 * _triangular_solve(matrix, right)


def _right_sides(matrix: Size, right: Size) -> int:
    """Vectors of length n that a system (..., n, n) is solved for, those that are broadcast counted each time."""
    if len(right) == 1 or right == matrix[:-1]:
        return prod(matrix[:-2])
    batch = torch.broadcast_shapes(matrix[:-2], right[:-2])
    return prod(batch) * prod(right[-2:]) // matrix[-1] if matrix[-1] else 0


FORMULAS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "addmm_": _added_product,
    "baddbmm_": _added_product,
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "addmv_": _added_matrix_vector,
    "dot": _dot,
    "addr": _outer,
    "addr_": _outer,
    "linalg_cholesky_ex": _cholesky,
    "cholesky_solve": _factored_solve,
    "cholesky_inverse": lambda factor, *_, **__: 2 * _cholesky(factor),
    "linalg_solve_triangular": _triangular_solve,
    "linalg_lu_factor_ex": _lu,
    "linalg_lu_solve": _lu_solve,
    "_linalg_solve_ex": _solve,
    "linalg_inv_ex": _inverse,
}
"""Name in ``torch.ops.aten`` -> formula of the arguments' shapes; names that a version of torch lacks are left out."""
