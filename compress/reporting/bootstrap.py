"""Paired bootstrap over a text's windows: how sure a difference of two perplexities is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
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
