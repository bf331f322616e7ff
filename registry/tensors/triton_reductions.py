"""The reductions of :mod:`~prunekit.registry.tensors.reductions` as Triton kernels, without temporaries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_C = 4, 256


@triton.jit
def _position_sums(  # type: ignore[no-untyped-def] # Triton takes annotations for types of its own
    x,
    valid,
    centre,
    out,
    B,
    T,
    C,
    stride_b,
    stride_t,
    HAS_VALID: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every program sums one block of positions and channels over all rows, in float32."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (t[:, None] < T) & (c[None, :] < C)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if HAS_CENTRE:
        middle = tl.load(centre + c, mask=c < C, other=0.0)
    place = x + t[:, None].to(tl.int64) * stride_t + c[None, :]
    for b in range(B):
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place += stride_b  # step by step: the offset itself may not fit in 32 bits
        if HAS_CENTRE:
            value -= middle[None, :]
        if HAS_VALID:
            real = tl.load(valid + b * T + t, mask=t < T, other=0)
            value = tl.where(real[:, None] != 0, value, 0.0)
        total += value * value if SQUARE else value
    tl.store(out + t[:, None].to(tl.int64) * C + c[None, :], total, mask=inside)


def position_sums(x: Tensor, valid: Tensor | None, square: bool, centre: Tensor | None) -> Tensor:
    """Sum over rows of x or (x - centre)^2, padding left out; (B, T, C), (B, T), (C,) -> (T, C) float32."""
    if x.stride(2) != 1:
        x = x.contiguous()
    batch, length, channels = x.shape
    out = torch.empty(length, channels, dtype=torch.float32, device=x.device)
    real = out if valid is None else valid.contiguous().view(torch.uint8)
    grid = (triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_C))
    with torch.cuda.device_of(x):
        _position_sums[grid](
            x,
            real,
            out if centre is None else centre,
            out,
            batch,
            length,
            channels,
            x.stride(0),
            x.stride(1),
            HAS_VALID=valid is not None,
            HAS_CENTRE=centre is not None,
            SQUARE=square,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
        )
    return out
