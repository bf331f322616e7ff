"""The plots of a report: quality against cost and by ratio, where time and operations go, what happens per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ...registry.roles.evaluation import STAGES
from ..runs.records import EvaluatorResult
from .axes import RATIO, USE, finite, named_text, setting_text
from .metrics import Metric
from .style import (
    COLOURS,
    FILLS,
    HATCHES,
    INK,
    LINES,
    MARKERS,
    MUTED,
    PAPER,
    WIDTH,
    Plot,
    drawing,
    finished,
    heat_colours,
    ink_on,
    percent,
)
from .summary import Configuration, Summary

LOG_FROM = 20
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
COSTS = ("latency.prefill_ratio", "cost.flops_ratio")
EXPENSIVE = 1.6
"""Cost relative to dense from which the axis of costs is logarithmic."""

TIME_PARTS = ("attention", "mlp", "head", "other", *STAGES)
FLOP_PARTS = ("attention_projections", "attention_scores", "mlp", "head", "probe", "compensation", "other")
PART_TITLES = {"mlp": "MLP", "head": "output layer"}
LOOKS = {
    "attention": (0, 0), "attention_projections": (0, 0), "attention_scores": (5, 1), "mlp": (1, 0), "head": (2, 2),
    "other": (7, 0), "probe": (3, 0), "select": (4, 0), "score": (6, 0), "gather": (4, 1), "history": (6, 2),
    "compensate": (5, 0), "compensation": (5, 0),
}  # fmt: skip
"""Colour and hatch of each part, in every figure; neighbouring parts have different colours."""
MOST_BARS = 30

KINDS = {"attention": "attention", "mlp": "MLP"}
MOST_ROWS = 40
"""Maximum number of rows of a heat map."""
MOST_LINES = 8
"""Maximum number of lines in one panel."""
WRITTEN = 16
"""Maximum number of layers for which a heat map's cells contain their number."""
OVERLAPS = {"full_batch": "with full-batch probing", "between_batches": "between batches"}


def draw(summary: Summary) -> list[Plot]:
    """All plots for which there are data."""
    plots = [plot for quality in summary.quality for plot in _quality_plots(summary, quality)]
    found = [*plots, _time(summary), _operations(summary), _kept(summary), *(_overlap(summary, w) for w in OVERLAPS)]
    return [plot for plot in found if plot is not None]


# Quality


@dataclass(frozen=True)
class Series:
    """Configurations along the ratio: colour and marker by their first setting, fill and line by the others."""

    name: str
    first: int
    second: int
    members: list[Configuration]
    """By ascending ratio."""

    @property
    def marker(self) -> dict[str, Any]:
        colour = COLOURS[self.first % len(COLOURS)]
        return {
            "marker": MARKERS[self.first % len(MARKERS)], "color": colour, "fillstyle": FILLS[self.second % len(FILLS)],
            "markerfacecoloralt": "none", "markeredgecolor": colour, "markeredgewidth": 1.4,
        }  # fmt: skip

    @property
    def line(self) -> dict[str, Any]:
        return {**self.marker, "linestyle": LINES[self.second % len(LINES)]}


def series_of(summary: Summary) -> list[Series]:
    """The series of a study."""
    axes = [name for name in summary.shown_axes if name != RATIO]
    first = summary.strategy_axis or next(iter(axes), None)
    groups: dict[tuple[str, str], list[Configuration]] = {}
    for c in sorted(summary.configurations, key=lambda c: c.ratio or 0.0):
        one = named_text(first, c.settings.get(first)) if first else setting_text(USE, c.strategy)
        others = ", ".join(named_text(name, c.settings.get(name)) for name in axes if name != first)
        groups.setdefault((one, others), []).append(c)
    firsts, seconds = (list(dict.fromkeys(pair[i] for pair in groups)) for i in (0, 1))
    return [
        Series(", ".join(filter(None, pair)), firsts.index(pair[0]), seconds.index(pair[1]), members)
        for pair, members in groups.items()
    ]


