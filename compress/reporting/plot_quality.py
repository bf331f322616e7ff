"""Quality against what it costs, and quality by ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ..output.formatting import share
from .aggregate import RATIO, USE, Table
from .columns import Column
from .configurations import Configuration
from .figures import COLOURS, FILLS, INK, LINES, MARKERS, MUTED, Plot, drawing, finished, percent, safe_name
from .findings import finite, named_text, setting_text

LOG_FROM = 20
"""Largest value over smallest from which an axis is logarithmic."""

COSTS = ("latency.prefill_ratio", "cost.flops_ratio")
EDGE = 1.6
"""Where points are drawn that cost far more than the dense model, with their value beside them."""
APART = 0.05
"""Least distance of two such values from each other, in heights of the drawing; closer ones share a line."""


@dataclass(frozen=True)
class Style:
    """How a configuration's series is drawn: colour and marker by its first setting, fill and line by the others."""

    first: int
    second: int

    @property
    def marker(self) -> dict[str, Any]:
        colour = COLOURS[self.first % len(COLOURS)]
        fill = FILLS[self.second % len(FILLS)]
        return {
            "marker": MARKERS[self.first % len(MARKERS)],
            "color": colour,
            "fillstyle": fill,
            "markerfacecoloralt": "none",
            "markeredgecolor": colour,
            "markeredgewidth": 1.4,
        }

    @property
    def line(self) -> dict[str, Any]:
        return {**self.marker, "linestyle": LINES[self.second % len(LINES)]}


class Series:
    """The study's configurations as series of points along the ratio, each with a style."""

    def __init__(self, table: Table):
        axes = [name for name in table.shown_axes if name != RATIO]
        self.first = table.compared or (axes[0] if axes else None)
        self.others = [name for name in axes if name != self.first]
        self.firsts = list(dict.fromkeys(self._first(c) for c in table.configurations))
        self.seconds = list(dict.fromkeys(self._second(c) for c in table.configurations))

    def style(self, configuration: Configuration) -> Style:
        return Style(self.firsts.index(self._first(configuration)), self.seconds.index(self._second(configuration)))

    def groups(self, table: Table) -> dict[Style, list[Configuration]]:
        """Series in order, each by ascending ratio."""
        found: dict[Style, list[Configuration]] = {}
        for configuration in sorted(table.configurations, key=lambda c: c.ratio or 0.0):
            found.setdefault(self.style(configuration), []).append(configuration)
        return dict(sorted(found.items(), key=lambda item: (item[0].first, item[0].second)))

    def handles(self) -> list[Line2D]:
        """The legend: what colour and marker mean, then what fill and line mean."""
        made = [Line2D([], [], **Style(i, 0).line, label=name) for i, name in enumerate(self.firsts)]
        if len(self.seconds) > 1:
            made += [
                Line2D([], [], **{**Style(0, i).line, "color": MUTED, "markeredgecolor": MUTED, "marker": "o"},
                       label=name)
                for i, name in enumerate(self.seconds)
            ]  # fmt: skip
        return made

    def _first(self, configuration: Configuration) -> str:
        if self.first is None:
            return setting_text(USE, configuration.strategy)
        return named_text(self.first, configuration.settings.get(self.first))

    def _second(self, configuration: Configuration) -> str:
        return ", ".join(named_text(name, configuration.settings.get(name)) for name in self.others)


