"""Running statistics of the channels that enter a site's consumer.

Letters: B rows, T positions, C channels. Everything is float32, whatever the model's dtype.
Padded tokens are left out of the sums and of the number of tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..component import Component
from .history_storage import HistoryStorage
from .reductions import position_means, position_sums

PLAIN = HistoryStorage()

TAIL = 16
"""Positions at the end of a history whose mean stands for later ones."""


@dataclass
class ChannelHistory:
    """The running statistics of one consumer's input: the only state that a batch changes.

    ``table`` (T, C) is the running statistic per position, ``rows`` (T,) the number of rows counted at each position,
    ``mean`` (C,) and ``tokens`` the running mean over all tokens. After :meth:`store` the table has the form of
    ``storage``, and the methods below read and write it.
    """

    channels: int
    device: torch.device
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    mean: Tensor | None = None
    tokens: float = 0.0
    storage: HistoryStorage = PLAIN
    stored_positions: int = 0
    is_plain: bool = field(init=False)
    """Whether the table is stored as calibration has filled it: float32, a row for each position."""

    def __post_init__(self) -> None:
        self.is_plain = self.storage == PLAIN
        if not self.table.numel():
            self.table = torch.zeros(0, self.channels, dtype=torch.float32, device=self.device)
            self.rows = torch.zeros(0, dtype=torch.float32, device=self.device)

    @property
    def positions(self) -> int:
        """Positions that calibration has filled; 0 where no statistic is kept."""
        return self.stored_positions or self.table.shape[0]

    def grow(self, positions: int) -> None:
        """Extend the table to ``positions`` positions, with zeros."""
        missing = positions - self.positions
        if missing <= 0:
            return
        new = torch.zeros(missing, self.channels, dtype=torch.float32, device=self.device)
        count = torch.zeros(missing, dtype=torch.float32, device=self.device)
        self.table = torch.cat([self.table, new])
        self.rows = torch.cat([self.rows, count])

    def observe_mean(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the tokens of ``x`` (B, T, C) to the running mean over all tokens."""
        total, _ = position_sums(x, valid)
        count = float(x.shape[0] * x.shape[1] if valid is None else valid.sum())
        if count == 0:
            return
        self.tokens += count
        batch_mean = total.sum(0) / count
        old = torch.zeros_like(batch_mean) if self.mean is None else self.mean
        self.mean = old + (batch_mean - old) * (count / self.tokens)

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.table, self.rows, self.mean) if t is not None)

    def clone(self) -> ChannelHistory:
        """A copy with its own tensors."""
        mean = None if self.mean is None else self.mean.clone()
        return replace(self, table=self.table.clone(), rows=self.rows.clone(), mean=mean)

    # Read and written by decisions, per batch.

    def store(self, storage: HistoryStorage) -> None:
        """Convert the table to this form after calibration."""
        if not self.positions or storage == self.storage:
            return
        self.storage, self.stored_positions = storage, self.positions
        table, self.rows = storage.pooled(self.table, self.rows)
        self.table = storage.encode(table)
        self.is_plain = storage == PLAIN

    def at(self, positions: Tensor) -> Tensor:
        """The statistic at ``positions`` (t,) int64, not negative; (t, C) float32, a new tensor."""
        if self.is_plain:
            return self.table.index_select(0, positions).clamp_(min=0)
        return self.storage.decode(self.table.index_select(0, self.storage.row_of(positions))).clamp_(min=0)

    def extended_at(self, positions: Tensor) -> Tensor:
        """As :meth:`at`; a position that calibration has not filled gets the mean of the last :data:`TAIL` ones."""
        last = torch.arange(max(self.positions - TAIL, 0), self.positions, device=positions.device)
        known = self.at(positions.clamp(max=self.positions - 1))
        return torch.where((positions < self.positions)[:, None], known, self.at(last).mean(0))

    def summed(self) -> Tensor:
        """The statistic summed over all positions, (C,) float32."""
        table = self.storage.decode(self.table).clamp(min=0)
        if self.storage.pool == 1:
            return table.sum(0)
        rows = self.storage.row_of(torch.arange(self.positions, device=table.device))
        return torch.bincount(rows, minlength=len(table)).float() @ table

    def of_columns(self, positions: int, columns: Tensor) -> Tensor:
        """Rows of the first ``positions`` positions at ``columns`` (c,) int64; (R, c) float32."""
        if self.is_plain:
            return self.table[:positions].index_select(1, columns)
        return self.storage.decode(self.table[: self.storage.rows_for(positions)].index_select(1, columns))

    def write(self, columns: Tensor, values: Tensor) -> None:
        """Write values (R, c) where :meth:`of_columns` read them."""
        values = self.storage.encode(values)  # index_copy_ does the same, and takes twice the time
        self.table[: len(values)].scatter_(1, columns.expand(len(values), -1), values)