def _quality_plots(summary: Summary, quality: Metric) -> list[Plot | None]:
    costs = [cost for name in COSTS if (cost := summary.metric(name))]
    return [*(_scatter(summary, quality, cost) for cost in costs), _by_ratio(summary, quality)]


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices of the points that no other beats in both: x lower is better, y lower too unless ``higher``."""
    sign = -1 if higher else 1
    front, best = [], float("inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[index][1] < best:
            front.append(index)
            best = sign * points[index][1]
    return front


def _dense_y(summary: Summary, quality: Metric) -> float | None:
    """The dense model's quality; 1 if several dense models are compared."""
    means = [summary.dense_cell(i, quality).mean for i in range(len(summary.dense))]
    known = [mean for mean in means if mean is not None]
    return (known[0] if len(means) == 1 else 1.0) if known else None


def _y(summary: Summary, quality: Metric, c: Configuration) -> float | None:
    """A configuration's quality; relative to dense if several dense models are compared."""
    value = summary.mean(c, quality)
    if len(summary.dense) == 1 or value is None:
        return value
    dense = summary.dense_cell(c.reference, quality).mean
    return value / dense if dense else None


def _sd(summary: Summary, quality: Metric, c: Configuration) -> float | None:
    """The deviation of :func:`_y` over seeds; none if it is relative to dense."""
    return summary.cell(c, quality).sd if len(summary.dense) == 1 else None


def _scatter(summary: Summary, quality: Metric, cost: Metric) -> Plot | None:
    dense, style = _dense_y(summary, quality), {c.number: s.marker for s in series_of(summary) for c in s.members}
    found = [(c, summary.mean(c, cost), _y(summary, quality, c)) for c in summary.configurations]
    points = [(c, x, y) for c, x, y in found if x is not None and y is not None]
    if len(points) < 2 or dense is None:
        return None
    # Missing seeds may be the bad ones: an incomplete configuration is drawn, but is not on the front.
    able = [p for p in points if summary.cell(p[0], cost).complete and summary.cell(p[0], quality).complete]
    candidates: list[tuple[Configuration | None, float, float]] = [(None, 1.0, dense), *able]
    front = [candidates[index] for index in pareto([(x, y) for _, x, y in candidates], quality.better == "higher")]
    with drawing(height=_height(summary)) as figure:
        axes = figure.subplots()
        xs, ys = [x for _, x, _ in front], [y for *_, y in front]
        axes.step(xs, ys, where="post", color=MUTED, linewidth=1, linestyle=LINES[1], zorder=1.5)
        axes.plot(xs, ys, "o", markersize=13, fillstyle="none", color=MUTED, markeredgewidth=1, zorder=1.6)
        for c, x, y in points:
            axes.errorbar(
                x, y, xerr=summary.cell(c, cost).sd, yerr=_sd(summary, quality, c),
                linestyle="none", elinewidth=0.8, capsize=2, zorder=3, **style[c.number],
            )  # fmt: skip
        axes.plot(1, dense, "*", color=INK, markersize=10, zorder=3)
        axes.annotate("dense", (1, dense), (9, 0), textcoords="offset points", va="center", fontsize=8)
        if any(x > EXPENSIVE for _, x, _ in points):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(0.5, 0.7, 1, 1.5, 2, 3, 5, 7)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(percent)
        axes.margins(0.1)
        axes.set_xlabel(f"{cost.title}, share of dense")
        _quality_axis(axes, summary, quality, [dense, *(y for *_, y in points)])
        pareto_line = Line2D([], [], marker="o", markersize=9, fillstyle="none", color=MUTED, linestyle=LINES[1],
                             linewidth=1, label="Pareto front")  # fmt: skip
        _legend(figure, summary, [pareto_line])
        on = "; ".join(summary.name(c) if c else "dense" for c, *_ in front)
        caption = f"{_direction(quality)}. On the Pareto front: {on}."
        caption += " Configurations with missing seeds are not on it." * (len(able) < len(points))
        title = f"{quality.title[:1].upper()}{quality.title[1:]} against {cost.title}"
        return finished(figure, f"{quality.key}-{cost.key}", title, caption)