def quality_plots(table: Table) -> list[Plot]:
    """Quality against time and against FLOPs, for every measure of quality; then by ratio."""
    plots = []
    for quality in table.quality:
        for key in COSTS:
            cost = table.column(key)
            if cost is not None:
                plots.append(_scatter(table, quality, cost))
        plots.append(_by_ratio(table, quality))
    return [plot for plot in plots if plot is not None]


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices of the points that no other beats in both: x lower is better, y lower too unless ``higher``."""
    sign = -1 if higher else 1
    front, best = [], float("inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[index][1] < best:
            front.append(index)
            best = sign * points[index][1]
    return front


def _y(table: Table, quality: Column, configuration: Configuration | None) -> float | None:
    """A configuration's (or the dense model's) quality; relative to dense where several dense models are compared."""
    references = [configuration.reference] if configuration else range(len(table.dense))
    dense = next((mean for i in references if (mean := table.dense[i].cell(quality).mean) is not None), None)
    value = configuration.mean(quality) if configuration else dense
    if len(table.dense) == 1:
        return value
    return value / dense if finite(value) is not None and dense else None


def _scatter(table: Table, quality: Column, cost: Column) -> Plot | None:
    series = Series(table)
    found = [(c, c.mean(cost), _y(table, quality, c)) for c in table.configurations]
    points = [(c, x, y) for c, x, y in found if x is not None and y is not None]
    dense = _y(table, quality, None)
    if len(points) < 2 or dense is None:
        return None
    every = [(1.0, dense), *((x, y) for _, x, y in points)]
    # Seeds that have no value may be the bad ones: what lacks any is drawn, but stands on no front.
    able = [(None, 1.0, dense), *(p for p in points if p[0].cell(cost).complete and p[0].cell(quality).complete)]
    front = [able[index] for index in pareto([(x, y) for _, x, y in able], quality.better == "higher")]
    with drawing() as figure:
        axes = figure.subplots()
        _log_if_wide(axes, [y for _, y in every])
        _, xs, ys = zip(*front, strict=True)
        axes.step(xs, ys, where="post", color=MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=1.5)
        axes.plot(xs, ys, "o", markersize=13, fillstyle="none", color=MUTED, markeredgewidth=1, zorder=1.6)
        _label_front(axes, [point for point in front if point[0] is not None], quality.better == "higher")
        far = max(x for x, _ in every) > EDGE
        for configuration, x, y in points:
            beyond = far and x > EDGE
            axes.errorbar(
                EDGE if beyond else x, y, yerr=configuration.cell(quality).sd if len(table.dense) == 1 else None,
                xerr=None if beyond else configuration.cell(cost).sd, linestyle="none", elinewidth=0.8, capsize=2,
                zorder=3, clip_on=not beyond, **series.style(configuration).marker,
            )  # fmt: skip
        axes.plot(1, dense, "*", color=INK, markersize=10, zorder=3)
        axes.annotate("dense", (1, dense), (9, 0), textcoords="offset points", va="center", fontsize=8)
        axes.xaxis.set_major_formatter(percent)
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))
        axes.margins(0.1)
        if far:
            axes.set_xlim(right=EDGE + 0.005)
            label_beyond(axes, [(x, y) for _, x, y in points if x > EDGE])
        axes.set_xlabel(f"{cost.title}, share of dense")
        _label_quality(axes, table, quality)
        handles = [*series.handles(), Line2D([], [], marker="o", markersize=9, fillstyle="none", color=MUTED,
                                             linestyle=(0, (3, 2)), linewidth=1, label="Pareto front")]  # fmt: skip
        _legend(figure, handles)
        title = f"{_start(quality.title)} against {cost.title}"
        on = [table.name(configuration) if configuration else "dense" for configuration, _, _ in front]
        caption = (
            f"{_start(quality.title)} ({quality.better} is better) against {cost.title} relative to dense. "
            f"Ringed: the Pareto front, which nothing beats in both: {'; '.join(on)}."
            + (" Points of which seeds have no value are not on it." if len(able) <= len(points) else "")
            + (" Points at the right edge lie beyond it, at the value beside them." if far else "")
        )
        return finished(figure, safe_name(f"{quality.key}-{cost.key}"), title, caption)


def _label_front(axes: Axes, front: list[tuple[Configuration, float, float]], higher: bool) -> None:
    """The ratios of the points on the front, on its empty side."""
    if len({configuration.ratio for configuration, _, _ in front}) > 1:
        # From left to right; only the first of each ratio, as the others are close by.
        for configuration, x, y in {c.ratio: (c, x, y) for c, x, y in reversed(front)}.values():
            place = (-7, 7 if higher else -7)
            axes.annotate(
                share(configuration.ratio), (x, y), place, textcoords="offset points", ha="right",
                va="bottom" if higher else "top", fontsize=7.5, color=MUTED,
            )  # fmt: skip


def label_beyond(axes: Axes, points: list[tuple[float, float]]) -> None:
    """What points cost that are drawn at the edge, from the cheapest to the dearest where they are close together."""
    heights = {point: (axes.transScale + axes.transLimits).transform(point)[1] for point in points}
    lines: list[list[tuple[float, float]]] = []
    for point in sorted(points, key=heights.__getitem__):
        if lines and heights[point] - heights[lines[-1][-1]] < APART:
            lines[-1].append(point)
        else:
            lines.append([point])
    for line in lines:
        shares = list(dict.fromkeys(f"{100 * x:.0f}%" for x, _ in sorted(line)))
        said = ", ".join(shares) if len(shares) < 4 else f"{shares[0]} to {shares[-1]}"
        axes.annotate(
            f"at {said}", (EDGE, line[len(line) // 2][1]), (8, 0), textcoords="offset points", va="center",
            fontsize=7.5, color=MUTED, annotation_clip=False,
        )  # fmt: skip


def _by_ratio(table: Table, quality: Column) -> Plot | None:
    ratios = {c.ratio for c in table.configurations if c.mean(quality) is not None}
    dense = _y(table, quality, None)
    if len(ratios) < 2 or dense is None:
        return None
    series = Series(table)
    with drawing() as figure:
        axes = figure.subplots()
        drawn = [dense]
        for style, members in series.groups(table).items():
            points = [(c.ratio, _y(table, quality, c), c.cell(quality).sd) for c in members]
            points = [(x, y, sd) for x, y, sd in points if x is not None and y is not None]
            if not points:
                continue
            xs, ys, sds = zip(*points, strict=True)
            drawn += ys
            spread = [sd or 0 for sd in sds] if len(table.dense) == 1 and any(sds) else None
            axes.plot((0, xs[0]), (dense, ys[0]), color=style.marker["color"], linewidth=0.6, alpha=0.6)
            axes.errorbar(xs, ys, yerr=spread, elinewidth=0.8, capsize=2, **style.line)
        axes.plot(0, dense, "*", color=INK, markersize=10, clip_on=False, zorder=4)
        axes.annotate("dense", (0, dense), (7, -3), textcoords="offset points", va="top", fontsize=8)
        _log_if_wide(axes, drawn)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(percent)
        axes.set_xticks([0, *sorted(ratios)])
        axes.set_xlabel("pruning ratio asked for")
        _label_quality(axes, table, quality)
        _legend(figure, series.handles())
        title = f"{_start(quality.title)} by pruning ratio"
        bars = "; bars are standard deviations over seeds" if table.repeated else ""
        caption = f"How {quality.title} degrades ({quality.better} is better), from the dense model at 0%{bars}."
        return finished(figure, safe_name(f"{quality.key}-by-ratio"), title, caption)


def _label_quality(axes: Axes, table: Table, quality: Column) -> None:
    relative = ", relative to dense" if len(table.dense) > 1 else ""
    axes.set_title(f"{quality.title}{relative}", fontweight="normal", color=MUTED, fontsize=9)
    if quality.style == "accuracy" and not relative:
        axes.yaxis.set_major_formatter(percent)


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, handles: list[Line2D]) -> None:
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(max(1, min(4, 72 / (longest + 5.5))))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=2, columnspacing=1)


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
