"""Cross tables as text, files and heat maps: what ``prunekit pivot`` prints and writes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from rich.text import Text

from ..output import printing
from ..output.folders import RunFolder
from ..output.formatting import markdown_text
from ..output.formatting import table as markdown_table
from .axes import axis_title, finite, setting_text
from .command import write
from .metrics import REMOVED, unequal
from .pivot import ABOVE, BEST, DENSE, FEW_GROUPS, ROUNDING, TIE, Cross, Grid, Marks, Place, Question, cross, join
from .protocols import Protocols, summary_facts
from .style import HEAT, MUTED, WIDTH, Plot, colour_bar, drawing, finished, heat_map, ink_on
from .tables import csv_text
from .trials import read

PAGE = "pivot.md"
CELL, WRAP, SMALL = 1.15, 16, 26
"""Inches across a heat map's cell; characters in a line of a column's title, and of the text below a value."""


def pivot(
    stores: Sequence[Path],
    rows: str,
    columns: str,
    by: str | None = None,
    metric: str | None = None,
    relative: str = DENSE,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Print the cross tables of one store or several; with ``out`` write them and their heat maps there.

    Raises :class:`SpecError` or :class:`StoreError` for a source without finished trials, for axes, values or metrics
    that it does not have, and if the folder exists or cannot be written; no part of it is left.
    """
    folder = RunFolder(Path(out), overwrite, what="cross table", marker=PAGE) if out else None
    if folder:
        folder.check()
    grid = join([read(store) for store in stores])
    question = grid.question(rows, columns, by, metric, relative)
    tables = cross(grid, question)
    printing.say(measure(question))
    for table in tables:
        _show(table)
    for line in protocol(question, tables):
        printing.say(line)
    if folder:
        plots = _heat_maps(question, tables)
        files = {PAGE: _markdown(grid, question, tables, plots), "pivot.csv": pivot_csv(question, tables)}
        write(folder, files, plots)
        printing.say(f"cross table: {folder.target / PAGE}", whole=True)


def measure(question: Question) -> str:
    """What the cells contain, in one phrase."""
    points = " in points" if question.metric.style == "accuracy" else ""
    what = "ratio to" if question.ratio else f"difference{points} from"
    return f"{question.metric.title}, {what} {question.reference}"


def heading(table: Cross) -> str:
    """What a table is of: ``ratio 40%``, or all trials."""
    if table.only:
        return f"{axis_title(table.only[0])} {setting_text(*table.only)}"
    return f"Over all of {axis_title(table.question.by)}" if table.question.by else "All trials"


def cell_lines(table: Cross, place: Place) -> list[str]:
    """Value and mark; least to largest; number of trials and why others are missing."""
    text, cell = table.question.text, table.cells[place]
    lines = [f"{text(cell['value'])} {_symbol(table, place)}".rstrip()]
    if cell["trials"] > 1:
        lines.append(f"{text(cell['least'])} to {text(cell['largest'])}")
    parts = [f"n {cell['trials']}"] if cell["trials"] else []
    parts += [f"{cell[reason]} {reason}" for reason in table.reasons if cell[reason]]
    parts += ["shares no setting with the others"] if cell["not_shared"] and not cell["trials"] else []
    removed = finite(cell["removed"])
    cut = "" if removed is None else f"{REMOVED.text(removed)} removed"
    return [*lines, *filter(None, (", ".join(parts), cut))]


def _symbol(table: Cross, place: Place) -> str:
    marks = {BEST: table.marks.best, TIE: table.marks.ties, ABOVE: table.marks.above_dense}
    return next((symbol for symbol, places in marks.items() if place in places), "")


