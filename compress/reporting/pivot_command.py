"""``prunekit pivot``: cross tables on the terminal, as Markdown, CSV and heat maps."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.colors import Normalize
from rich.text import Text

from ..output import printing
from ..output.folders import RunFolder
from ..output.formatting import number
from ..output.formatting import table as markdown_table
from .axes import axis_title, setting_text
from .command import write
from .pivot import DENSE, Cross, Grid, Place, Question, cross, join
from .plots import bare
from .protocols import Protocols, summary_facts
from .style import MUTED, PAPER, WIDTH, Plot, drawing, finished, heat_colours, ink_on
from .tables import csv_text
from .trials import read

PAGE = "pivot.md"
ELSEWHERE = "--out DIR writes them all"
BEST, TIE, ABOVE = "◆", "◇", "†"
"""Marks of the best cell, of those not significantly worse, and of those that compute no less than dense."""
FEW_GROUPS = 4
"""Fewer groups than this give very wide intervals, which the table then states."""
CELL = 1.15
"""Inches across a heat map's cell."""
WRAP, SMALL = 16, 26
"""Characters in a line of a column's title, and of the text below a value."""


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
        show(table)
    for line in protocol(question, tables):
        printing.say(line)
    if folder:
        plots = heat_maps(question, tables)
        files = {PAGE: markdown(grid, question, tables, plots), "pivot.csv": pivot_csv(question, tables)}
        write(folder, files, plots)
        printing.say(f"cross table: {folder.target / PAGE}", whole=True)


def measure(question: Question) -> str:
    """What the cells contain, in one phrase."""
    points = " in points" if question.metric.style == "accuracy" else ""
    what = "ratio to" if question.ratio else f"difference{points} from"
    return f"{question.metric.title}, {what} {reference_text(question)}"


def reference_text(question: Question) -> str:
    return ", ".join(f"{axis_title(n)} {setting_text(n, v)}" for n, v in question.relative.items()) or DENSE


def heading(table: Cross) -> str:
    """What a table is of: ``ratio 40%``, or all trials."""
    if table.only is None:
        by = table.question.by
        return "All trials" if by is None else f"Over all of {axis_title(by)}"
    return f"{axis_title(table.only[0])} {setting_text(*table.only)}"


def value_text(question: Question, value: float) -> str:
    """A cell's value: a ratio, points of accuracy, or another difference."""
    if value != value:
        return "-"
    if question.ratio:
        return f"{value:.3f}" if 0.01 <= value < 100 else number(value)
    return f"{100 * value:+.1f}" if question.metric.style == "accuracy" else f"{value:+.3g}"


def mark(table: Cross, place: Place) -> str:
    marks = table.marks
    for text, places in ((BEST, marks.best), (TIE, marks.ties), (ABOVE, marks.above_dense)):
        if place in places:
            return text
    return ""


def cell_lines(table: Cross, place: Place) -> list[str]:
    """Value and mark; least to largest; number of trials and why others are missing."""
    question, cell = table.question, table.cells[place]
    lines = [" ".join(filter(None, (value_text(question, cell["value"]), mark(table, place))))]
    if cell["trials"] > 1:
        lines.append(f"{value_text(question, cell['least'])} to {value_text(question, cell['largest'])}")
    parts = [f"n {cell['trials']}"] if cell["trials"] else []
    parts += [f"{cell[reason]} {reason}" for reason in table.reasons if cell[reason]]
    parts += ["shares no setting with the others"] if cell["not_shared"] and not cell["trials"] else []
    said = ", ".join(parts)
    return lines + [said] * bool(said)


def titles(table: Cross) -> list[str]:
    """Titles of the columns; the first names both axes."""
    rows, columns = table.question.rows, table.question.columns
    return [f"{axis_title(rows)} \\ {axis_title(columns)}", *(setting_text(columns, value) for value in table.columns)]


def row_names(table: Cross) -> list[str]:
    return [setting_text(table.question.rows, value) for value in table.rows]


def notes(table: Cross) -> list[str]:
    """Two sentences: what a cell is the mean of, and what the marks mean."""
    over = "; ".join(f"{axis_title(n)} ({', '.join(setting_text(n, v) for v in vs)})" for n, vs in table.over.items())
    settings, cells = table.settings, sum(cell["trials"] > 0 for cell in table.cells.values())
    text = f"Averaged over {over or 'nothing'}: {settings} setting{'s' * (settings != 1)} in each cell, "
    text += f"{len(table.trials):,} trials in {cells} cells"
    if table.left_out:
        text += f"; {table.left_out} of {table.left_out + settings} settings are left out, as some cells lack them"
    if table.outside:
        text += f"; {table.outside} trial{'s' * (table.outside > 1)} without a value of both axes"
    marks = _marks(table)
    return [f"{text}.", *([f"{marks}."] if marks else [])]