class Statistic(Component):
    """What is kept of the channels' activations: ``observe`` calibrates, ``measure`` computes it for one batch."""

    tracks_mean: bool = False
    """Whether ``observe`` updates ``history.mean``."""

    @abstractmethod
    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        """Update the running statistic with a calibration batch; x (B, T, C), valid (B, T) bool or None."""

    @abstractmethod
    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        """The statistic of one batch (or probe) per position; x (B, T, c) -> (T, c).

        ``mean`` (c,) is the history's mean of these channels, where there is one.
        """

    def summed(self, history: ChannelHistory) -> Tensor:
        """What a scorer gets of the history: the statistic summed over all positions, (C,) float32."""
        return history.summed()


class MeanSquare(Statistic):
    """Mean over rows of x^2 at each position (PP and Wanda-sp)."""

    name: Literal["mean_square"] = "mean_square"

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        sums, counts = position_sums(x, valid, square=True)
        merge_mean(history, sums, counts)

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        return position_means(x, valid, square=True)


class Fluctuation(Statistic):
    """Squared deviation from the channel's running mean, per position: FLAP's fluctuation.

    Summed over positions the table is exactly the sum of squares about the mean (the parallel update
    of Chan, Golub and LeVeque), divided by the number of rows.
    """

    name: Literal["fluctuation"] = "fluctuation"
    tracks_mean: bool = True

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        old = torch.zeros(x.shape[-1], dtype=torch.float32, device=x.device) if history.mean is None else history.mean
        first = history.tokens == 0
        history.observe_mean(x, valid)
        if history.mean is None:
            return
        # sum (x - old)(x - new) = sum (x - centre)^2 - n (half the step)^2. Before the first batch old := new, which
        # makes it the batch's own sum of squares.
        centre = history.mean if first else (old + history.mean) / 2
        half_step = torch.zeros_like(centre) if first else (history.mean - old) / 2
        sums, counts = position_sums(x, valid, square=True, centre=centre)
        merge_mean(history, sums - counts[:, None] * half_step.square(), counts)

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        if mean is None:
            counted = x.float() if valid is None else x.float().masked_fill(~valid[..., None], 0)
            tokens = x.shape[0] * x.shape[1] if valid is None else valid.sum().clamp(min=1)
            mean = counted.sum((0, 1)) / tokens
        return position_means(x, valid, square=True, centre=mean)


class ExpertStatistic(Statistic):
    """Mean over the tokens of a value of every routed expert, for scorers of whole experts.

    Its x is (n, 2, E) float32 for n real tokens: the router's weight of each expert, 0 where the token does not reach
    it, and the L2 norm of the expert's output. The table (2, E) has the value's mean over all tokens, and the share of
    the tokens that reach the expert.
    """

    over_all: ClassVar[bool] = False
    """Whether the mean is over all tokens; false: over those that reach the expert."""

    @abstractmethod
    def value(self, weights: Tensor, norms: Tensor) -> Tensor:
        """What counts of a token; router weights and output norms (n, E) -> (n, E), all float32."""

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        table = self.measure(x, valid, None)
        counts = torch.full((2,), float(len(x)), device=x.device)
        merge_mean(history, table * counts[:, None], counts)

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        """Mean value and share of the tokens of each expert; (n, 2, E) -> (2, E) float32."""
        weights, norms = x.float().unbind(1)
        reached = weights != 0
        values = self.value(weights, norms).masked_fill(~reached, 0)
        return torch.stack([values, reached.float()]).sum(1) / max(len(x), 1)

    def summed(self, history: ChannelHistory) -> Tensor:
        """(E,) float32; 0 for an expert that calibration has not reached."""
        value, share = history.table
        return value if self.over_all else torch.where(share > 0, value / share, 0)


def per_row(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums (T, C) divided by the tokens counted at each position (T,); a position with none gives 0."""
    return sums / counts.clamp(min=1)[:, None]


def merge_mean(history: ChannelHistory, sums: Tensor, counts: Tensor) -> None:
    """Running mean per position: ``table <- table*n/(n+b) + sums/(n+b)``, n and b counted per position."""
    positions = sums.shape[0]
    history.grow(positions)
    seen = history.rows[:positions]
    total = (seen + counts).clamp(min=1)
    history.table[:positions].mul_((seen / total)[:, None]).add_(sums / total[:, None])
    history.rows[:positions] = seen + counts
