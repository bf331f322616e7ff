"""The rows that every form of a table shares: HTML, Markdown, CSV and LaTeX write the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..output.formatting import number
from .aggregate import Table
from .columns import Column
from .configurations import Cell, Configuration
from .findings import finite, setting_text
from .protocols import Protocol, Protocols


@dataclass(frozen=True)
class Shown:
    """One number in a table."""

    text: str
    sort: float | None
    best: bool
    protocol: Protocol | None
    about: str
    """What the number is, in words: of which configuration, from which values."""


@dataclass(frozen=True)
class Row:
    """A line: settings, then numbers."""

    settings: tuple[tuple[str, float | str], ...]
    """Text and sort key of every axis."""
    cells: tuple[Shown, ...]
    dense: bool = False
    starts_block: bool = False
    notes: tuple[str, ...] = ()


def rows_of(table: Table, columns: Sequence[Column], protocols: Protocols) -> list[Row]:
    """Dense models first, then the configurations in order."""
    rows = [
        Row(
            settings=_dense_settings(table, reference.settings),
            cells=tuple(
                _shown(reference.cell(column), name, False, protocols.of(column.label, reference.trials))
                for column in columns
            ),
            dense=True,
        )
        for reference, name in zip(table.dense, map(table.dense_name, range(len(table.dense))), strict=True)
    ]
    last = None
    for configuration in table.configurations:
        block = (configuration.reference, configuration.ratio)
        rows.append(_row(table, configuration, columns, protocols, last is not None and block != last))
        last = block
    return rows


def _row(
    table: Table, configuration: Configuration, columns: Sequence[Column], protocols: Protocols, starts: bool
) -> Row:
    name = table.name(configuration)
    cells = []
    for column in columns:
        best = (id(configuration), column.key) in table.best
        protocol = protocols.of(column.label, configuration.trials)
        cells.append(_shown(configuration.cell(column), name, best, protocol, _extent(column, configuration)))
    settings = tuple(
        (setting_text(axis, configuration.settings[axis]), _sort_key(configuration.settings[axis], axis))
        if axis in configuration.settings
        else ("-", "")
        for axis in table.shown_axes
    )
    notes = tuple(dict.fromkeys(note for trial in configuration.trials for note in trial.data.get("notes") or ()))
    return Row(settings, tuple(cells), starts_block=starts, notes=notes)


def _dense_settings(table: Table, settings: dict) -> tuple[tuple[str, str], ...]:
    """``dense`` stands in the first column that its own settings leave free, else before what is in the first."""
    shown = [setting_text(axis, settings[axis]) if axis in settings else "" for axis in table.shown_axes]
    free = next((index for index, text in enumerate(shown) if not text), 0)
    shown[free] = ", ".join(filter(None, ("dense", shown[free])))
    return tuple((text, "") for text in shown)


def _shown(cell: Cell, name: str, best: bool, protocol: Protocol | None, extent: str = "") -> Shown:
    said = f"{name}, {cell.column.title}: {cell.text}"
    if cell.sd is not None:
        said += f", mean ± standard deviation of {len(cell.numbers)} seeds ({', '.join(map(number, cell.numbers))})"
    if cell.column.meaning:
        said += f"; {cell.column.meaning}"
    return Shown(cell.text, cell.mean, best, protocol, said + extent)


def _extent(column: Column, configuration: Configuration) -> str:
    """Least and largest, or the standard error, where the evaluator gives them."""
    outcome = configuration.first.outcome(column.label) if len(configuration.trials) == 1 else None
    values = outcome["pruned"] if outcome else {}
    low, high = (finite(values.get(f"{column.name}_{end}")) for end in ("min", "max"))
    if low is not None and high is not None:
        return f"; from {column.text(low)} to {column.text(high)} over the repetitions"
    error = finite(values.get(f"{column.name}_stderr"))
    return "" if error is None else f"; standard error {column.text(error)}"


def _sort_key(value: object, axis: str) -> float | str:
    return value if finite(value) is not None else setting_text(axis, value)