def _marks(table: Cross) -> str:
    marks, question, said = table.marks, table.question, []
    if marks.best:
        each = f" of each {' and '.join(map(axis_title, marks.apart))}" if marks.apart else ""
        compared = {question.rows, question.columns} - {*marks.apart}
        own = bool(question.relative) and not compared <= {*question.relative}
        gain = " (the largest gain over its own reference, which need not be the best result)" * own
        said.append(f"{BEST} best mean{each}{gain}")
        if marks.tested:
            said.append(f"{TIE} not significantly worse: {_test(table)}")
        else:
            said.append("one group of model and text and fewer than three seeds allow no test")
    if marks.above_dense:
        said.append(f"{ABOVE} computes no less than the dense model, not ranked")
    return "; ".join(said)


def _test(table: Cross) -> str:
    marks, groups = table.marks, table.marks.unit == "group"
    axes = " x ".join(map(axis_title, marks.axes))
    within = f", each the mean over {' and '.join(map(axis_title, marks.within))}" if marks.within else ""
    few = ", very few," if groups and marks.tested < FEW_GROUPS else ""
    limit = "groups are taken as independent" if groups else "seeds show nothing about other models and texts"
    return (
        f"the paired 95% interval (Student's t) over {marks.tested} {marks.unit}s ({axes}{within}){few} includes 0; "
        f"{limit}, and the number of cells is not corrected for"
    )


def protocol(question: Question, tables: Sequence[Cross]) -> list[str]:
    """How all tables were made, and the evaluator's protocol."""
    metric = question.metric
    name = metric.key if metric.title.replace(" ", "_") in metric.key else f"{metric.key}, {metric.title}"
    meaning = f" ({metric.meaning})" if metric.meaning else ""
    mean = "geometric mean of the ratio to" if question.ratio else "mean difference from"
    other = f"the trial with {reference_text(question)} and otherwise the same settings"
    unit = " In points of accuracy." if metric.style == "accuracy" else ""
    better = f" {metric.better.capitalize()} is better." if metric.better else ""
    said = [
        f"{name}{meaning}: {mean} {other if question.relative else 'the dense model in the same trial'}, over matched "
        f"trials; least to largest trial, number of trials n.{unit}{better}"
    ]
    inside = [name for name in question.relative if name not in (question.rows, question.columns, question.by)]
    if inside:
        named = " and ".join(map(axis_title, inside))
        said.append(f"{named} is averaged over: the reference's own trials, with no difference, are included.")
    different = dict.fromkeys(text for table in tables for text in table.not_comparable)
    said += [f"Measured differently from the reference, which does not compare: {text}." for text in different]
    found = Protocols()
    found.of(metric.label, [trial for table in tables for trial in table.trials])
    for label, known in found.by_label.items():
        said.append(f"{label}: " + "; ".join(f"{name}: {value}" for name, value in known.items()))
    return said


def show(table: Cross) -> None:
    """One table on the terminal with its notes; without the extremes where it is too wide for them."""
    names, head = row_names(table), titles(table)
    grid = [[cell_lines(table, (i, j)) for j in range(len(table.columns))] for i in range(len(names))]
    widths = [max(len(text) for row in grid for text in (head[j + 1], *row[j])) for j in range(len(table.columns))]
    narrow = printing.out.is_terminal and sum(widths) + 3 * len(widths) + max(map(len, (head[0], *names))) > (
        printing.out.width
    )
    rows: list[list[str | Text]] = []
    for i, (name, lines) in enumerate(zip(names, grid, strict=True)):
        rows.append([name])
        for j, (first, *others) in enumerate(lines):
            text = Text(first, style="bold" if (i, j) in table.marks.best else "")
            others = others[-1:] if narrow else others
            rows[-1].append(text.append("".join(f"\n{line}" for line in others), style="not bold dim"))
    printing.say(f"\n{heading(table)}")
    printing.show_wide_table(head, rows, 1, ELSEWHERE)
    for line in [*([f"Too narrow for least and largest: {ELSEWHERE}."] if narrow else []), *notes(table)]:
        printing.say(line)


