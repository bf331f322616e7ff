"""Intervals and tests: paired differences over windows, seeds and questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from ..output.formatting import ERROR
from ..runs.records import EvaluatorResult
from .axes import finite, is_repetition, key
from .metrics import Metric
from .trials import Trial

SAMPLES = 2000
"""Bootstrap samples of the intervals in a report."""
FEW_WINDOWS, FEW_QUESTIONS, FEW_SEEDS = 20, 20, 3
"""Minimum sizes: of windows for the bootstrap's percentiles, of questions and of shared seeds for any interval."""
SAME_VALUE = 0.01
"""Values closer than this share are not ordered where nothing is known of their spread."""
SAME_COUNT = 0.0005
"""Shares closer than this are written alike."""
INCLUDES_ZERO = "the interval includes 0"
CHUNK = 1 << 22
"""Maximum number of window counts drawn at once."""

Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def t_reach(freedom: int) -> float:
    """Half the width of Student's 95% interval, in standard errors."""
    return float(stats.t.interval(0.95, freedom)[1])


def mean_interval(differences: npt.ArrayLike) -> tuple[Any, Any]:
    """Student's 95% interval of the mean of at least two paired differences, along the first axis."""
    values = np.asarray(differences, dtype=float)
    middle, reach = values.mean(axis=0), t_reach(len(values) - 1) * stats.sem(values, axis=0)
    return middle - reach, middle + reach


def windows_of(result: EvaluatorResult | None, side: str = "pruned") -> Array | None:
    """The windows of a perplexity result: (2, windows) losses in nats and tokens scored; None if not recorded."""
    details = (result.details.get(side) if result else None) or {}
    losses, tokens = details.get("window_losses"), details.get("window_tokens")
    if not losses or not tokens or len(losses) != len(tokens):
        return None
    return np.array([losses, tokens], dtype=float)


