"""How a history is stored where decisions are made per batch: its precision, and positions that share a row."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class HistoryStorage(BaseModel):
    """Precision and size of the history's tables of a strategy that decides per batch.

    A table has a row for each position and a column for each channel: at 1,024 positions in float32 about 1.8 GB for
    LLaMA-2-7B, and as much again for the calibrated copy that measurements start from. Calibration itself always uses
    float32 and a row for each position.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="float16 stores the roots, which neither overflow nor lose the small steps of an average",
    )
    pool: int = Field(
        default=1,
        ge=1,
        description="positions that share one row; the first position, the attention sink, always has its own",
    )

    def row_of(self, positions: Tensor) -> Tensor:
        """The rows of ``positions``, int64 of any shape."""
        return positions if self.pool == 1 else (positions + self.pool - 1) // self.pool

    def rows_for(self, positions: int) -> int:
        """Number of rows of the first ``positions`` positions."""
        return (positions + 2 * self.pool - 2) // self.pool if positions else 0

    def pooled(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Means per position (T, c) of ``counts`` tokens each, as means per row (R, c) and their tokens.

        Tokens are counted for all channels, (T,) -> (R,), or for each, (T, c) -> (R, c).
        """
        if self.pool == 1:
            return values, counts
        rows = self.row_of(torch.arange(len(values), device=values.device))
        shape = self.rows_for(len(values))
        wide = counts.view(len(counts), -1)
        tokens = wide.new_zeros(shape, wide.shape[1]).index_add_(0, rows, wide)
        sums = values.new_zeros(shape, values.shape[1]).index_add_(0, rows, values * wide)
        return sums.div_(tokens.clamp(min=1)), tokens.view(shape, *counts.shape[1:])

    def encode(self, values: Tensor) -> Tensor:
        """Values (..., c) float32, not negative, in the stored form."""
        if self.dtype == "float32":
            return values
        if self.dtype == "float16":
            return values.clamp(min=0).sqrt().clamp_(max=torch.finfo(torch.float16).max).to(torch.float16)
        return values.to(torch.bfloat16)

    def decode(self, stored: Tensor) -> Tensor:
        """The values from their stored form; float32, a new tensor unless they are stored as float32."""
        if self.dtype == "float32":
            return stored
        decoded = stored.float()
        return decoded.square_() if self.dtype == "float16" else decoded
