"""Ratios of paired times, and whether there are enough of them to say one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

CONFIDENCE = 0.95

LEAST_ROUNDS = 6
"""Of fewer, not even the whole range holds the median with that probability."""


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with the interval that holds the true median."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def told_apart(self) -> bool:
        """Whether the noise is smaller than the effect: 1 lies outside of an interval that deserves the name."""
        return self.rounds >= LEAST_ROUNDS and not self.low <= 1 <= self.high

    def __str__(self) -> str:
        between = f"{self.low:.3f} to {self.high:.3f}"
        if self.rounds < LEAST_ROUNDS:
            return f"too few rounds ({between})"
        return f"{self.median:.3f} ({between})" if self.told_apart else f"noise ({between})"

    @property
    def short(self) -> str:
        """Without the interval."""
        if self.rounds < LEAST_ROUNDS:
            return "too few"
        return f"{self.median:.3f}" if self.told_apart else "noise"

    def data(self) -> dict[str, float | int | None]:
        """For JSON: no ratio where there is only noise."""
        said = self.median if self.told_apart else None
        return {"ratio": said, "low": self.low, "high": self.high, "rounds": self.rounds}


def ratio_of(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Of times taken round by round, one to the other.

    The interval is that of order statistics: whatever the distribution, the median lies between the ranks with at least
    95% probability. Fewer than six rounds cannot give that: the interval is then everything seen, and says no ratio.
    """
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    rank = rank_of(len(ratios))
    return Ratio(median(ratios), ratios[rank], ratios[-1 - rank], len(ratios))


def rank_of(count: int) -> int:
    """How many of ``count`` sorted values can be left out on either side with the median still between."""

    def covered(rank: int) -> float:
        return 1 - 2 * sum(comb(count, below) for below in range(rank + 1)) / 2**count

    return max((rank for rank in range(count // 2) if covered(rank) >= CONFIDENCE), default=0)
