"""What a probe computed of its tokens, so that a small batch does not compute it again.

A producer is linear in each token, so the rows that it made of a probed token are those it makes of it in the batch.
Letters: B rows, T positions, D hidden size; b, t: the probe's rows and positions; R a producer's rows, r those kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...registry import complement

WORTH_UP_TO = 2048
"""Tokens of a batch. Of a larger one the probe is too small a part: copying its products in costs what they save."""


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

        What is known is copied in; the other tokens are computed.
        """
        known = self.outputs[producer].view(len(self.tokens), -1)
        out = self.hidden.new_empty(*self.hidden.shape[:2], len(kept))
        flat = out.view(-1, len(kept))
        flat.index_copy_(0, self.tokens, known.index_select(1, kept))
        flat.index_copy_(0, self.other_tokens, functional.linear(self.others, weight, bias))
        return out

    @cached_property
    def tokens(self) -> Tensor:
        """(b * t,) int64: where the probe's tokens are in the batch, rows one after the other."""
        return (self.rows[:, None] * self.hidden.shape[1] + self.positions).view(-1)

    @cached_property
    def other_tokens(self) -> Tensor:
        """(o,) int64: where the rest is."""
        return complement(self.tokens, self.hidden.shape[0] * self.hidden.shape[1])

    @cached_property
    def others(self) -> Tensor:
        """(o, D): the rest's states."""
        return self.hidden.view(-1, self.hidden.shape[-1]).index_select(0, self.other_tokens)


def pays(hidden: Tensor) -> bool:
    """Whether a batch (B, T, D) is one that is faster with :class:`Probed` (docs/benchmarks/speed.md)."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32 and hidden[..., 0].numel() <= WORTH_UP_TO
