"""What a cross table is asked for, and its cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from statistics import fmean
from typing import Any

from .findings import Trial
from .pivot_axes import Metric

Place = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Question:
    """What is crossed, and how."""

    rows: str
    columns: str
    metric: Metric
    relative: dict[str, Any] = field(default_factory=dict)
    """Settings of the reference; none is the dense model of the same trial."""
    by: str | None = None
    """The axis that gets a table for each of its values."""


@dataclass
class Cell:
    """The trials that have one row's and one column's value."""

    ratio: bool
    planned: int = 0
    effects: dict[str, float] = field(default_factory=dict)
    """Other settings -> logarithm of the ratio to the reference, or the difference; those that all cells share."""
    trials: dict[str, Trial] = field(default_factory=dict)
    """Other settings -> trial, of the effects."""
    troubles: dict[str, int] = field(default_factory=dict)
    """Why trials are missing -> how many."""
    spare: int = 0
    """Trials that were measured but are left out, as other cells lack their settings."""

    @property
    def effect(self) -> float | None:
        return fmean(self.effects.values()) if self.effects else None

    @property
    def value(self) -> float | None:
        """The mean, geometric for ratios."""
        return self.scale(self.effect)

    @property
    def least(self) -> float | None:
        return self.scale(min(self.effects.values(), default=None))

    @property
    def largest(self) -> float | None:
        return self.scale(max(self.effects.values(), default=None))

    def scale(self, effect: float | None) -> float | None:
        """An effect as a ratio, where it is one."""
        return exp(effect) if self.ratio and effect is not None else effect
