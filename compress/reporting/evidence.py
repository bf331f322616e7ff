"""What tells two configurations apart: the windows, seeds and questions that both were measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, inf, isclose, isfinite, sqrt
from statistics import fmean, variance
from typing import Any

from .bootstrap import FEW_WINDOWS, Windows, mean_interval, ratio_interval, student, unpaired
from .columns import Column
from .configurations import Configuration
from .findings import finite

SAMPLES = 2000
"""Bootstrap samples behind a sentence."""

FEW_SEEDS = 3
"""Fewer shared seeds than this are no sample: no interval is made of them."""

FEW_QUESTIONS = 20
"""Fewer questions than this are no sample either."""


@dataclass(frozen=True)
class Evidence:
    """A 95% interval of how much better one is, in percent of the other's value or in points of accuracy."""

    low: float
    high: float
    count: int
    of: str
    """What there are so many of: window, seed or question."""
    unit: str = "%"

    @property
    def certain(self) -> bool:
        return self.low > 0

    @property
    def source(self) -> str:
        """60 windows."""
        return f"{self.count:,} {self.of}{'' if self.count == 1 else 's'}"

    @property
    def text(self) -> str:
        return f"{self.low:.1f}{self.unit if self.unit == '%' else ''} to {self.high:.1f}{self.unit}"

    @property
    def doubt(self) -> str:
        """Why it allows no order."""
        few = self.of != "seed" and self.count < (FEW_WINDOWS if self.of == "window" else FEW_QUESTIONS)
        if not isfinite(self.low):
            return f"only {self.source} {'was' if self.count == 1 else 'were'} measured"
        ends = f"{self.low:+.1f}{self.unit if self.unit == '%' else ''} to {self.high:+.1f}{self.unit}"
        why = "holds zero" if self.high >= 0 else "speaks for the other"
        return f"the 95% interval of their difference over {'only ' if few else ''}{self.source}, {ends}, {why}"


def evidence_of(column: Column, best: Configuration, other: Configuration) -> list[Evidence]:
    """All that is known about how sure the difference of two configurations is."""
    found = (over_windows(column, best, other), over_seeds(column, best, other), over_questions(column, best, other))
    return [evidence for evidence in found if evidence]


def over_windows(column: Column, best: Configuration, other: Configuration) -> Evidence | None:
    """From the losses of the same windows, averaged over seeds; None where they are not there or not the same.

    How many words a window has is not kept: for word perplexity it is taken in proportion to its tokens, which makes
    the ratio of word perplexities a power of the ratio of perplexities.
    """
    if column.name not in ("perplexity", "word_perplexity"):
        return None
    outcomes = [[trial.outcome(column.label) for trial in c.trials] for c in (best, other)]
    first = outcomes[0][0]
    if any(outcome is None for side in outcomes for outcome in side):
        return None
    every = [[Windows.of(outcome) for outcome in side] for side in outcomes]
    if all(windows and len(windows.losses) == 1 for side in every for windows in side):
        return Evidence(-inf, inf, 1, "window")
    if any(unpaired(first, outcome) for side in outcomes for outcome in side):
        return None
    a, b = (Windows.mean(side) for side in every)
    if column.name == "word_perplexity":
        words = finite(first["protocol"].get("words"))
        if not words:
            return None
        scale = words / fsum(a.tokens)
        a, b = (replace(w, tokens=tuple(scale * tokens for tokens in w.tokens)) for w in (a, b))
    ratios = ratio_interval(a, b, SAMPLES)
    if ratios is None:
        return Evidence(-inf, inf, len(a.losses), "window") if len(a.losses) < FEW_WINDOWS else None
    return Evidence(*(100 * (1 - 1 / ratio) for ratio in ratios), len(a.losses), "window")


def shared_seeds(column: Column, best: Configuration, other: Configuration) -> list[float]:
    """By how much one is better with every seed that both ran with."""
    values = [
        {_seed(c, trial): column.value(trial) for trial in c.trials if finite(column.value(trial)) is not None}
        for c in (best, other)
    ]
    sign = 1 if column.better == "lower" else -1
    return [sign * (values[1][seed] - value) for seed, value in values[0].items() if seed in values[1]]


def over_seeds(column: Column, best: Configuration, other: Configuration) -> Evidence | None:
    """From the differences with the same seeds; None for too few, or where seeds change nothing."""
    differences = shared_seeds(column, best, other)
    if len(differences) < FEW_SEEDS or not any(c.cell(column).sd for c in (best, other)):
        return None
    points = column.style == "accuracy"
    whole = 1.0 if points else abs(other.mean(column)) or 1.0
    low, high = (100 * end / whole for end in mean_interval(differences))
    return Evidence(low, high, len(differences), "seed", " points" if points else "%")


def over_questions(column: Column, best: Configuration, other: Configuration) -> Evidence | None:
    """From the score of every question, averaged over seeds, task by task; None where scores are not comparable."""
    if column.style != "accuracy":
        return None
    found = [[_scores(column, trial) for trial in c.trials] for c in (best, other)]
    every = [scores for side in found for scores in side]
    if any(s is None or _shape(s) != _shape(every[0] or {}) for s in every):
        return None
    squares, means, count = 0.0, [], 0
    for task in every[0]:
        sides = [[fmean(answers) for answers in zip(*(s[task] for s in side), strict=True)] for side in found]
        differences = [one - two for one, two in zip(*sides, strict=True)]
        if len(differences) < 2:
            return None
        squares += variance(differences) / len(differences)
        means.append(fmean(differences))
        count += len(differences)
    if count < FEW_QUESTIONS:
        return Evidence(-inf, inf, count, "question", " points")
    reach = student(count - len(means)) * sqrt(squares) / len(means)
    gap = fmean(means)
    return Evidence(100 * (gap - reach), 100 * (gap + reach), count, "question", " points")


def standard_error(column: Column, best: Configuration, other: Configuration) -> float | None:
    """Of the difference of two mean accuracies, from the tasks' own standard errors, taken as independent."""
    if column.style != "accuracy":
        return None
    squares, tasks = 0.0, 0
    for configuration in (best, other):
        values = configuration.first.outcome(column.label)["pruned"]
        errors = [finite(value) for name, value in values.items() if name.endswith("_stderr")]
        if not errors or None in errors:
            return None
        tasks = len(errors)
        squares += sum(error * error for error in errors)
    return sqrt(squares) / tasks


def _scores(column: Column, trial: Any) -> dict[str, Sequence[float]] | None:
    """Task -> the score of each question, where their means are the accuracies that the mean is made of."""
    outcome = trial.outcome(column.label) or {}
    scores = ((outcome.get("details") or {}).get("pruned") or {}).get("scores") or {}
    mean = finite(column.value(trial))
    if not scores or mean is None or any(not s or None in map(finite, s) for s in scores.values()):
        return None
    # A group's accuracy may weigh its tasks in another way: then the questions do not add up to the mean.
    return dict(scores) if isclose(fmean(map(fmean, scores.values())), mean, abs_tol=1e-9) else None


def _shape(scores: dict[str, Sequence[float]]) -> dict[str, int]:
    return {task: len(answers) for task, answers in scores.items()}


def _seed(configuration: Configuration, trial: Any) -> str:
    """The settings in which a configuration's trials differ."""
    own = {name: value for name, value in trial.settings.items() if name not in configuration.settings}
    return json.dumps(own, sort_keys=True, default=str)
