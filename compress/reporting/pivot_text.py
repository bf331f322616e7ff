"""Cross tables in words: cells, what they leave out, how they were made; as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence

from ..output.formatting import number
from ..output.formatting import table as markdown_table
from .columns import Column
from .facts import facts
from .findings import axis_title, named_text, setting_text
from .pivot import Cross
from .pivot_axes import DENSE, Grid
from .pivot_records import Place, Question
from .protocols import Protocols
from .tables import csv_text

BEST, TIED = "◆", "◇"
"""Beside the best cell, and beside those that cannot be told from it."""

FEW_GROUPS = 4
"""With fewer groups than this, intervals are so wide that the words say it."""

MOST_NAMED = 6
"""Cells that one sentence names; more are counted."""


def text_of(question: Question, value: float | None) -> str:
    """A cell's value as people read it: a ratio, points of accuracy, or another difference."""
    if value is None:
        return "-"
    if question.metric.ratio:
        return f"{value:.3f}" if 0.01 <= value < 100 else number(value)
    return f"{100 * value:+.1f}" if question.metric.column.style == "accuracy" else f"{value:+.3g}"


def mark(cross: Cross, place: Place) -> str:
    """What stands beside a cell's value."""
    return BEST if place in cross.marks.best else TIED if place in cross.marks.tied else ""


def value_text(cross: Cross, place: Place) -> str:
    """A cell's value and mark."""
    return " ".join(filter(None, (text_of(cross.question, cross.cells[place].value), mark(cross, place))))


def spread_text(cross: Cross, place: Place) -> str:
    """Least to largest and number of trials, or why there are none: ``0.91 to 0.97, n 8, 1 failed``."""
    cell = cross.cells[place]
    said = [f"n {len(cell.effects)}"] if cell.effects else []
    if len(cell.effects) > 1:
        said.insert(0, f"{text_of(cross.question, cell.least)} to {text_of(cross.question, cell.largest)}")
    said += [f"{count} {why}" for why, count in cell.troubles.items()]
    said += ["shares no setting with the others"] if cell.spare and not cell.effects else []
    return ", ".join(said)


def head(cross: Cross) -> list[str]:
    """Titles of the columns; the first says what rows and columns are."""
    rows, columns = cross.question.rows, cross.question.columns
    return [f"{axis_title(rows)} \\ {axis_title(columns)}", *(setting_text(columns, value) for value in cross.columns)]


def row_names(cross: Cross) -> list[str]:
    return [setting_text(cross.question.rows, value) for value in cross.rows]


def heading(cross: Cross) -> str:
    """What a table is of: ``ratio 40%``, or everything."""
    if cross.only is None:
        return "All trials" if cross.question.by is None else f"Over all of {axis_title(cross.question.by)}"
    name, value = cross.only
    text = named_text(name, value)
    return text if text.startswith(axis_title(name)) else f"{axis_title(name)} {text}"


def measure(question: Question) -> str:
    """What cells hold, in one phrase, which a plot's colour bar can carry."""
    column, points = question.metric.column, question.metric.column.style == "accuracy"
    what = "ratio" if question.metric.ratio else f"difference{' in points' if points else ''}"
    to = "to" if question.metric.ratio else "from"
    return f"{column.title}, {what} {to} {reference_text(question)}"


def reference_text(question: Question) -> str:
    if not question.relative:
        return DENSE
    return ", ".join(f"{axis_title(name)} {setting_text(name, value)}" for name, value in question.relative.items())


def protocol(question: Question, tables: Sequence[Cross]) -> list[str]:
    """How all tables were made, in sentences; the last is the evaluator's own protocol."""
    column = question.metric.column
    mean = "geometric mean of the ratio to" if question.metric.ratio else "mean difference from"
    other = f"the trial with {reference_text(question)} and otherwise the same settings"
    to = other if question.relative else "the dense model in the same trial"
    better = f" {column.better.capitalize()} is better." if column.better else ""
    unit = " In points of accuracy." if column.style == "accuracy" else ""
    said = [
        f"{_name(column)}: {mean} {to}, over matched trials; least to largest trial, number of trials n.{unit}{better}"
    ]
    inside = [name for name in question.relative if name not in (question.rows, question.columns, question.by)]
    if inside:
        named = " and ".join(map(axis_title, inside))
        said.append(
            f"{named} is averaged over: the reference's own trials, of no difference, are among those averaged."
        )
    found = Protocols()
    found.of(column.label, [trial for cross in tables for trial in cross.trials])
    for label, known in found.by_label.items():
        said.append(f"{label}: " + "; ".join(f"{name}: {value}" for name, value in known.items()))
    return said


