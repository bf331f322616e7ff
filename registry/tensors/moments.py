"""Mean and covariance of the input of a site's consumer, which calibration computes for compensation.

Letters: B rows, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens processed at once, which limits the float32 copy of a half-precision batch."""


@dataclass
class ChannelMoments:
    """Running mean (C,) and covariance (C, C) over all real tokens, in float32.

    The parallel update of Chan, Golub and LeVeque: deviations are taken from each chunk's own mean, so that nothing
    cancels where a channel's mean is large compared with its spread.
    """

    channels: int
    device: torch.device
    tokens: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    """(C,); empty before the first token."""
    products: Tensor = field(default_factory=lambda: torch.empty(0))
    """(C, C): sums of products of deviations from the mean; empty before the first token."""

    def observe(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the tokens of x (B, T, C); valid (B, T) bool, or None where all are real."""
        tokens = x.reshape(-1, self.channels) if valid is None else x[valid]
        for chunk in tokens.split(CHUNK):
            if len(chunk):
                self._take(chunk.float())

    def _take(self, chunk: Tensor) -> None:
        if not self.tokens:
            self.mean = torch.zeros(self.channels, dtype=torch.float32, device=self.device)
            self.products = torch.zeros(self.channels, self.channels, dtype=torch.float32, device=self.device)
        own = chunk.mean(0)
        centred = chunk - own
        self.products.addmm_(centred.T, centred)
        self._move(len(chunk), own)

    def add(self, other: ChannelMoments) -> None:
        """Add the tokens of other moments; both have some."""
        self.products += other.products
        self._move(other.tokens, other.mean)

    def _move(self, count: int, own: Tensor) -> None:
        """Move the mean to that with ``count`` more tokens of mean ``own`` (C,), whose own products are added."""
        step, total = own - self.mean, self.tokens + count
        self.products.addr_(step, step, alpha=self.tokens * count / total)
        self.mean += step * (count / total)
        self.tokens = total

    def clone(self) -> ChannelMoments:
        """A copy with its own tensors."""
        return replace(self, mean=self.mean.clone(), products=self.products.clone())

    def take_covariance(self) -> Tensor:
        """(C, C) float32, in the memory of the sums, which are dropped: a large site has no room for both."""
        products, self.products = self.products, torch.empty(0)
        return products.div_(self.tokens)

    @property
    def bytes(self) -> int:
        """Memory of the products."""
        return self.products.numel() * self.products.element_size()

    @staticmethod
    def bytes_of(channels: int) -> int:
        """Memory of one site's covariance."""
        return 4 * channels * channels


@dataclass
class PartedMoments:
    """Moments of consecutive parts of the calibration text, each with the same number of its ``rows``."""

    parts: list[ChannelMoments]
    rows: int
    seen: int = 0

    def observe(self, x: Tensor, valid: Tensor | None) -> None:
        """Add the next rows x (B, T, C) to their parts; valid (B, T) bool, or None where all tokens are real."""
        ends = [number * self.rows // len(self.parts) - self.seen for number in range(len(self.parts) + 1)]
        for part, start, end in zip(self.parts, ends, ends[1:], strict=False):
            rows = slice(max(start, 0), max(end, 0))
            part.observe(x[rows], None if valid is None else valid[rows])
        self.seen += len(x)

    @property
    def bytes(self) -> int:
        """Memory of the products."""
        return sum(part.bytes for part in self.parts)


def merged(parts: Sequence[ChannelMoments]) -> ChannelMoments:
    """The moments of the tokens of several parts together, each with some."""
    together = parts[0].clone()
    for part in parts[1:]:
        together.add(part)
    return together