def paired_bootstrap(a: Array, b: Array, samples: int, seed: int = 0) -> tuple[Estimate, Estimate] | None:
    """Perplexity B - A and B / A with percentile intervals, from windows resampled alike for both.

    ``a`` and ``b`` are (2, windows) losses and tokens; a sample's perplexity is exp(sum of losses / sum of tokens).
    None for fewer than two windows, different tokens, or a perplexity beyond the range of a float.
    """
    count = a.shape[1]
    if count < 2 or a.shape != b.shape or (a[1] != b[1]).any():
        return None
    columns, generator, step = np.array([a[0], b[0], a[1]]).T, np.random.default_rng(seed), max(1, CHUNK // count)
    sums = [
        generator.multinomial(count, np.full(count, 1 / count), size=min(step, samples - start)) @ columns
        for start in range(0, samples, step)
    ]
    totals = np.concatenate([columns.sum(axis=0, keepdims=True), *sums])
    logs = totals[:, :2] / totals[:, 2:]
    if not np.isfinite(logs).all() or logs.max() > 700:
        return None
    both = np.array([np.exp(logs[:, 1]) - np.exp(logs[:, 0]), np.exp(logs[:, 1] - logs[:, 0])])
    low, high = np.percentile(both[:, 1:], (2.5, 97.5), axis=1)
    difference, ratio = (Estimate(*map(float, ends)) for ends in zip(both[:, 0], low, high, strict=True))
    return difference, ratio


def ratio_interval(a: Array, b: Array) -> tuple[float, float] | None:
    """95% interval of the ratio of perplexities, B over A; ``a`` and ``b`` as in :func:`paired_bootstrap`.

    From 20 windows on it is the bootstrap's. Below that percentiles are too narrow: it is Student's, of the logarithm
    of the ratio, with the standard error of a ratio of sums over the windows. None if that is not possible.
    """
    count = a.shape[1]
    if count >= FEW_WINDOWS:
        found = paired_bootstrap(a, b, SAMPLES)
        return found[1][1:] if found else None
    if count < 2 or a.shape != b.shape or (a[1] != b[1]).any():
        return None
    tokens, more = a[1], b[0] - a[0]
    # Effective number of windows of equal length: much shorter windows count less.
    freedom = math.floor(tokens.sum() ** 2 / np.square(tokens).sum() + 0.1) - 1
    if freedom < 1:
        return None
    log = more.sum() / tokens.sum()
    error = math.sqrt(count / (count - 1) * np.square(more - log * tokens).sum()) / tokens.sum()
    low, high = log - t_reach(freedom) * error, log + t_reach(freedom) * error
    return (math.exp(low), math.exp(high)) if -700 < low <= high < 700 else None


@dataclass(frozen=True)
class Sample:
    """The trials of one configuration, and its value of a metric in each (NaN where there is none)."""

    trials: Sequence[Trial]
    values: Sequence[float]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    @property
    def mean(self) -> float:
        return fmean(self.finite)

    @property
    def sd(self) -> float:
        """Standard deviation (n - 1); 0 where all values are equal."""
        return float(np.std(self.finite, ddof=1)) if len(set(self.finite)) > 1 else 0.0

    def by_seed(self) -> dict[str, float]:
        """The finite values by the settings that repeat the measurement."""
        seeds = [key({n: v for n, v in trial.settings.items() if is_repetition(n)}) for trial in self.trials]
        return {seed: value for seed, value in zip(seeds, self.values, strict=True) if math.isfinite(value)}


@dataclass(frozen=True)
class Interval:
    """95% interval of how much better the best is: in percent of the other's value, or in points of accuracy."""

    low: float
    high: float
    count: int
    unit: str
    """``window``, ``seed`` or ``question``; too few units have an infinite interval."""
    points: bool = False

    @property
    def over(self) -> str:
        """60 windows."""
        return f"{self.count:,} {self.unit}{'s' * (self.count != 1)}"

    @property
    def text(self) -> str:
        """1.4% to 5.7%; empty if it is infinite."""
        if not math.isfinite(self.low):
            return ""
        return f"{self.low:.1f} to {self.high:.1f} points" if self.points else f"{self.low:.1f}% to {self.high:.1f}%"


@dataclass(frozen=True)
class Difference:
    """The difference between the best configuration and another one."""

    gap: float
    """In percent of the other's value, or in points of accuracy."""
    points: bool
    intervals: tuple[Interval, ...]
    doubt: str
    """Why the difference is not significant; empty if it is."""
    caution: str
    """What limits a significant difference."""

    @property
    def gap_text(self) -> str:
        return f"{self.gap:.1f} points" if self.points else f"{self.gap:.2g}%"

    def intervals_text(self, join: str) -> str:
        """1.4% to 5.7% over 60 windows."""
        end = ")" if "(" in join else ""
        return "; ".join(f"{one.text}{join}{one.over}{end}" for one in self.intervals if one.text)


def difference(metric: Metric, best: Sample, other: Sample) -> Difference:
    """Compare the best with another configuration by everything that was sampled or repeated.

    The difference is significant if no interval includes 0. Two shared seeds must agree, and means differ by more than
    the deviations of seeds that give no interval; accuracies without scores of single questions by two standard errors;
    values of unknown spread by 1%. Times of equal shapes do not differ, nor do times whose repetitions overlap.
    """
    points, apart, spread = metric.style == "accuracy", abs(other.mean - best.mean), math.hypot(best.sd, other.sd)
    gap = 100 * apart if points else 100 * abs(1 - best.mean / other.mean) if other.mean else math.inf
    first, second = best.by_seed(), other.by_seed()
    seeds = [metric.sign * (second[seed] - value) for seed, value in first.items() if seed in second]
    over_seeds = None
    if len(seeds) >= FEW_SEEDS and spread:
        scale = 100 / (1.0 if points else abs(other.mean) or 1.0)
        low, high = mean_interval(seeds)
        over_seeds = Interval(scale * low, scale * high, len(seeds), "seed", points)
    tests = (_over_windows(metric, best, other), over_seeds, _over_questions(metric, best, other))
    intervals = tuple(found for found in tests if found)
    questions = any(one.unit == "question" for one in intervals)
    errors = [] if questions else [standard_error(metric, sample.trials[0]) for sample in (best, other)]
    known = [one for one in errors if one is not None]
    error = math.hypot(*known) if len(known) == 2 else None
    doubts = [INCLUDES_ZERO if one.text else f"only {one.over} measured" for one in intervals if one.low <= 0]
    if spread and not over_seeds and len(seeds) == 2 and min(seeds) <= 0:
        doubts.append("the two seeds disagree")
    if spread and not over_seeds and apart <= spread:
        doubts.append("within the deviation over seeds")
    if error is not None and apart <= 2 * error:
        doubts.append(f"within two standard errors ({200 * error:.1f} points)")
    if metric.timed and _shape(best.trials[0]) == _shape(other.trials[0]):
        doubts.append("equal shapes")
    elif metric.timed and not spread and not _apart(metric, best.trials[0], other.trials[0]):
        doubts.append("the repetitions overlap")
    elif metric.exact and apart < SAME_COUNT:
        doubts.append("equal counts")
    elif not spread and not intervals and error is None and not metric.exact and apart <= SAME_VALUE * abs(best.mean):
        doubts.append(f"less than {100 * SAME_VALUE:.0f}% apart")
    few = "both seeds agree, but two are too few to be certain" if len(seeds) == 2 and spread and not doubts else ""
    return Difference(gap, points, intervals, doubts[0] if doubts else "", few)


def _shape(trial: Trial) -> Any:
    """The units kept in each layer and the operations they take, if those were counted: they determine the time."""
    cost = next((found for found in trial.metrics if found.evaluator == "cost"), None)
    flops = finite(cost.pruned.get("flops_ratio")) if cost else None
    return [layer.sites for layer in trial.result.layers] if trial.result else [], flops and round(flops, 3)


def _apart(metric: Metric, best: Trial, other: Trial) -> bool:
    """Whether the repetitions of two timings do not overlap; False where they are not recorded."""
    fast, slow = (
        finite(found.pruned.get(f"{metric.name}_{end}")) if (found := trial.metric(metric.label)) else None
        for trial, end in ((best, "max"), (other, "min"))
    )
    return fast is not None and slow is not None and fast < slow


def _over_windows(metric: Metric, best: Sample, other: Sample) -> Interval | None:
    """From the losses of the same windows, averaged over seeds; None if they are missing or differ.

    The words of a window are not recorded: word perplexity takes them in proportion to its tokens, so that the ratio of
    word perplexities is a power of the ratio of perplexities.
    """
    sides = [[trial.metric(metric.label) for trial in sample.trials] for sample in (best, other)]
    windows = [[found for result in side if (found := windows_of(result)) is not None] for side in sides]
    results = [result for side in sides for result in side if result]
    measured = [found for side in windows for found in side]
    if metric.name not in ("perplexity", "word_perplexity") or len(measured) < len([*best.trials, *other.trials]):
        return None
    if all(found.shape[1] == 1 for found in measured):
        return Interval(-math.inf, math.inf, 1, "window")
    if any(not_paired(results[0], result) for result in results):
        return None
    a, b = (np.mean(side, axis=0) for side in windows)
    if metric.name == "word_perplexity":
        words = finite(results[0].protocol.get("words"))
        if not words:
            return None
        a, b = (np.array([losses, tokens * words / tokens.sum()]) for losses, tokens in (a, b))
    ratios, count = ratio_interval(a, b), a.shape[1]
    if ratios is None:
        return Interval(-math.inf, math.inf, count, "window") if count < FEW_WINDOWS else None
    low, high = (100 * (1 - 1 / ratio) for ratio in ratios)
    return Interval(low, high, count, "window")


def _over_questions(metric: Metric, best: Sample, other: Sample) -> Interval | None:
    """From the score of every question, averaged over seeds, task by task; None if the scores do not correspond."""
    if metric.style != "accuracy":
        return None
    sides = [[_scores(metric, t, v) for t, v in zip(s.trials, s.values, strict=True)] for s in (best, other)]
    shapes = [{task: len(scores) for task, scores in tasks.items()} for side in sides for tasks in side]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes) or min(shapes[0].values()) < 2:
        return None
    count, tasks = sum(shapes[0].values()), list(shapes[0])
    if count < FEW_QUESTIONS:
        return Interval(-math.inf, math.inf, count, "question", True)
    means = [{task: np.mean([scores[task] for scores in side], axis=0) for task in tasks} for side in sides]
    differences = [means[0][task] - means[1][task] for task in tasks]
    middle = fmean(float(each.mean()) for each in differences)
    error = math.sqrt(sum(stats.sem(each) ** 2 for each in differences)) / len(tasks)
    reach = t_reach(count - len(tasks)) * error
    return Interval(100 * (middle - reach), 100 * (middle + reach), count, "question", True)


