"""Ratios of paired times, each with a confidence interval of its median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy
from scipy.stats import quantile_test

CONFIDENCE = 0.95

LEAST_ROUNDS = 6
"""With fewer rounds even the whole range contains the true median with less than 95% probability."""


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios and its confidence interval; the range of the ratios if the rounds are too few."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def significant(self) -> bool:
        """Whether there is an interval and 1 lies outside of it: the effect is larger than the noise."""
        return self.rounds >= LEAST_ROUNDS and not self.low <= 1 <= self.high

    @property
    def short(self) -> str:
        """The ratio without its interval, or one word on why there is none."""
        if self.rounds < LEAST_ROUNDS:
            return "too few"
        return f"{self.median:.3f}" if self.significant else "noise"

    def __str__(self) -> str:
        few = " rounds" if self.rounds < LEAST_ROUNDS else ""
        return f"{self.short}{few} ({self.low:.3f} to {self.high:.3f})"

    def data(self) -> dict[str, float | int | None]:
        """For JSON; ``ratio`` is None if it is not significant."""
        ratio = self.median if self.significant else None
        return {"ratio": ratio, "low": self.low, "high": self.high, "rounds": self.rounds}


def ratio_of(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """The median of ``times / base``, measured round by round.

    Its interval consists of order statistics, and so holds for any distribution of the times.
    """
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    if len(ratios) < LEAST_ROUNDS:
        return Ratio(median(ratios), min(ratios), max(ratios), len(ratios))
    low, high = numpy.array(quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)).tolist()
    return Ratio(median(ratios), low, high, len(ratios))
