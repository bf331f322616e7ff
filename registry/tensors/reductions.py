"""Reductions over a whole batch that are cheap in a forward pass: it is read once, without a float32 copy.

Letters: B rows, T positions, C channels, D hidden size. Results are float32 for every dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels


def position_sums(
    x: Tensor, valid: Tensor | None, square: bool = False, centre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over rows of x, or of (x - centre)^2; x (B, T, C) -> (T, C) float32 and the tokens counted (T,).

    Padded tokens, where valid (B, T) is false, are left out of both. ``centre`` is (C,).
    """
    rows = torch.full((x.shape[1],), float(x.shape[0]), dtype=torch.float32, device=x.device)
    return _sums(x, valid, square, centre), rows if valid is None else valid.sum(0).float()


def position_means(x: Tensor, valid: Tensor | None, square: bool = False, centre: Tensor | None = None) -> Tensor:
    """:func:`position_sums` divided by the tokens counted; a position with none gives 0; (B, T, C) -> (T, C)."""
    sums = _sums(x, valid, square, centre)
    if valid is None:
        return sums.div_(x.shape[0])
    return sums.div_(valid.sum(0).clamp(min=1)[:, None])


def _sums(x: Tensor, valid: Tensor | None, square: bool, centre: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _at_once(x, valid, square, centre)
    if kernels.usable_on(x):
        from . import triton_reductions

        return triton_reductions.position_sums(x, valid, square, centre)
    if x.device.type == "cpu":
        return _row_by_row(x, valid, square, centre)
    if square and valid is None and centre is None and x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
    return _at_once(x, valid, square, centre)


def token_norms(states: Tensor) -> Tensor:
    """L2 norm of every token's state; (B, T, D) -> (B, T) float32."""
    if states.dtype == torch.float64:  # torch does not narrow within a norm
        return torch.linalg.vector_norm(states, dim=-1).float()
    if states.device.type != "cpu" or states.dtype == torch.float32 or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
    # On a CPU half precision is cast into a copy: row by row it stays in the cache.
    return torch.stack([torch.linalg.vector_norm(row, dim=-1, dtype=torch.float32) for row in states])


def _row_by_row(x: Tensor, valid: Tensor | None, square: bool, centre: Tensor | None) -> Tensor:
    """For CPUs: temporaries stay in the cache, which is many times faster than one reduction over the batch axis."""
    total = None
    for b in range(x.shape[0]):
        row = x[b].float()
        if centre is not None:
            row = row - centre
        if valid is not None:
            row = row.masked_fill(~valid[b][:, None], 0)
        if total is None:
            total = row * row if square else row.clone()
        elif square:
            total.addcmul_(row, row)
        else:
            total.add_(row)
    return torch.zeros(x.shape[1:], device=x.device) if total is None else total


def _at_once(x: Tensor, valid: Tensor | None, square: bool, centre: Tensor | None) -> Tensor:
    """One expression over the batch, which a compiler turns into one reduction."""
    x = x.float()
    if centre is not None:
        x = x - centre
    if valid is not None:
        x = x.masked_fill(~valid[..., None], 0)
    return (x * x if square else x).sum(0)