def notes(cross: Cross) -> list[str]:
    """What one table is averaged over, what it leaves out, and what its marks rest on."""
    cells, count = [cell for cell in cross.cells.values() if cell.effects], cross.settings
    over = "; ".join(f"{axis_title(name)} ({_values(name, cross)})" for name in cross.over)
    per = f"{count} setting{'s' * (count != 1)} in each cell"
    total = sum(len(cell.effects) for cell in cells)
    said = [f"Averaged over {over or 'nothing'}: {per}, {total:,} trials in {len(cells)} cells."]
    if cross.left_out:
        few = [place for place, cell in cross.cells.items() if cell.effects and not cell.spare]
        fewest = f"; no more are in {_named(cross, few)}" if few else ""
        said.append(
            f"Only settings that all of these cells have are averaged: {cross.left_out} of {cross.left_out + count} "
            f"are left out{fewest}."
        )
    apart = [place for place, cell in cross.cells.items() if cell.spare and not cell.effects]
    if apart:
        said.append(f"No setting in common with the other cells, so left empty: {_named(cross, apart)}.")
    for why in dict.fromkeys(why for cell in cross.cells.values() for why in cell.troubles):
        places = [place for place, cell in cross.cells.items() if why in cell.troubles]
        total = sum(cross.cells[place].troubles[why] for place in places)
        said.append(f"{total} trial{'s' * (total != 1)} {why}: {_named(cross, places)}.")
    if cross.outside:
        axes = " or ".join(map(axis_title, (cross.question.rows, cross.question.columns)))
        said.append(f"{cross.outside} trial{'s' * (cross.outside != 1)} without {axes}: in no cell.")
    said += [f"Measured otherwise than the reference, which does not compare: {text}." for text in cross.unlike]
    return said + _marks(cross)


def _marks(cross: Cross) -> list[str]:
    marks, question, said = cross.marks, cross.question, []
    if marks.best:
        each = f" of each {' and '.join(map(axis_title, marks.apart))}" if marks.apart else ""
        own = bool(question.relative) and not {question.rows, question.columns} - {*marks.apart} <= set(
            question.relative
        )
        gain = " by its own reference: the largest gain, which need not be the best result" * own
        best = f"{BEST} best mean{each}{gain}"
        if not marks.tested:
            said.append(f"{best}; one group of model and text, and too few seeds, allow no test of how sure it is.")
        else:
            said.append(f"{best}; {TIED} not told from it: {_test(cross)}.")
    if marks.bounds:
        said.append(f"Computes no less than the dense model, so no contender: {_named(cross, marks.bounds)}.")
    return said


def _test(cross: Cross) -> str:
    marks = cross.marks
    axes = " x ".join(map(axis_title, marks.axes))
    within = f", each the mean over {' and '.join(map(axis_title, marks.within))}" if marks.within else ""
    units = f"{marks.tested} {'groups' if marks.units == 'group' else 'seeds'} ({axes}{within})"
    few = (
        f"; {marks.tested} groups are too few for much" if marks.units == "group" and marks.tested < FEW_GROUPS else ""
    )
    limits = (
        "groups are taken as independent" if marks.units == "group" else "it says nothing of other models and texts"
    )
    return (
        f"Student's 95% interval of the paired differences over {units} holds 0; {limits}{few}; "
        "it is not corrected for the number of cells"
    )


def markdown(grid: Grid, question: Question, tables: Sequence[Cross], plots: Sequence[tuple[str, str]]) -> str:
    """pivot.md; ``plots`` are names and captions of the tables' drawings, in their order."""
    lines = [f"# {grid.findings.title}: {measure(question)}", ""]
    for cross, (name, caption) in zip(tables, plots, strict=True):
        lines += [f"## {heading(cross)}", "", *markdown_table(head(cross), _markdown_rows(cross)), ""]
        lines += [*(f"- {text}" for text in notes(cross)), "", f"![{caption}](plots/{name}.png)", ""]
    lines += ["## How it was measured", "", *(f"- {text}" for text in protocol(question, tables))]
    lines += [f"- **{name}**: {text}" for name, text in facts(grid.findings)]
    return "\n".join([*lines, "", "pivot.csv holds the same cells as numbers.", ""])


def pivot_csv(question: Question, tables: Sequence[Cross]) -> str:
    """One row for each cell of each table."""
    troubles = list(dict.fromkeys(why for cross in tables for cell in cross.cells.values() for why in cell.troubles))
    kind = "ratio" if question.metric.ratio else "difference"
    what = ["metric", "relative_to", "kind", question.by or "by", question.rows, question.columns]
    counted = ["trials", "planned", "not_shared", *(why.replace(" ", "_") for why in troubles)]
    lines = [[*what, "value", "least", "largest", *counted, "mark"]]
    for cross in tables:
        for (i, j), cell in cross.cells.items():
            place = ["all" if cross.only is None else cross.only[1], cross.rows[i], cross.columns[j]]
            numbers = [cell.value, cell.least, cell.largest, len(cell.effects), cell.planned, cell.spare]
            said = {BEST: "best", TIED: "not told from the best"}.get(mark(cross, (i, j)), "")
            counts = [cell.troubles.get(why, 0) for why in troubles]
            lines.append([question.metric.column.key, reference_text(question), kind, *place, *numbers, *counts, said])
    return csv_text(lines)


def _markdown_rows(cross: Cross) -> list[list[str]]:
    rows = []
    for i, name in enumerate(row_names(cross)):
        cells = []
        for j in range(len(cross.columns)):
            value, spread = value_text(cross, (i, j)), spread_text(cross, (i, j))
            value = f"**{value}**" if (i, j) in cross.marks.best else value
            cells.append(f"{value} ({spread})" if spread else value)
        rows.append([name, *cells])
    return rows


def _name(column: Column) -> str:
    said = f"{column.key}, {column.title}" if column.title.replace(" ", "_") not in column.key else column.key
    return f"{said} ({column.meaning})" if column.meaning else said


def _values(name: str, cross: Cross) -> str:
    return ", ".join(setting_text(name, value) for value in cross.over[name])


def _named(cross: Cross, places: Sequence[Place]) -> str:
    question = cross.question
    names = [
        f"{setting_text(question.rows, cross.rows[i])} x {setting_text(question.columns, cross.columns[j])}"
        for i, j in places[:MOST_NAMED]
    ]
    more = len(places) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
