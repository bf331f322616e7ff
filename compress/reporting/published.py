"""Compares the results with published values."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..ablation.published import Published
from ..files.dotted import resolved_settings
from .axes import key, setting_text
from .metrics import Metric, all_metrics, find
from .summary import Configuration, Summary

HEAD = ("configuration", "metric", "published", "ours", "difference", "source")

STATEMENT = (
    "Published values come from other code, and often from another model, text or window. Where the protocols differ, "
    "the difference shows nothing about either."
)


class PublishedRow(NamedTuple):
    """One published value next to ours, as texts in the order of :data:`HEAD`."""

    where: str
    metric: str
    theirs: str
    ours: str
    difference: str
    source: str


def compare_with_published(summary: Summary) -> list[PublishedRow]:
    """A row for each published value and configuration it applies to; values not measured here are listed as such."""
    metrics = [*summary.metrics, *all_metrics(summary.study)]
    return [row for entry in summary.study.published for row in _rows(summary, find(metrics, entry.metric), entry)]


def _rows(summary: Summary, metric: Metric | None, entry: Published) -> list[PublishedRow]:
    names = ["dense"] * entry.dense + [setting_text(axis, value) for axis, value in entry.where.items()]
    name = ", ".join(names) or "any"
    if metric is None:
        return [PublishedRow(name, entry.metric, setting_text("", entry.value), "not measured", "", entry.source)]
    matching = [c for c in summary.configurations if _matches(c, entry.where)]
    cells = [(summary.name(c), summary.cell(c, metric)) for c in matching]
    if entry.dense:
        references = sorted({c.reference for c in matching})
        cells = [(summary.dense_name(i), summary.dense_cell(i, metric)) for i in references]
    measured = [(own, cell.text, cell.mean) for own, cell in cells if cell.mean is not None]
    theirs = metric.text(entry.value)
    return [
        PublishedRow(own if len(measured) > 1 else name, metric.title, theirs, text,
                     _difference(metric, ours, entry.value), entry.source)
        for own, text, ours in measured
    ] or [PublishedRow(name, metric.title, theirs, "not measured", "", entry.source)]  # fmt: skip


def _difference(metric: Metric, ours: float, theirs: float) -> str:
    """Ours minus theirs, and in percent; of accuracies and shares in points."""
    if metric.style in ("share", "accuracy"):
        return f"{100 * (ours - theirs):+.1f} points"
    return f"{ours - theirs:+.3g}" + (f" ({100 * (ours / theirs - 1):+.0f}%)" if theirs else "")


def _matches(configuration: Configuration, where: dict[str, Any]) -> bool:
    known = {**resolved_settings(configuration.first.resolved), **configuration.settings}
    return all(name in known and key(known[name]) == key(value) for name, value in where.items())
