"""Mean and covariance of the input of a site's consumer, which calibration computes for compensation."""

from __future__ import annotations

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
        count, own = len(chunk), chunk.mean(0)
        centred = chunk - own
        self.products.addmm_(centred.T, centred)
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

    @staticmethod
    def bytes_of(channels: int) -> int:
        """Memory of one site's covariance."""
        return 4 * channels * channels
