"""2SSP's score of its width stage: the mean over sequences of the norm of a channel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..registry import (
    ChannelHistory,
    MaskApplier,
    Scorer,
    SparsityAllocator,
    Statistic,
    Strategy,
    hookimpl,
    merge_mean,
)
from .allocation import Uniform
from .application import Slice

PAPER = "2SSP, TMLR 2025, arXiv 2501.17771, first stage"


class SequenceNorm(Statistic):
    """Mean over sequences of the L2 norm of a channel over the sequence's positions.

    A position has the part x^2 / norm of it, so that the sum over all positions is the mean of the norms.
    """

    name: Literal["sequence_norm"] = "sequence_norm"

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        sums, sequences = self._parts(x, valid)
        before = history.positions
        history.grow(len(sums))
        if 0 < before < history.positions:
            history.rows[before:] = history.rows[0]  # shorter sequences have nothing there, and count
        sums = functional.pad(sums, (0, 0, 0, history.positions - len(sums)))
        merge_mean(history, sums, sums.new_full((len(sums),), sequences))

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        sums, sequences = self._parts(x, valid)
        return sums / max(sequences, 1)

    @staticmethod
    def _parts(x: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
        """Sum over sequences of x^2 / norm (T, C) float32, and the sequences with a real token; x (B, T, C)."""
        total = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
        for number, row in enumerate(x):  # the float32 copy is that of one sequence
            squares = row.float().square()
            if valid is not None:
                squares = squares.masked_fill(~valid[number][:, None], 0)
            total += squares / squares.sum(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return total, len(x) if valid is None else int(valid.any(1).sum())


class TwoSspScorer(Scorer):
    """Mean over sequences of the L2 norm of the channel; no weights."""

    paper: ClassVar[str] = PAPER
    statistic: ClassVar[Statistic | None] = SequenceNorm()
    name: Literal["two_ssp"] = "two_ssp"

    def score(self, prepared: None, statistic: Tensor) -> Tensor:
        return statistic.clone()


class TwoSsp(Strategy):
    """2SSP's score of MLP channels, at heads summed, the same share in every layer; without its depth stage."""

    paper: ClassVar[str] = PAPER
    name: Literal["two_ssp"] = "two_ssp"
    scorer: Scorer = TwoSspScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [TwoSspScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [TwoSsp]
