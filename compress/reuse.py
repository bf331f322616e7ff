"""What a probe computed of its tokens, so that the batch does not compute it again.

A producer is linear in each token, so the rows that it made of a probed token are those it makes of it in the batch.
Letters: B rows, T positions, D hidden size; b, t: the probe's rows and positions; R a producer's rows, r those kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..registry import complement

PIECES_FROM = 2048
"""Tokens of a batch from which the rest is computed in stretches where it lies. Each further product costs about as
much as forty tokens do; below, copying the rest together and its results apart again costs less."""


@dataclass
class Probed:
    """The probe of one site and batch, and what the site's producers made of it."""

    hidden: Tensor
    """(B, T, D): the batch that the probe was taken from."""
    rows: Tensor
    """(b,) int64 ascending."""
    positions: Tensor
    """(t,) int64 ascending."""
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    """(b, t, R) by producer."""

    def covers(self, producer: nn.Module, x: Tensor) -> bool:
        """Whether the producer is about to read the very batch that the probe was taken from."""
        same = x.data_ptr() == self.hidden.data_ptr() and x.numel() == self.hidden.numel()
        return producer in self.outputs and same and x.dtype == self.hidden.dtype

    def linear(self, producer: nn.Module, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        """The producer's kept rows of the whole batch: weight (r, D), bias (r,), kept (r,) -> (B, T, r).

        What is known is copied in; all other tokens are computed.
        """
        batch, length, width = self.hidden.shape
        out = self.hidden.new_empty(batch, length, weight.shape[0])
        flat = out.view(-1, weight.shape[0])
        flat.index_copy_(0, self.tokens, self.outputs[producer].view(len(self.tokens), -1).index_select(1, kept))
        if is_small(self.hidden):
            flat.index_copy_(0, self.other_tokens, functional.linear(self.others, weight, bias))
            return out
        for start, stop in gaps(self.rows.tolist(), batch):
            into, x = out[start:stop].view(-1, weight.shape[0]), self.hidden[start:stop].view(-1, width)
            if bias is None:
                torch.mm(x, weight.t(), out=into)
            else:
                torch.addmm(bias, x, weight.t(), out=into)
        flat.index_copy_(0, self.other_tokens, functional.linear(self.others, weight, bias))
        return out

    @cached_property
    def tokens(self) -> Tensor:
        """(b * t,) int64: where the probe's tokens are in the batch, rows one after the other."""
        return self._of_rows(self.positions)

    @cached_property
    def other_tokens(self) -> Tensor:
        """(o,) int64: those of the rest that are not computed piece by piece where they lie."""
        batch, length, _ = self.hidden.shape
        if is_small(self.hidden):
            return complement(self.tokens, batch * length)
        return self._of_rows(complement(self.positions, length))

    @cached_property
    def others(self) -> Tensor:
        """(o, D): their states."""
        return self.hidden.view(-1, self.hidden.shape[-1]).index_select(0, self.other_tokens)

    def _of_rows(self, positions: Tensor) -> Tensor:
        return (self.rows[:, None] * self.hidden.shape[1] + positions).view(-1)


def is_small(hidden: Tensor) -> bool:
    """Whether a batch (B, T, D) is one whose rest is better computed in one piece."""
    return hidden.shape[0] * hidden.shape[1] < PIECES_FROM


def gaps(rows: list[int], batch: int) -> Iterator[tuple[int, int]]:
    """Stretches of ``range(batch)`` between ``rows``, ascending: (start, stop) of each that is not empty."""
    start = 0
    for row in [*rows, batch]:
        if row > start:
            yield start, row
        start = row + 1
