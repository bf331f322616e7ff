"""How sure a difference is: of two perplexities over a text's windows, of two means over what both share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
FEW_WINDOWS = 20
"""Fewer windows than this give a percentile interval that is too short."""
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t at 97.5% for 1 to 20 degrees of freedom; the last one serves for more, and is a little wide there."""
CHUNK = 1 << 22
"""Most window counts that are drawn at once."""


@dataclass(frozen=True)
class Interval:
    """A difference of perplexities, B minus A, and their ratio, B over A, with percentile intervals."""

    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    windows: int
    samples: int
    seed: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out "no difference"."""
        return self.ratio_low > 1 or self.ratio_high < 1


@dataclass(frozen=True)
class Windows:
    """Losses (nats) summed over each window, and the tokens scored in each; same order."""

    losses: tuple[float, ...]
    tokens: tuple[float, ...]

    @classmethod
    def of(cls, outcome: Mapping[str, Any] | None, side: str = "pruned") -> Windows | None:
        """What an evaluator's details hold; None where it kept no windows."""
        details = ((outcome or {}).get("details") or {}).get(side) or {}
        losses, tokens = details.get("window_losses"), details.get("window_tokens")
        if not losses or not tokens or len(losses) != len(tokens):
            return None
        if not all(isinstance(value, (int, float)) for value in (*losses, *tokens)):
            return None
        return cls(tuple(map(float, losses)), tuple(map(float, tokens)))

    @classmethod
    def mean(cls, windows: Sequence[Windows]) -> Windows:
        """Windows whose losses are the mean over repetitions; all score the same tokens."""
        losses = np.mean([repetition.losses for repetition in windows], axis=0)
        return cls(tuple(losses.tolist()), windows[0].tokens)


def paired_interval(a: Windows, b: Windows, samples: int = 10_000, seed: int = 0) -> Interval | None:
    """A 95% percentile interval from resampled windows, the same for both.

    Each sample draws as many windows as there are, with replacement; its perplexities are exp of the sum of losses
    over the sum of tokens. None for fewer than two windows, or where a perplexity is too large for a float.
    """
    count = len(a.losses)
    if count < 2 or count != len(b.losses) or a.tokens != b.tokens:
        return None
    columns = np.array([a.losses, b.losses, a.tokens]).T
    generator = np.random.default_rng(seed)
    sums = []
    for start in range(0, samples, max(1, CHUNK // count)):
        rows = min(max(1, CHUNK // count), samples - start)
        sums.append(generator.multinomial(count, np.full(count, 1 / count), size=rows) @ columns)
    totals = np.concatenate([columns.sum(axis=0, keepdims=True), *sums])
    logs = totals[:, :2] / totals[:, 2:]
    if not np.isfinite(logs).all() or logs.max() > 700:
        return None
    first, second = np.exp(logs).T
    differences, ratios = second - first, np.exp(logs[:, 1] - logs[:, 0])
    tails = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
    low, high = np.percentile(differences[1:], tails)
    ratio_low, ratio_high = np.percentile(ratios[1:], tails)
    values = (differences[0], low, high, ratios[0], ratio_low, ratio_high)
    return Interval(*map(float, values), windows=count, samples=samples, seed=seed)


def ratio_interval(a: Windows, b: Windows, samples: int, seed: int = 0) -> tuple[float, float] | None:
    """A 95% interval of the ratio of perplexities, B over A: the bootstrap's, or Student's for few windows.

    From fewer than ``FEW_WINDOWS`` windows the bootstrap's percentiles are too short. There the logarithm of the
    ratio, total loss of B minus A over total tokens, has the standard error of a ratio of sums over the windows.
    None for fewer than two windows of one length, or where a number is too large for a float.
    """
    count = len(a.losses)
    if count >= FEW_WINDOWS:
        found = paired_interval(a, b, samples, seed)
        return (found.ratio_low, found.ratio_high) if found else None
    if count < 2 or count != len(b.losses) or a.tokens != b.tokens:
        return None
    tokens, more = np.array(a.tokens), np.subtract(b.losses, a.losses)
    # Where one is much shorter than the others, they are worth fewer windows of one length.
    freedom = math.floor(tokens.sum() ** 2 / np.square(tokens).sum() + 0.1) - 1
    if freedom < 1:
        return None
    log = more.sum() / tokens.sum()
    error = math.sqrt(count / (count - 1) * np.square(more - log * tokens).sum()) / tokens.sum()
    low, high = log - student(freedom) * error, log + student(freedom) * error
    return (math.exp(low), math.exp(high)) if -700 < low <= high < 700 else None


def mean_interval(differences: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the mean of at least two paired differences, by Student's t."""
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    middle, reach = float(np.mean(differences)), float(student(len(differences) - 1) * error)
    return middle - reach, middle + reach


def student(freedom: int) -> float:
    """Student's t at 97.5%."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def unpaired(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Why two outcomes of a perplexity evaluator cannot be paired; None where they can."""
    left, right = a["protocol"].get("ids_sha256"), b["protocol"].get("ids_sha256")
    if left is None or right is None:
        return "the results do not say which windows were measured (no ids_sha256 in the protocol)"
    if left != right:
        return f"the windows are not the same (ids_sha256 {left[:12]} and {right[:12]})"
    first, second = Windows.of(a), Windows.of(b)
    if first is None or second is None:
        return "the results hold no losses of single windows; run again with this version"
    if first.tokens != second.tokens:
        return "the windows score different tokens"
    if len(first.losses) < 2 or not all(map(math.isfinite, (*first.losses, *second.losses))):
        return "it takes at least two windows with finite losses"
    return None