def _by_ratio(summary: Summary, quality: Metric) -> Plot | None:
    dense = _dense_y(summary, quality)
    ratios = {c.ratio for c in summary.configurations if c.ratio is not None and summary.mean(c, quality) is not None}
    if len(ratios) < 2 or dense is None:
        return None
    with drawing(height=_height(summary)) as figure:
        axes = figure.subplots()
        drawn = [dense]
        for one in series_of(summary):
            found = [(c.ratio, _y(summary, quality, c), _sd(summary, quality, c) or 0.0) for c in one.members]
            points = [(x, y, sd) for x, y, sd in found if x is not None and y is not None]
            if not points:
                continue
            xs, ys, sds = zip(*points, strict=True)
            drawn += ys
            axes.plot((0, xs[0]), (dense, ys[0]), color=one.marker["color"], linewidth=0.6, alpha=0.6)
            axes.errorbar(xs, ys, yerr=sds if any(sds) else None, elinewidth=0.8, capsize=2, **one.line)
        axes.plot(0, dense, "*", color=INK, markersize=10, clip_on=False, zorder=4)
        axes.annotate("dense", (0, dense), (7, -3), textcoords="offset points", va="top", fontsize=8)
        axes.margins(y=0.12)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(percent)
        axes.set_xticks([0, *sorted(ratios)])
        axes.set_xlabel("pruning ratio asked for")
        _quality_axis(axes, summary, quality, drawn)
        _legend(figure, summary)
        bars = "; bars are standard deviations over seeds" if summary.repeated else ""
        caption = f"{_direction(quality)}, from the dense model at 0%{bars}."
        title = f"{quality.title[:1].upper()}{quality.title[1:]} by pruning ratio"
        return finished(figure, f"{quality.key}-by-ratio", title, caption)


def _direction(quality: Metric) -> str:
    return f"{'Higher' if quality.better == 'higher' else 'Lower'} is better"


def _quality_axis(axes: Axes, summary: Summary, quality: Metric, values: Sequence[float]) -> None:
    """Title and ticks of the quality's axis; logarithmic for values far apart."""
    relative = ", relative to dense" if len(summary.dense) > 1 else ""
    axes.set_title(f"{quality.title}{relative}", fontweight="normal", color=MUTED, fontsize=9)
    if quality.style == "accuracy" and not relative:
        axes.yaxis.set_major_formatter(percent)
    elif min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _columns(summary: Summary) -> int:
    """Columns of a legend of the series."""
    longest = max(len(series.name) for series in series_of(summary))
    return int(max(1, min(4, 72 / (max(longest, len("Pareto front")) + 5.5))))


def _height(summary: Summary) -> float:
    """Inches of a plot and its legend."""
    return 3.2 + 0.17 * math.ceil((len(series_of(summary)) + 1) / _columns(summary))


def _legend(figure: Figure, summary: Summary, more: Sequence[Line2D] = ()) -> None:
    handles = [*(Line2D([], [], label=series.name, **series.line) for series in series_of(summary)), *more]
    columns = _columns(summary)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=2, columnspacing=1)


# Time and operations


def _time(summary: Summary) -> Plot | None:
    def parts(c: Configuration) -> tuple[dict[str, float], dict[str, float], float | None]:
        details = _details(c, "latency").get("breakdown")
        found = details if isinstance(details, dict) else {}
        return _positive(found.get("dense")), _positive(found.get("pruned")), None

    caption = (
        "Seconds of one prefill by part, relative to dense; measured with timers, apart from the ratios in the table."
    )
    bars = _bars(summary, parts)
    return _stacked(bars, TIME_PARTS, "time", "Where the time goes", caption, "share of dense's seconds")


def _operations(summary: Summary) -> Plot | None:
    def parts(c: Configuration) -> tuple[dict[str, float], dict[str, float], float | None]:
        found = next((m for m in c.first.metrics if m.evaluator == "cost"), None)
        dense, pruned = ({k: v for k, v in _positive(side).items() if k in FLOP_PARTS}
                         for side in ((found.dense, found.pruned) if found else ({}, {})))  # fmt: skip
        return dense, pruned, finite(found.pruned.get("floor_ratio")) if found else None

    bars = _bars(summary, parts)
    floor = " The thick tick is the floor: as many units cut, without probe and compensation."
    caption = "Operations per token of a prefill by part, relative to dense." + floor * any(bar[2] for bar in bars)
    return _stacked(bars, FLOP_PARTS, "operations", "Where the operations go", caption, "share of dense's operations")


