"""Ours beside the literature's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..files.dotted import resolved_settings
from .aggregate import Table
from .columns import Column, all_columns, find
from .configurations import Configuration, key
from .findings import finite, setting_text

STATEMENT = (
    "Published values come from other code, and often from another model, text or window than was measured here; "
    "protocols may differ, and where they do the difference says nothing about either."
)


@dataclass(frozen=True)
class Beside:
    """One published value beside what was measured here."""

    where: str
    metric: str
    theirs: str
    ours: str
    difference: str
    source: str
    column: Column | None = None
    configuration: Configuration | None = None


def beside(table: Table) -> list[Beside]:
    """A row for every published value, one for each configuration that it speaks of; unmeasured ones say so."""
    rows = []
    columns = [*table.columns, *all_columns(table.findings)]
    for entry in table.findings.published:
        rows += _entry(table, columns, entry)
    return rows


def _entry(table: Table, columns: list[Column], entry: dict[str, Any]) -> list[Beside]:
    where, theirs = dict(entry.get("where") or {}), entry.get("value")
    column = find(columns, str(entry.get("metric")))
    metric = column.title if column else str(entry.get("metric"))
    source = str(entry.get("source") or "")
    said = ", ".join(setting_text(name, value) for name, value in where.items())
    matching = [c for c in table.configurations if _matches(c, where)]
    written = column.text(theirs) if column else setting_text("", theirs)
    if entry.get("dense"):
        references = sorted({c.reference for c in matching})
        cells = [(None, table.dense_name(i), table.dense[i].cell(column)) for i in references] if column else []
        said = ", ".join(filter(None, ("dense", said)))
    else:
        cells = [(c, table.name(c), c.cell(column)) for c in matching] if column else []
    cells = [(c, name, cell) for c, name, cell in cells if cell.mean is not None]
    if not cells:
        return [Beside(said or "any", metric, written, "not measured", "", source)]
    found = []
    for configuration, own, cell in cells:
        name = own if len(cells) > 1 else said or "any"
        found.append(
            Beside(
                name, metric, written, cell.text, difference(column, cell.mean, theirs), source, column, configuration
            )
        )
    return found


def difference(column: Column, ours: float, theirs: Any) -> str:
    """Ours minus theirs, in the value's own unit and in percent (of accuracies and shares, in points)."""
    if finite(theirs) is None:
        return ""
    if column.style in ("share", "accuracy"):
        return f"{100 * (ours - theirs):+.1f} points"
    percent = f" ({100 * (ours / theirs - 1):+.0f}%)" if theirs else ""
    return f"{ours - theirs:+.3g}{percent}"


def _matches(configuration: Configuration, where: dict[str, Any]) -> bool:
    known = configuration.settings
    if not set(where) <= set(known):
        known = {**resolved_settings(configuration.first.resolved), **known}
    return all(name in known and key(known[name]) == key(value) for name, value in where.items())
