"""A linear layer that reads only the kept rows or columns of its weight, inside the product: a Triton kernel.

Gathering first reads and writes what is kept once more than this does; the product itself is slower than the vendor's.
Which of the two wins depends on the device and the batch (docs/benchmarks/speed.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K, GROUP = 128, 128, 64, 8
STAGES, WARPS = 3, 8
INTERPRETED = 16
"""Block size in Triton's interpreter, where large blocks only take time."""


@triton.jit
def _linear(  # type: ignore[no-untyped-def]  # a kernel: its arguments have types of Triton
    x,
    weight,
    index,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out (M, N) = x (M, K) times the gathered weight; programs in groups of rows, for the cache."""
    program, blocks_m, blocks_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * blocks_n)
    rows_in_group = min(blocks_m - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * blocks_n)) % rows_in_group
    block_n = (program % (GROUP * blocks_n)) // rows_in_group
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not COLUMNS:
        rows = tl.load(index + n, mask=n < N, other=0)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            x + m[:, None].to(tl.int64) * stride_x + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )
        inside = (k[:, None] < K) & (n[None, :] < N)
        if COLUMNS:
            columns = tl.load(index + k, mask=k < K, other=0)
            right = tl.load(weight + columns[:, None] * stride_weight + n[None, :], mask=inside, other=0.0)
        else:
            right = tl.load(weight + rows[None, :] * stride_weight + k[:, None], mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else "tf32")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def linear_of_rows(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight[rows].T + bias``; x (..., D), weight (R, D) by rows, rows (r,) int64, bias (r,) -> (..., r)."""
    return _call(x, weight, rows, bias, len(rows), columns=False)


def linear_of_columns(x: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight[:, columns].T + bias``; x (..., c), weight (O, C) by columns, columns (c,) int64, bias (O,)."""
    return _call(x, weight.t(), columns, bias, weight.shape[0], columns=True)


def _call(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, width: int, columns: bool) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(flat.shape[0], width, dtype=x.dtype, device=x.device)
    on_device = x.is_cuda
    sizes = (BLOCK_M, BLOCK_N, BLOCK_K) if on_device else (INTERPRETED,) * 3
    grid = (triton.cdiv(flat.shape[0], sizes[0]) * triton.cdiv(width, sizes[1]),)
    with torch.cuda.device_of(x):
        _linear[grid](
            flat,
            weight,
            index,
            out if bias is None else bias,
            out,
            flat.shape[0],
            width,
            flat.shape[1],
            flat.stride(0),
            weight.stride(0),
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            EXACT=x.dtype == torch.float32,
            BLOCK_M=sizes[0],
            BLOCK_N=sizes[1],
            BLOCK_K=sizes[2],
            GROUP=GROUP,
            num_stages=STAGES,
            num_warps=WARPS,
        )
    return out.view(*x.shape[:-1], width)