def _scores(metric: Metric, trial: Trial, mean: float) -> dict[str, list[float]]:
    """The scores of each task's questions; empty unless the mean accuracy is the mean over tasks (groups may weigh)."""
    result = trial.metric(metric.label)
    scores = ((result.details.get("pruned") if result else None) or {}).get("scores") or {}
    if not scores or any(not task or None in map(finite, task) for task in scores.values()):
        return {}
    return dict(scores) if math.isclose(fmean(map(fmean, scores.values())), mean, abs_tol=1e-9) else {}


def standard_error(metric: Metric, trial: Trial) -> float | None:
    """Of a mean accuracy, from the tasks' standard errors, taken as independent; None if any is not known."""
    result = trial.metric(metric.label) if metric.style == "accuracy" else None
    errors = [finite(value) for name, value in result.pruned.items() if name.endswith(ERROR)] if result else []
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def not_paired(a: EvaluatorResult, b: EvaluatorResult) -> str | None:
    """Why the windows of two perplexity results cannot be paired; None if they can."""
    left, right = a.protocol.get("ids_sha256"), b.protocol.get("ids_sha256")
    if left is None or right is None:
        return "the results do not identify the windows (no ids_sha256 in the protocol)"
    if left != right:
        return f"the windows differ (ids_sha256 {left[:12]} and {right[:12]})"
    first, second = windows_of(a), windows_of(b)
    if first is None or second is None:
        return "the results have no losses of single windows; run again with this version"
    if first.shape != second.shape or (first[1] != second[1]).any():
        return "the windows score different tokens"
    if first.shape[1] < 2 or not np.isfinite([first, second]).all():
        return "at least two windows with finite losses are needed"
    return None
