"""Cross tables as heat maps, on one scale of colour."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from math import exp
from typing import Any

from matplotlib.colors import Colormap, Normalize

from .figures import MUTED, PAPER, WIDTH, Plot, drawing, finished
from .findings import axis_title
from .pivot import Cross
from .pivot_records import Place, Question
from .pivot_text import head, heading, measure, notes, row_names, spread_text, text_of, value_text
from .plot_layers import colormap, ink_on

CELL = 1.15
"""Inches across a cell: its value above its spread."""

WRAP, SMALL = 16, 26
"""Characters in a line of a column's title, and of what stands below a value."""


def pivot_plots(question: Question, tables: Sequence[Cross]) -> list[Plot]:
    """A heat map for each table; brighter is better, and all have the same scale."""
    effects = [cell.effect for cross in tables for cell in cross.cells.values() if cell.effect is not None]
    low, high = min(effects, default=0.0), max(effects, default=1.0)
    scale = Normalize(low, high if high > low else low + 1)
    colours = colormap().reversed() if question.metric.column.better == "lower" else colormap()
    names = _names(tables)
    return [_heat_map(cross, name, scale, colours) for cross, name in zip(tables, names, strict=True)]


def _names(tables: Sequence[Cross]) -> list[str]:
    """File names: ``pivot``, ``pivot-ratio-40``; a number after those that would be the same."""
    found: list[str] = []
    for cross in tables:
        words = "" if cross.only is None else heading(cross)
        name = "-".join(["pivot", *re.findall(r"[a-z0-9]+", words.lower())])
        found.append(name if name not in found else f"{name}-{len(found) + 1}")
    return found


def _heat_map(cross: Cross, name: str, scale: Normalize, colours: Colormap) -> Plot:
    question = cross.question
    effects = [[cross.cells[i, j].effect for j in range(len(cross.columns))] for i in range(len(cross.rows))]
    shown = [[float("nan") if effect is None else effect for effect in row] for row in effects]
    with drawing(max(WIDTH, 1.6 + CELL * len(cross.columns)), 1.5 + 0.42 * len(cross.rows)) as figure:
        panel = figure.subplots()
        mesh = panel.pcolormesh(shown, cmap=colours, norm=scale, edgecolors=PAPER, linewidth=0.8)
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        titles = ["\n".join(textwrap.wrap(title, WRAP)) for title in head(cross)[1:]]
        panel.set_xticks([j + 0.5 for j in range(len(titles))], titles)
        panel.set_yticks([i + 0.5 for i in range(len(cross.rows))], row_names(cross))
        panel.set(xlabel=axis_title(question.columns), ylabel=axis_title(question.rows), title=heading(cross))
        panel.invert_yaxis()
        for place in cross.cells:
            _write(panel, cross, place, colours, scale)
        bar = figure.colorbar(mesh, ax=panel, location="bottom", shrink=0.6, aspect=40, pad=0.02)
        bar.outline.set_visible(False)
        _ticks(bar, question, scale)
        bar.set_label(measure(question))
        caption = " ".join(notes(cross))
        return finished(figure, name, f"{measure(question)}: {heading(cross)}", caption, wide=True)


def _write(panel: Any, cross: Cross, place: Place, colours: Colormap, scale: Normalize) -> None:
    """A cell's value and mark, and below it its spread; what has no value is muted."""
    effect, (i, j) = cross.cells[place].effect, place
    ink = MUTED if effect is None else ink_on(colours(scale(effect)))
    weight = "bold" if place in cross.marks.best else "normal"
    at = {"ha": "center", "color": ink}
    parts = spread_text(cross, place).replace(", n ", "\nn ").splitlines()
    lines = [line for part in parts for line in textwrap.wrap(part, SMALL)]
    panel.text(
        j + 0.5, i + (0.3 if lines else 0.5), value_text(cross, place), va="center", fontsize=8, weight=weight, **at
    )
    panel.text(j + 0.5, i + 0.5, "\n".join(lines), va="top", fontsize=5.5, linespacing=1.1, **at)


def _ticks(bar: Any, question: Question, scale: Normalize) -> None:
    """Ratios are drawn by their logarithms and named by themselves."""
    ticks = [scale.vmin + (scale.vmax - scale.vmin) * step / 4 for step in range(5)]
    ratio = question.metric.ratio
    bar.set_ticks(ticks, labels=[text_of(question, exp(tick) if ratio else tick) for tick in ticks])
