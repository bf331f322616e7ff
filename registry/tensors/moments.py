"""Mean and covariance of the input of a site's consumer, which calibration computes for choosers and compensation.

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

    def covariance(self) -> Tensor:
        """(C, C) float32, a tensor of its own; the sums stay."""
        return self.products / self.tokens

    @property
    def bytes(self) -> int:
        """Memory of the products."""
        return self.products.numel() * self.products.element_size()

    @staticmethod
    def bytes_of(channels: int) -> int:
        """Memory of one site's covariance."""
        return 4 * channels * channels


@dataclass
class CrossMoments:
    """Running means (R,) of something of the dense model and (C,) of the pruned model's channels, and the covariance
    (R, C) of the first with the second, over the same real tokens, in float32."""

    rows: int
    channels: int
    device: torch.device
    tokens: int = 0
    dense: Tensor = field(default_factory=lambda: torch.empty(0))
    """(R,): the dense model's mean; empty before the first token."""
    pruned: Tensor = field(default_factory=lambda: torch.empty(0))
    """(C,): the pruned model's mean; empty before the first token."""
    products: Tensor = field(default_factory=lambda: torch.empty(0))
    """(R, C): sums of products of deviations from the means; empty before the first token."""

    def observe(self, dense: Tensor, pruned: Tensor, valid: Tensor | None) -> None:
        """Add the tokens of both, (B, T, R) and (B, T, C); valid (B, T) bool, or None where all are real."""
        both = [x.flatten(0, 1) if valid is None else x[valid] for x in (dense, pruned)]
        for first, second in zip(*(x.split(CHUNK) for x in both), strict=True):
            if len(first):
                self._take(first.float(), second.float())

    def _take(self, dense: Tensor, pruned: Tensor) -> None:
        if not self.tokens:
            self.dense, self.pruned = (
                torch.zeros(size, dtype=torch.float32, device=self.device) for size in (self.rows, self.channels)
            )
            self.products = torch.zeros(self.rows, self.channels, dtype=torch.float32, device=self.device)
        own = dense.mean(0), pruned.mean(0)
        self.products.addmm_((dense - own[0]).T, pruned - own[1])
        steps, share = (own[0] - self.dense, own[1] - self.pruned), len(dense) / (self.tokens + len(dense))
        self.products.addr_(*steps, alpha=self.tokens * share)
        self.dense, self.pruned = self.dense + share * steps[0], self.pruned + share * steps[1]
        self.tokens += len(dense)

    def covariance(self) -> Tensor:
        """(R, C) float32, a tensor of its own; the sums stay."""
        return self.products / self.tokens

    def take_covariance(self) -> Tensor:
        """(R, C) float32, in the memory of the sums, which are dropped."""
        products, self.products = self.products, torch.empty(0)
        return products.div_(self.tokens)

    @property
    def bytes(self) -> int:
        """Memory of the products."""
        return self.products.numel() * self.products.element_size()


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