Bars = list[tuple[str, dict[str, float], float | None]]
"""Name, shares by part, and the floor if known."""


def _bars(summary: Summary, parts: Any) -> Bars:
    """A bar for every configuration, each dense model's before its first."""
    bars: Bars = []
    shown: set[int] = set()
    for c in summary.configurations:
        dense, pruned, floor = parts(c)
        whole = sum(dense.values())
        if not (whole and pruned):
            continue
        if c.reference not in shown:
            shown.add(c.reference)
            bars.append((summary.dense_name(c.reference), {p: value / whole for p, value in dense.items()}, None))
        bars.append((summary.name(c), {part: value / whole for part, value in pruned.items()}, floor))
    return bars


def _positive(parts: Any) -> dict[str, float]:
    return {part: value for part, value in (parts or {}).items() if (finite(value) or 0) > 0}


def _details(c: Configuration, evaluator: str) -> dict[str, Any]:
    """The details of an evaluator's pruned side in the first trial; empty if it did not run."""
    found: EvaluatorResult | None = next((m for m in c.first.metrics if m.evaluator == evaluator), None)
    return (found.details.get("pruned") if found else None) or {}


def _stacked(bars: Bars, order: Sequence[str], name: str, title: str, caption: str, label: str) -> Plot | None:
    if len(bars) < 2:
        return None
    if len(bars) > MOST_BARS:
        caption += f" The first {MOST_BARS} of {len(bars)} bars."
        bars = bars[:MOST_BARS]
    present = {part for _, parts, _ in bars for part in parts}
    parts = [part for part in order if part in present] + sorted(present - set(order))
    with drawing(2 * WIDTH + 0.4, height=1.4 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(bars)
        for part in parts:
            colour, hatch = LOOKS.get(part, (7, 3))
            widths = [found.get(part, 0.0) for _, found, _ in bars]
            axes.barh(
                range(len(bars)), widths, left=starts, height=0.72, linewidth=0.6, color=COLOURS[colour],
                edgecolor=PAPER, hatch=HATCHES[hatch], label=PART_TITLES.get(part, part.replace("_", " ")),
            )  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, (*_, floor) in enumerate(bars):
            if floor is not None:
                axes.plot((floor, floor), (row - 0.46, row + 0.46), color=INK, linewidth=2, solid_capstyle="butt")
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=":")
        axes.set_yticks(range(len(bars)), [bar for bar, *_ in bars])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(percent)
        axes.set_xlabel(label)
        figure.legend(loc="outside lower left", ncols=min(len(parts), 9), handlelength=1.6, columnspacing=1.2)
        return finished(figure, f"where-{name}", title, caption, wide=True)


# Layers


def _kept(summary: Summary) -> Plot | None:
    folded: dict[str, list[Configuration]] = {}
    for c in summary.configurations:
        folded.setdefault(repr([c.kept(kind) for kind in KINDS]), []).append(c)
    groups = list(folded.values())[:MOST_ROWS]
    rows = [group[0] for group in groups]
    kinds = [kind for kind in KINDS if any(share is not None for c in rows for share in c.kept(kind))]
    layers = max((len(c.kept(kind)) for kind in kinds for c in rows), default=0)
    if not layers:
        return None
    names = [summary.name(g[0]) + (f" and {len(g) - 1} more" if len(g) > 1 else "") for g in groups]
    with drawing(2 * WIDTH + 0.4, height=0.9 + 0.27 * len(rows)) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            shares = [[float("nan") if s is None else s for s in c.kept(kind)] for c in rows]
            shares = [row + [float("nan")] * (layers - len(row)) for row in shares]
            mesh = panel.pcolormesh(shares, cmap=heat_colours(), vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.8)
            panel.set(xlabel="layer", title=KINDS[kind])
            bare(panel)
            ticks = range(0, layers, 1 if layers <= WRITTEN else 4)
            panel.set_xticks([i + 0.5 for i in ticks], [str(i) for i in ticks])
            panel.set_yticks([i + 0.5 for i in range(len(rows))], names)
            for y, row in enumerate(shares if layers <= WRITTEN else ()):
                for x, value in enumerate(row):
                    if value == value:
                        ink = ink_on(heat_colours()(value))
                        panel.text(
                            x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7
                        )
        panels[0].invert_yaxis()
        if layers > WRITTEN:
            bar = figure.colorbar(mesh, ax=panels, location="bottom", shrink=0.35, aspect=40, pad=0.02)
            bar.outline.set_visible(False)
            bar.set_label("share of the layer's units kept")
        more = len(folded) - len(groups)
        caption = "Units kept in each layer, in percent (attention: heads or key/value groups; MLP: channels)."
        if any(len(group) > 1 for group in groups) or more:
            caption += " Configurations that keep the same number everywhere share a row"
            caption += f"; {more} more rows are not shown." if more else "."
        return finished(figure, "kept-units", "Kept units per layer", caption, wide=True)


