"""Which rows and positions of a batch are probed (PP)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import ProbeSelector, token_norms

SHORT_PROBE = 10
"""Probes of at most this many positions always contain the first position, the attention sink."""


class SizedSelector(ProbeSelector):
    """A selector whose probe is a share of the rows and a share of the positions."""

    positions: float = Field(default=0.5, gt=0, le=1, description="share of the positions to probe, at least two")
    rows: float = Field(default=0.05, gt=0, le=1, description="share of the rows to probe, at least one")

    def sizes(self, states: Tensor) -> tuple[int, int]:
        """Number of rows and positions; states (B, T, D) -> (b, t)."""
        batch, length = states.shape[:2]
        return math.ceil(self.rows * batch), min(max(math.ceil(self.positions * length), 2), length)


class NormSelector(SizedSelector):
    """Ranks positions, then rows, by the L2 norm of their states."""

    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        number_of_rows, number_of_positions = self.sizes(states)
        norms = token_norms(states)
        if valid is not None:
            norms = norms.masked_fill(~valid, 0)
        positions = norms.norm(dim=0).topk(number_of_positions).indices.sort().values
        if number_of_positions <= SHORT_PROBE:
            # The first position with a real token replaces the first one chosen.
            first = positions.new_zeros(()) if valid is None else valid.any(0).int().argmax()
            positions = torch.cat([torch.minimum(positions[:1], first[None]), positions[1:]])
        rows = norms.index_select(1, positions).norm(dim=1).topk(number_of_rows).indices.sort().values
        return rows, positions


class ResidualNorm(NormSelector):
    """Largest residual stream before the block's norm: PP's own selector."""

    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618, residual importance"
    name: Literal["residual_norm"] = "residual_norm"


class HiddenNorm(NormSelector):
    """Largest hidden state after the block's norm."""

    looks_at: ClassVar[Literal["residual", "hidden"]] = "hidden"
    name: Literal["hidden_norm"] = "hidden_norm"


class RandomProbe(SizedSelector):
    """Rows and positions drawn at random for every decision."""

    name: Literal["random"] = "random"

    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        number_of_rows, number_of_positions = self.sizes(states)
        # Rows and positions without any real token are chosen last.
        row_has = torch.ones(states.shape[0]) if valid is None else valid.any(1).float().cpu()
        position_has = torch.ones(states.shape[1]) if valid is None else valid.any(0).float().cpu()
        rows = _draw(row_has, number_of_rows, generator)
        return rows.to(states.device), _draw(position_has, number_of_positions, generator).to(states.device)


class SpreadProbe(ProbeSelector):
    """A few positions of every row, drawn at random for each row and decision."""

    name: Literal["spread"] = "spread"
    positions: float = Field(
        default=0.05, gt=0, le=1, description="share of every row's positions to probe, at least two"
    )

    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All rows (B,), and positions (B, t) of each row: padding only where a row has too few real tokens."""
        batch, length = states.shape[:2]
        count = min(max(math.ceil(self.positions * length), 2), length)
        keys = torch.rand(batch, length, generator=generator)
        if valid is not None:
            keys += valid.cpu()
        positions = keys.topk(count, dim=1).indices.sort(dim=1).values
        return torch.arange(batch, device=states.device), positions.to(states.device)


class WholeBatch(ProbeSelector):
    """Every row and every position: full-batch probing."""

    name: Literal["whole_batch"] = "whole_batch"

    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch, length = states.shape[:2]
        return torch.arange(batch, device=states.device), torch.arange(length, device=states.device)


def _draw(eligible: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` ascending indices drawn without replacement, eligible ones (1.0) before others (0.0)."""
    keys = torch.rand(eligible.shape[0], generator=generator) + eligible
    return keys.topk(count).indices.sort().values
