"""Compares the results with published values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ablation.published import Published
from ..files.dotted import resolved_settings
from .axes import finite, key, setting_text
from .metrics import Metric, all_metrics, find
from .summary import Cell, Configuration, Summary

HEAD = ("configuration", "metric", "published", "ours", "difference", "source")

STATEMENT = (
    "Published values come from other code, and often from another model, text or window. Where the protocols differ, "
    "the difference shows nothing about either."
)


@dataclass(frozen=True)
class PublishedRow:
    """One published value next to ours."""

    where: str
    metric: str
    theirs: str
    ours: str
    difference: str
    source: str

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of :data:`HEAD`."""
        return (self.where, self.metric, self.theirs, self.ours, self.difference, self.source)


def compare_with_published(summary: Summary) -> list[PublishedRow]:
    """A row for each published value and configuration it applies to; values not measured here are listed as such."""
    metrics = [*summary.metrics, *all_metrics(summary.study)]
    return [row for entry in summary.study.published for row in _entry(summary, metrics, entry)]


def _entry(summary: Summary, metrics: list[Metric], entry: Published) -> list[PublishedRow]:
    where, theirs = entry.where, entry.value
    metric = find(metrics, entry.metric)
    title = metric.title if metric else entry.metric
    name = ", ".join(setting_text(axis, value) for axis, value in where.items())
    written = metric.text(theirs) if metric else setting_text("", theirs)
    matching = [c for c in summary.configurations if _matches(c, where)]
    cells: list[tuple[str, Cell]] = []
    if metric and entry.dense:
        name = ", ".join(filter(None, ("dense", name)))
        references = sorted({c.reference for c in matching})
        cells = [(summary.dense_name(i), summary.dense_cell(i, metric)) for i in references]
    elif metric:
        cells = [(summary.name(c), summary.cell(c, metric)) for c in matching]
    measured = [(own, cell) for own, cell in cells if cell.mean is not None]
    if not measured or not metric:
        return [PublishedRow(name or "any", title, written, "not measured", "", entry.source)]
    return [
        PublishedRow(own if len(measured) > 1 else name or "any", title, written, cell.text,
                  _difference(metric, cell.mean or 0.0, theirs), entry.source)
        for own, cell in measured
    ]  # fmt: skip


def _difference(metric: Metric, ours: float, theirs: float) -> str:
    """Ours minus theirs, and in percent; of accuracies and shares in points."""
    if finite(theirs) is None:
        return ""
    if metric.style in ("share", "accuracy"):
        return f"{100 * (ours - theirs):+.1f} points"
    return f"{ours - theirs:+.3g}" + (f" ({100 * (ours / theirs - 1):+.0f}%)" if theirs else "")


def _matches(configuration: Configuration, where: dict[str, Any]) -> bool:
    known = configuration.settings
    if not set(where) <= set(known):
        known = {**resolved_settings(configuration.first.resolved), **known}
    return all(name in known and key(known[name]) == key(value) for name, value in where.items())