def bare(panel: Axes) -> None:
    """Remove grid, frame and ticks of a heat map."""
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _overlap(summary: Summary, what: str) -> Plot | None:
    found = [(c, layers) for c in summary.configurations if (layers := _layers(c, what))]
    # A strategy that decides once overlaps completely with itself.
    varying = [(c, layers) for c, layers in found if what != "between_batches" or not _always_one(layers)]
    rows = sorted(varying, key=lambda pair: -(pair[0].ratio or 0))[:MOST_LINES]
    if not rows:
        return None
    ratios, markers = list(dict.fromkeys(c.ratio for c, _ in rows)), {}
    for series in series_of(summary):
        markers.update({c.number: series.marker for c in series.members})
    kinds = [kind for kind in KINDS if any(layers.get(kind) for _, layers in rows)]
    with drawing(2 * WIDTH + 0.4, height=3.4) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        handles = []
        for c, layers in rows:
            style = {**markers[c.number], "linestyle": LINES[ratios.index(c.ratio) % len(LINES)]}
            handles.append(Line2D([], [], **style, label=summary.name(c)))
            for panel, kind in zip(panels, kinds, strict=True):
                points = layers.get(kind) or {}
                panel.plot(list(points), list(points.values()), **style)
                chance = chance_level(c, kind)
                panel.plot(range(len(chance)), chance, color=MUTED, linewidth=0.8, linestyle=":")
        for panel, kind in zip(panels, kinds, strict=True):
            panel.set(xlabel="layer", title=KINDS[kind], ylim=(0, 1.04))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("Jaccard overlap")
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":", label="chance"))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), handlelength=2.6)
        caption = f"Overlap of the kept units {OVERLAPS[what]}, per layer: 1 is the same units"
        caption += "; strategies that decide once are not shown." if len(varying) < len(found) else "."
        if len(varying) > len(rows):
            caption += f" Shown are {len(rows)} of {len(varying)} configurations, those with the highest ratios."
        elif what == "full_batch" and any(c.strategy == "full_batch_probing" for c, _ in rows):
            caption += " Full-batch probing's own decisions use earlier batches, those it is compared with do not."
        name = "overlap-" + what.replace("_", "-")
        return finished(figure, name, f"Overlap per layer, {OVERLAPS[what]}", caption, wide=True)


Layers = dict[str, dict[int, float]]
"""A value by kind of site and layer."""


def _layers(c: Configuration, what: str) -> Layers:
    """The overlap by kind of site and layer; kinds without any number are left out."""
    found = _details(c, "overlap").get(what)
    kinds = found if isinstance(found, dict) else {}
    layers = {
        kind: {i: v for i, v in enumerate(values or ()) if finite(v) is not None} for kind, values in kinds.items()
    }
    return {kind: values for kind, values in layers.items() if values}


def _always_one(layers: Layers) -> bool:
    return all(value == 1 for values in layers.values() for value in values.values())


def chance_level(c: Configuration, kind: str) -> list[float]:
    """Overlap of two random choices by layer: as measured, else k / (2 - k) for a share k of many units."""
    stated = (_details(c, "overlap").get("chance") or {}).get(kind)
    shares = c.kept(kind)
    if stated and len(stated) == len(shares):
        return [float("nan") if finite(value) is None else value for value in stated]
    return [float("nan") if share is None else share / (2 - share) for share in shares]