def notes(table: Cross) -> list[str]:
    """Sentences: what a cell is the mean of, what the marks mean, and whether the cells' costs are unequal."""
    marks, question = table.marks, table.question
    over = "; ".join(f"{axis_title(n)} ({', '.join(setting_text(n, v) for v in vs)})" for n, vs in table.over.items())
    cells = sum(cell["trials"] > 0 for cell in table.cells.values())
    averaged = f"Averaged over {over}" if over else "Nothing is averaged"
    text = f"{averaged}: {table.settings} setting{'s' * (table.settings != 1)} in each cell, "
    text += f"{len(table.trials):,} trials in {cells} cells"
    if table.left_out:
        every = table.left_out + table.settings
        text += f"; {table.left_out} of {every} settings are left out, as some cells lack them"
    if table.outside:
        text += f"; trials without a value of both axes: {table.outside}"
    parts = []
    if marks.best:
        each = f" of each {' and '.join(map(axis_title, marks.apart))}" if marks.apart else ""
        compared = {question.rows, question.columns} - {*marks.apart}
        own = bool(question.relative) and not compared <= {*question.relative}
        gain = " (the largest gain over its own reference, which need not be the best result)" * own
        parts.append(f"{BEST} best mean{each}{gain}")
        parts.append(_test(marks))
    if marks.above_dense:
        parts.append(f"{ABOVE} computes no less than the dense model, not ranked")
    return [f"{text}.", *([f"{'; '.join(parts)}."] if parts else []), *_unequal(table)]


def _unequal(table: Cross) -> list[str]:
    """A sentence where cells that compare removed unequal shares of the decoder's parameters."""
    question, apart = table.question, table.marks.apart
    contests: dict[Place, list[float]] = {}
    for (i, j), cell in table.cells.items():
        if (removed := finite(cell["removed"])) is not None:
            place = i if question.rows in apart else -1, j if question.columns in apart else -1
            contests.setdefault(place, []).append(removed)
    low, high = max(
        ((min(each), max(each)) for each in contests.values()), key=lambda ends: ends[1] - ends[0], default=(0.0, 0.0)
    )
    if not unequal(low, high):
        return []
    ends = f"{REMOVED.text(low)} to {REMOVED.text(high)}"
    return [f"At unequal cost: cells that are compared removed {ends} of the decoder's parameters."]


def _test(marks: Marks) -> str:
    if not marks.tested:
        return "one group of model and text and fewer than three seeds allow no test"
    axes = " x ".join(map(axis_title, marks.axes))
    within = f", each the mean over {' and '.join(map(axis_title, marks.within))}" if marks.within else ""
    groups = marks.unit == "group"
    few = ", very few," if groups and marks.tested < FEW_GROUPS else ""
    limit = "groups are taken as independent" if groups else "seeds show nothing about other models and texts"
    return (
        f"{TIE} not significantly worse: the paired 95% interval (Student's t) over {marks.tested} {marks.unit}s "
        f"({axes}{within}){few} includes 0; {limit}, and the number of cells is not corrected for"
    )


def protocol(question: Question, tables: Sequence[Cross]) -> list[str]:
    """How all tables were made, and the evaluator's protocol."""
    metric = question.metric
    other = f"the trial with {question.reference} and otherwise the same settings"
    mean = "geometric mean of the ratio to" if question.ratio else "mean difference from"
    better = f" {metric.better.capitalize()} is better." if metric.better else ""
    lines = [
        f"{metric.key}: {mean} {other if question.relative else 'the dense model in the same trial'}, over matched "
        f"trials; least to largest trial, number of trials n.{better}"
    ]
    if inside := [n for n in question.relative if n not in (question.rows, question.columns, question.by)]:
        named = " and ".join(map(axis_title, inside))
        lines.append(f"{named} is averaged over: the reference's own trials, with no difference, are included.")
    different = dict.fromkeys(text for table in tables for text in table.not_comparable)
    lines += [f"Measured differently from the reference, which does not compare: {text}." for text in different]
    found = Protocols()
    found.of(metric.label, [trial for table in tables for trial in table.trials])
    for label, known in found.by_label.items():
        lines.append(f"{label}: " + "; ".join(f"{name}: {value}" for name, value in known.items()))
    return lines


def _show(table: Cross) -> None:
    """One table on the terminal with its notes."""
    rows: list[list[str | Text]] = []
    for name, places in table.lines:
        rows.append([name])
        for place in places:
            first, *others = cell_lines(table, place)
            text = Text(first, style="bold" if place in table.marks.bold else "")
            rows[-1].append(text.append("".join(f"\n{line}" for line in others), style="not bold dim"))
    printing.say(f"\n{heading(table)}")
    printing.show_wide_table(table.head, rows, 1, "--out DIR writes them all")
    for line in notes(table):
        printing.say(line)


