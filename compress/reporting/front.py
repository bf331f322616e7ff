"""The Pareto front: the configurations that no other one beats, as far as the differences are significant."""

from __future__ import annotations

from collections.abc import Sequence

from .metrics import Metric, unequal
from .ranking import rankings
from .statistics import difference
from .summary import Configuration, Summary

FRONT_QUESTIONS = 100
"""Fewer questions than this, whose accuracy has a standard error of 5 points at 50%, have no front."""


def front(summary: Summary, quality: Metric, cost: Metric) -> tuple[list[Configuration], str]:
    """The configurations on the front, by rising cost; or none, and why there is no front.

    On it is what no other is significantly better than, unless that costs clearly more, and what is significantly
    better than everything that costs clearly less. Configurations that lack planned seeds are not on it.
    """
    if why := _no_front(summary, quality):
        return [], why
    cells = {c.number: (summary.cell(c, cost), summary.cell(c, quality)) for c in summary.configurations}
    whole = [c for c in summary.configurations
             if all(cell.complete and cell.mean is not None for cell in cells[c.number])]  # fmt: skip

    def paid(c: Configuration) -> float:
        return summary.mean(c, cost) or 0.0

    def harm(c: Configuration) -> float:
        return quality.sign * (summary.mean(c, quality) or 0.0)

    def better(one: Configuration, other: Configuration, by: Metric = quality) -> bool:
        samples = summary.sample(one, by), summary.sample(other, by)
        return by.sign * samples[0].mean < by.sign * samples[1].mean and not difference(by, *samples).doubt

    def cheaper(one: Configuration, other: Configuration) -> bool:
        return paid(one) < paid(other) and (unequal(paid(one), paid(other)) if cost.exact else better(one, other, cost))

    def stays(c: Configuration) -> bool:
        dense = summary.dense_cell(c.reference, quality).mean
        if dense is not None and paid(c) >= 1 and harm(c) >= quality.sign * dense:
            return False
        rival = min((other for other in whole if not cheaper(c, other)), key=harm)
        below = min((other for other in whole if cheaper(other, c)), key=harm, default=None)
        return not better(rival, c) and (below is None or better(c, below))

    return sorted(filter(stays, whole), key=paid), ""


def _no_front(summary: Summary, quality: Metric) -> str:
    if len(summary.dense) > 1:
        return "several dense models do not compare"
    questions = _questions(summary, quality)
    if questions is not None and questions < FRONT_QUESTIONS:
        return f"{questions} questions are too few"
    contests = [block for block in rankings(summary, quality) if len(block.ranked) > 1]
    if contests and all(len(block.ties) == len(block.ranked) - 1 for block in contests):
        return f"all configurations tie in {quality.title}"
    return ""


def _questions(summary: Summary, quality: Metric) -> int | None:
    """The number of questions behind an accuracy; None where single questions were not recorded."""
    found = [trial.metric(quality.label) for c in summary.configurations for trial in c.trials]
    scores: Sequence[dict] = [(each.details.get("pruned") or {}).get("scores") or {} for each in found if each]
    counts = [sum(map(len, tasks.values())) for tasks in scores if tasks]
    return min(counts) if quality.style == "accuracy" and counts else None