def markdown(grid: Grid, question: Question, tables: Sequence[Cross], plots: Sequence[Plot]) -> str:
    """pivot.md."""
    lines = [f"# {grid.study.title}: {measure(question)}", ""]
    for table, plot in zip(tables, plots, strict=True):
        rows = [[name] for name in row_names(table)]
        for i, j in table.cells:
            first, *others = cell_lines(table, (i, j))
            value = f"**{first}**" if (i, j) in table.marks.best else first
            rows[i].append(f"{value} ({', '.join(others)})" if others else value)
        lines += [f"## {heading(table)}", "", *markdown_table(titles(table), rows), "", *notes(table), ""]
        lines += [f"![{plot.title}](plots/{plot.name}.png)", ""]
    lines += ["## How it was measured", "", *(f"- {text}" for text in protocol(question, tables))]
    lines += [f"- **{name}**: {text}" for name, text in summary_facts(grid.study)]
    return "\n".join([*lines, "", "pivot.csv holds the same cells as numbers.", ""])


def pivot_csv(question: Question, tables: Sequence[Cross]) -> str:
    """One row for each cell of each table."""
    kind, marks = "ratio" if question.ratio else "difference", {BEST: "best", TIE: "not significantly worse"}
    reasons = list(dict.fromkeys(reason for table in tables for reason in table.reasons))
    numbers = ["value", "least", "largest", "trials", "planned", "not_shared", *reasons]
    rows: list[list[Any]] = []
    for table in tables:
        only = "all" if table.only is None else table.only[1]
        for (i, j), cell in table.cells.items():
            what = [question.metric.key, reference_text(question), kind, only, table.rows[i], table.columns[j]]
            rows.append([*what, *(cell.get(name, 0) for name in numbers), marks.get(mark(table, (i, j)), "")])
    head = ["metric", "relative_to", "kind", question.by or "by", question.rows, question.columns]
    head += [name.replace(" ", "_") for name in numbers]
    return csv_text(pd.DataFrame(rows, columns=[*head, "mark"], dtype=object))


def heat_maps(question: Question, tables: Sequence[Cross]) -> list[Plot]:
    """A heat map for each table; brighter is better, and all have the same scale."""
    effects = [e for table in tables for cell in table.cells.values() if (e := cell["effect"]) == e]
    low, high = min(effects, default=0.0), max(effects, default=1.0)
    ends = (low, high if high > low else low + 1)
    return [_heat_map(table, name, ends) for table, name in zip(tables, _file_names(tables), strict=True)]


def _file_names(tables: Sequence[Cross]) -> list[str]:
    """``pivot``, ``pivot-ratio-40``; numbered where they would be the same."""
    found: list[str] = []
    for table in tables:
        words = [] if table.only is None else re.findall(r"[a-z0-9]+", heading(table).lower())
        name = "-".join(["pivot", *words])
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def _heat_map(table: Cross, name: str, ends: tuple[float, float]) -> Plot:
    scale, question, colours = Normalize(*ends), table.question, heat_colours(table.question.metric.better == "lower")
    width, height = len(table.columns), len(table.rows)
    with drawing(max(WIDTH, 1.6 + CELL * width), height=1.5 + 0.42 * height) as figure:
        panel = figure.subplots()
        effects = [[table.cells[i, j]["effect"] for j in range(width)] for i in range(height)]
        mesh = panel.pcolormesh(effects, cmap=colours, norm=scale, edgecolors=PAPER, linewidth=0.8)
        bare(panel)
        panel.set_xticks(
            [j + 0.5 for j in range(width)], ["\n".join(textwrap.wrap(t, WRAP)) for t in titles(table)[1:]]
        )
        panel.set_yticks([i + 0.5 for i in range(height)], row_names(table))
        panel.set(xlabel=axis_title(question.columns), ylabel=axis_title(question.rows), title=heading(table))
        panel.invert_yaxis()
        for (i, j), cell in table.cells.items():
            ink = ink_on(colours(scale(cell["effect"]))) if cell["trials"] else MUTED
            value, *others = cell_lines(table, (i, j))
            below = "\n".join(line for text in others for line in textwrap.wrap(text, SMALL))
            weight = "bold" if (i, j) in table.marks.best else "normal"
            at: dict[str, Any] = {"ha": "center", "color": ink}
            panel.text(j + 0.5, i + (0.3 if below else 0.5), value, va="center", fontsize=8, weight=weight, **at)
            panel.text(j + 0.5, i + 0.5, below, va="top", fontsize=5.5, linespacing=1.1, **at)
        bar = figure.colorbar(mesh, ax=panel, location="bottom", shrink=0.6, aspect=40, pad=0.02)
        bar.outline.set_visible(False)
        ticks = [ends[0] + (ends[1] - ends[0]) * step / 4 for step in range(5)]
        bar.set_ticks(ticks, labels=[value_text(question, exp(t) if question.ratio else t) for t in ticks])
        bar.set_label(measure(question))
        return finished(figure, name, f"{measure(question)}: {heading(table)}", " ".join(notes(table)), wide=True)