def _markdown(grid: Grid, question: Question, tables: Sequence[Cross], plots: Sequence[Plot]) -> str:
    """pivot.md."""
    text = markdown_text
    lines = [f"# {text(grid.study.title)}: {text(measure(question))}", ""]
    for table, plot in zip(tables, plots, strict=True):
        rows = []
        for name, places in table.lines:
            rows.append([text(name)])
            for place in places:
                first, *others = cell_lines(table, place)
                value = f"**{first}**" if place in table.marks.bold else first
                rows[-1].append(f"{value} ({', '.join(others)})" if others else value)
        head = markdown_table([*map(text, table.head)], rows)
        lines += [f"## {text(heading(table))}", "", *head, "", *map(text, notes(table)), ""]
        lines += [f"![{text(plot.title)}](plots/{plot.name}.png)", ""]
    lines += ["## How it was measured", "", *(f"- {text(line)}" for line in protocol(question, tables))]
    lines += [f"- **{name}**: {text(fact)}" for name, fact in summary_facts(grid.study)]
    return "\n".join([*lines, "", "pivot.csv holds the same cells as numbers.", ""])


def pivot_csv(question: Question, tables: Sequence[Cross]) -> str:
    """One row for each cell of each table."""
    marks, rows = {BEST: "best", TIE: "not significantly worse"}, []
    reasons = list(dict.fromkeys(reason for table in tables for reason in table.reasons))
    numbers = ["value", "least", "largest", "removed", "trials", "planned", "not_shared", *reasons]
    for table in tables:
        for (i, j), cell in table.cells.items():
            rows.append({
                "metric": question.metric.key, "relative_to": question.reference,
                "kind": "ratio" if question.ratio else "difference",
                question.by or "by": table.only[1] if table.only else "all",
                question.rows: table.rows[i], question.columns: table.columns[j],
                **{name.replace(" ", "_"): cell.get(name, 0) for name in numbers},
                "mark": marks.get(_symbol(table, (i, j)), ""),
            })  # fmt: skip
    return csv_text(pd.DataFrame(rows, dtype=object))


def _heat_maps(question: Question, tables: Sequence[Cross]) -> list[Plot]:
    """A heat map for each table; darker is better, and all have the same scale."""
    effects = [e for table in tables for cell in table.cells.values() if (e := finite(cell["effect"])) is not None]
    low, high = min(effects, default=0.0), max(effects, default=1.0)
    words = [re.findall(r"[a-z0-9]+", heading(table).lower()) if table.only else [] for table in tables]
    names = ["-".join(["pivot", *each]) for each in words]
    names = [name if names.index(name) == i else f"{name}-{i + 1}" for i, name in enumerate(names)]
    return [_heat_map(t, name, (low, max(high, low + ROUNDING))) for t, name in zip(tables, names, strict=True)]


def _heat_map(table: Cross, name: str, ends: tuple[float, float]) -> Plot:
    question, colours = table.question, HEAT.reversed() if table.question.metric.better == "lower" else HEAT
    width, height = len(table.columns), len(table.rows)
    with drawing(max(WIDTH, 1.6 + CELL * width), height=1.5 + 0.42 * height) as figure:
        panel = figure.subplots()
        effects = [[table.cells[place]["effect"] for place in places] for _, places in table.lines]
        columns = ["\n".join(textwrap.wrap(title, WRAP)) for title in table.head[1:]]
        mesh = heat_map(panel, effects, colours, ends, columns, [row for row, _ in table.lines])
        panel.set(xlabel=axis_title(question.columns), ylabel=axis_title(question.rows), title=heading(table))
        panel.invert_yaxis()
        for (i, j), cell in table.cells.items():
            ink = ink_on(colours(Normalize(*ends)(cell["effect"]))) if cell["trials"] else MUTED
            value, *others = cell_lines(table, (i, j))
            below = "\n".join(line for text in others for line in textwrap.wrap(text, SMALL))
            weight = "bold" if (i, j) in table.marks.bold else "normal"
            at: dict[str, Any] = {"ha": "center", "color": ink}
            panel.text(j + 0.5, i + (0.3 if below else 0.5), value, va="center", fontsize=8, weight=weight, **at)
            panel.text(j + 0.5, i + 0.5, below, va="top", fontsize=5.5, linespacing=1.1, **at)
        bar = colour_bar(figure, mesh, panel, measure(question), shrink=0.6)
        ticks = np.linspace(*ends, 5).tolist()
        bar.set_ticks(ticks, labels=[question.text(exp(t) if question.ratio else t) for t in ticks])
        return finished(figure, name, f"{measure(question)}: {heading(table)}", " ".join(notes(table)), wide=True)
