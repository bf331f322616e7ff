"""The plots of a report: quality against cost and by ratio, where time and operations go, what happens per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ...registry.roles.evaluation import STAGES
from ..output.formatting import share
from ..output.reading import brief
from .axes import RATIO, STRATEGY_AXES, USE, called, finite, named_text, setting_text
from .front import front
from .metrics import Metric
from .style import (
    COLOURS,
    FILLS,
    HATCHES,
    HEAT,
    INK,
    LINES,
    MARKERS,
    MUTED,
    PAPER,
    WIDTH,
    Plot,
    colour_bar,
    drawing,
    finished,
    heat_map,
    ink_on,
    percent,
)
from .summary import Configuration, Summary

WIDE = 2 * WIDTH + 0.4
"""Inches of a plot across the page."""
LOG_FROM = 20
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
COSTS = ("latency.prefill_ratio", "cost.flops_ratio")
STAR: dict[str, Any] = {"marker": "*", "color": INK, "markersize": 10, "linestyle": "none"}
DASHED = LINES[1]
BAND = 0.1
"""Height of a line for a value beyond the axis, as a share of the axis."""
SMALLEST, STEP = 5.0, 5.0
"""Size of the marks of the least ratio, and how much larger those of the largest are."""
FRONT = "Pareto front, with ties"
ON_FRONT = (
    "What is significantly better than one of them costs clearly more; each is significantly better than what costs "
    "clearly less."
)
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

KINDS = {"attention": "attention", "mlp": "MLP"}
MANY_BARS, MOST_BARS, MOST_ROWS, MOST_LINES = 14, 30, 40, 8
"""Bars from which each ratio has its own figure; maximum number of bars, of rows of a heat map, of lines in a panel."""
CALM = 0.7
"""Opacity of stacked bars."""
WRITTEN = 16
"""Maximum number of layers for which a heat map's cells contain their number."""
OVERLAPS = {"full_batch": "with full-batch probing", "between_batches": "between batches"}


def draw(summary: Summary) -> list[Plot]:
    """All plots for which there are data."""
    costs = [*filter(None, map(summary.metric, COSTS)), None]
    plots = [_quality(summary, quality, cost) for quality in summary.quality for cost in costs]
    plots += [*_time(summary), *_operations(summary), _kept(summary), *(_overlap(summary, what) for what in OVERLAPS)]
    return [plot for plot in plots if plot is not None]


# Quality


@dataclass(frozen=True)
class Series:
    """Configurations along the ratio: colour by their first setting, marker and line by the others, if they vary."""

    name: str
    style: dict[str, Any]
    members: list[Configuration]
    """By ascending ratio."""


def series_of(summary: Summary) -> list[Series]:
    """The series of a study."""
    axes = [name for name in summary.shown_axes if name != RATIO]
    first = next((name for name in STRATEGY_AXES if name in axes), next(iter(axes), None))
    groups: dict[tuple[str, str], list[Configuration]] = {}
    for c in sorted(summary.configurations, key=lambda c: c.ratio or 0.0):
        one = named_text(first, c.settings.get(first)) if first else setting_text(USE, c.strategy)
        others = ", ".join(named_text(name, c.settings.get(name)) for name in axes if name != first)
        groups.setdefault((one, others), []).append(c)
    firsts, seconds = (list(dict.fromkeys(pair[i] for pair in groups)) for i in (0, 1))
    several = len(seconds) > 1
    series = []
    for pair, members in groups.items():
        colour, line = firsts.index(pair[0]), seconds.index(pair[1])
        filling, shape = divmod(line if several else colour, len(MARKERS))
        style = {
            "marker": MARKERS[shape], "color": COLOURS[colour % len(COLOURS)], "fillstyle": FILLS[filling % len(FILLS)],
            "markeredgewidth": 1.4, "markersize": 6, "linestyle": LINES[line % len(LINES)],
        }  # fmt: skip
        series.append(Series(called([*filter(None, pair)]), style, members))
    return series


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices of the points that no other beats in both: x lower is better, y lower too unless ``higher``."""
    sign = -1 if higher else 1
    front, best = [], math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[index][1] < best:
            front.append(index)
            best = sign * points[index][1]
    return front


def _values(summary: Summary, quality: Metric) -> tuple[float | None, dict[int, tuple[float, float]]]:
    """The dense model's quality, and value and deviation (or NaN) of each configuration that has a value.

    Relative to dense, and without deviations, if several dense models are compared.
    """
    dense = [summary.dense_cell(index, quality).mean for index in range(len(summary.dense))]
    alone, found = len(dense) == 1, {}
    for c in summary.configurations:
        cell, base = summary.cell(c, quality), 1.0 if alone else dense[c.reference]
        if cell.mean is not None and base:
            found[c.number] = (cell.mean / base, cell.sd or math.nan if alone else math.nan)
    return (dense[0] if alone else 1.0), found


def _quality(summary: Summary, quality: Metric, cost: Metric | None) -> Plot | None:
    """Quality against a cost with the Pareto front, or without a cost by ratio with a line for each series."""
    dense, values = _values(summary, quality)
    at = {c.number: summary.mean(c, cost) if cost else c.ratio for c in summary.configurations if c.number in values}
    xs = {number: x for number, x in at.items() if x is not None}
    if dense is None or len(xs if cost else {*xs.values()}) < 2:
        return None
    series, start = series_of(summary), 1.0 if cost else 0.0
    ratios = sorted({c.ratio for c in summary.configurations if c.number in xs and c.ratio is not None})
    sizes = {ratio: SMALLEST + STEP * i / max(1, len(ratios) - 1) for i, ratio in enumerate(ratios)}
    longest = max(len(name) for name in (FRONT, *(one.name for one in series)))
    columns = int(max(1, min(4, 72 / (longest + 5.5))))
    handles = [Line2D([], [], label=one.name, **one.style) for one in series]
    way = f"{'Higher' if quality.better == 'higher' else 'Lower'} is better"
    with drawing(height=3.3 + 0.17 * math.ceil((len(series) + 5) / columns)) as figure:
        axes = figure.subplots()
        drawn = {number: value for number, (value, _) in values.items() if number in xs}
        beyond = [] if quality.better == "higher" else outliers(drawn, dense)
        within = [dense, *(value for number, value in drawn.items() if number not in beyond)]
        _quality_axis(axes, summary, quality, within)
        if beyond:
            _break_axis(axes, drawn, beyond, within)
        for one in series:
            shown = [c for c in one.members if c.number in xs]
            style = {**one.style, "linestyle": "none", "elinewidth": 0.8, "capsize": 2, "zorder": 3}
            if shown and not cost:
                path = [(0.0, dense), *((xs[c.number], drawn[c.number]) for c in shown)]
                axes.plot(*zip(*path[:2], strict=True), color=one.style["color"], linewidth=0.6, alpha=0.6)
                axes.plot(*zip(*path[1:], strict=True), **{**one.style, "marker": ""})
            for c in shown:
                across, sd = summary.cell(c, cost).sd or math.nan if cost else math.nan, values[c.number][1]
                sd = math.nan if c.number in beyond else sd
                size = sizes.get(c.ratio or 0.0, SMALLEST) if cost else style["markersize"]
                point = xs[c.number], drawn[c.number]
                axes.errorbar(*point, yerr=sd, xerr=across, **{**style, "markersize": size})
                if c.number in beyond:
                    text = quality.text(values[c.number][0])
                    axes.annotate(text, point, (-9, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
        axes.plot(start, dense, clip_on=False, zorder=4, **STAR)
        handles.append(Line2D([], [], label="dense", **STAR))
        axes.xaxis.set_major_formatter(percent)
        axes.margins(0.1)
        if cost:
            dot: dict[str, Any] = {"marker": "o", "color": MUTED, "linestyle": "none"}
            scale = sizes.items() if len(sizes) > 1 else ()
            handles += [
                Line2D([], [], label=f"requested {share(ratio)}", markersize=size, **dot) for ratio, size in scale
            ]
            members, why = front(summary, quality, cost)
            if members:
                points = [(1.0, dense), *((xs[c.number], drawn[c.number]) for c in members)]
                handles.append(_stairs(axes, points, quality.better == "higher"))
            if max(xs.values()) > EXPENSIVE:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(0.5, 0.7, 1, 1.5, 2, 3, 5, 7)))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_formatter(percent)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))
            axes.set_xlabel(f"{cost.title}, share of dense")
            caption = f"{way}; larger marks are larger ratios. "
            on = f"On the Pareto front: {', '.join(map(summary.name, members))}. {ON_FRONT}"
            caption += on if members else f"No Pareto front: {why or 'the dense model is as good at no more cost'}."
            missing = any(not summary.cell(c, quality).complete for c in summary.configurations if c.number in xs)
            caption += " Configurations with missing seeds are not on it." * missing
            name, title = f"{quality.key}-{cost.key}", f"against {cost.title}"
        else:
            axes.set_xlim(left=0)
            axes.set_xticks([0, *sorted({*xs.values()})])
            axes.set_xlabel("requested pruning ratio")
            bars = "; bars are standard deviations over seeds" if summary.repeated else ""
            name, title = f"{quality.key}-by-ratio", "by pruning ratio"
            caption = f"{way}, from the dense model at 0%{bars}."
        caption += " Above the dotted line values are written, not to scale." if beyond else ""
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=2, columnspacing=1)
        return finished(figure, name, f"{quality.title[:1].upper()}{quality.title[1:]} {title}", caption)


def _stairs(axes: Axes, points: Sequence[tuple[float, float]], higher: bool) -> Line2D:
    """Draw the front's line and a ring around each point but the first, the dense model; the legend's entry."""
    line: dict[str, Any] = {"color": MUTED, "linewidth": 1}
    ring: dict[str, Any] = {"marker": "o", "fillstyle": "none"}
    best = [points[index] for index in pareto(points, higher)]
    axes.step(*zip(*best, strict=True), where="post", linestyle=DASHED, zorder=1.5, **line)
    axes.plot(*zip(*points[1:], strict=True), linestyle="none", markersize=15, zorder=1.6, **line, **ring)
    return Line2D([], [], markersize=9, linestyle=DASHED, label=FRONT, **line, **ring)


def outliers(values: Mapping[int, float], dense: float) -> list[int]:
    """The keys of the largest values, ascending, if these are at most a quarter and take more than half of an axis."""
    ordered = sorted(values, key=lambda number: values[number])
    for first in range(len(ordered) - 1, len(ordered) - 1 - len(ordered) // 4, -1):
        low, top = min(dense, values[ordered[0]]), values[ordered[first - 1]]
        if values[ordered[first]] - low > 2 * (top - low) > 0:
            return ordered[first:]
    return []


def _break_axis(axes: Axes, drawn: dict[int, float], beyond: Sequence[int], within: Sequence[float]) -> None:
    """End the axis above the values within, and place those beyond in order above a dotted line."""
    low, top = min(within), max(within)
    step, end = BAND * (top - low), top + BAND * (top - low)
    axes.set_ylim(low - step, end + step * len(beyond))
    axes.set_yticks([tick for tick in axes.get_yticks() if low - step <= tick <= end])
    axes.axhline(end, color=MUTED, linewidth=0.8, linestyle=":")
    drawn.update({number: end + step * (place + 0.5) for place, number in enumerate(beyond)})


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


# Time and operations

Sides = Mapping[str, Mapping[str, Any]]
"""Amounts by part, of the ``dense`` and the ``pruned`` model."""


def _time(summary: Summary) -> list[Plot]:
    sides = [_details(c, "latency").get("breakdown") or {} for c in summary.configurations]
    caption = (
        "Seconds of one prefill by part, relative to dense; measured with timers, apart from the ratios in the table."
    )
    return _stacked(summary, sides, TIME_PARTS, "Where the time goes", caption)


def _operations(summary: Summary) -> list[Plot]:
    results = [next((m for m in c.first.metrics if m.evaluator == "cost"), None) for c in summary.configurations]
    sides = [{"dense": r.dense or {}, "pruned": r.pruned} if r else {} for r in results]
    caption = (
        "Operations per token of a prefill by part, relative to dense. "
        "The thick tick is the floor: as many units cut, without probe and compensation."
    )
    return _stacked(summary, sides, FLOP_PARTS, "Where the operations go", caption)


def _stacked(summary: Summary, sides: Sequence[Sides], order: Sequence[str], title: str, caption: str) -> list[Plot]:
    """A bar for every configuration, each dense model's before its first; of many bars a figure for each ratio."""
    pairs = list(zip(summary.configurations, sides, strict=True))
    ratios = list(dict.fromkeys(c.ratio for c in summary.configurations))
    if len(pairs) + len(summary.dense) < MANY_BARS or len(ratios) < 2:
        return _bars(summary, pairs, order, title, caption)
    parts = [(f"{title} at {share(ratio)}", [pair for pair in pairs if pair[0].ratio == ratio]) for ratio in ratios]
    return [plot for name, own in parts for plot in _bars(summary, own, order, name, caption)]


def _bars(
    summary: Summary, pairs: Sequence[tuple[Configuration, Sides]], order: Sequence[str], title: str, caption: str
) -> list[Plot]:
    bars: dict[str, list[float]] = {}
    floors: dict[str, float | None] = {}
    for c, each in pairs:
        dense, pruned = (
            [finite(each.get(side, {}).get(part)) or 0.0 for part in order] for side in ("dense", "pruned")
        )
        whole = sum(dense)
        if whole and sum(pruned):
            bars.setdefault(summary.dense_name(c.reference), [value / whole for value in dense])
            bars[summary.name(c)] = [value / whole for value in pruned]
            floors[summary.name(c)] = finite(each["pruned"].get("floor_ratio"))
    if not bars:
        return []
    if len(bars) > MOST_BARS:
        caption += f" The first {MOST_BARS} of {len(bars)} bars."
        bars = dict(list(bars.items())[:MOST_BARS])
    with drawing(WIDE, height=1.4 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(bars)
        parts = [(part, widths) for part, *widths in zip(order, *bars.values(), strict=True) if any(widths)]
        for part, widths in parts:
            colour, hatch = LOOKS[part]
            axes.barh(
                range(len(bars)), widths, left=starts, height=0.72, linewidth=0.6, color=COLOURS[colour],
                alpha=CALM, edgecolor=PAPER, hatch=HATCHES[hatch], label=PART_TITLES.get(part, part.replace("_", " ")),
            )  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, floor in enumerate(map(floors.get, bars)):
            if floor is not None:
                axes.plot((floor, floor), (row - 0.46, row + 0.46), color=INK, linewidth=2, solid_capstyle="butt")
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=":")
        axes.set_yticks(range(len(bars)), [*map(brief, bars)])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(percent)
        axes.set_xlabel("share of dense")
        figure.legend(loc="outside lower left", ncols=min(len(parts), 9), handlelength=1.6, columnspacing=1.2)
        name = "-".join(["where", *(word.rstrip("%") for word in (title.split()[2], *title.split()[5:]))])
        return [finished(figure, name, title, caption, wide=True)]


def _details(c: Configuration, evaluator: str) -> dict[str, Any]:
    """The details of an evaluator's pruned side in the first trial; empty if it did not run."""
    return next((m.details.get("pruned") or {} for m in c.first.metrics if m.evaluator == evaluator), {})


# Layers


def _kept(summary: Summary) -> Plot | None:
    folded: dict[str, list[Configuration]] = {}
    for c in summary.configurations:
        folded.setdefault(repr([c.kept(kind) for kind in KINDS]), []).append(c)
    groups = list(folded.values())[:MOST_ROWS]
    shares = {kind: [[math.nan if s is None else s for s in group[0].kept(kind)] for group in groups] for kind in KINDS}
    shares = {kind: rows for kind, rows in shares.items() if any(s == s for row in rows for s in row)}
    layers = max((len(row) for rows in shares.values() for row in rows), default=0)
    if not layers:
        return None
    names = [summary.name(g[0]) + (f" and {len(g) - 1} more" if len(g) > 1 else "") for g in groups]
    columns = [str(i) if layers <= WRITTEN or i % 4 == 0 else "" for i in range(layers)]
    with drawing(WIDE, height=0.9 + 0.27 * len(groups)) as figure:
        panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
        for panel, (kind, rows) in zip(panels, shares.items(), strict=True):
            rows = [row + [math.nan] * (layers - len(row)) for row in rows]
            mesh = heat_map(panel, rows, HEAT, (0, 1), columns, names)
            panel.set(xlabel="layer", title=KINDS[kind])
            cells = [(x, y, s) for y, row in enumerate(rows) for x, s in enumerate(row) if s == s and layers <= WRITTEN]
            for x, y, s in cells:
                at: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
                panel.text(x + 0.5, y + 0.5, f"{100 * s:.0f}", color=ink_on(HEAT(s)), **at)
        panels[0].invert_yaxis()
        if layers > WRITTEN:
            colour_bar(figure, mesh, panels, "share of the layer's units kept")
        caption = (
            "Units kept in each layer, in percent (attention: heads or key/value groups; MLP: channels). "
            "Configurations that keep the same number everywhere share a row"
        )
        caption += f"; {len(folded) - len(groups)} more rows are not shown." if len(folded) > len(groups) else "."
        return finished(figure, "kept-units", "Kept units per layer", caption, wide=True)


def _overlap(summary: Summary, what: str) -> Plot | None:
    found = []
    for c in sorted(summary.configurations, key=lambda c: -(c.ratio or 0)):
        values = _details(c, "overlap").get(what)
        layers = {k: _numbers(v) for k, v in values.items()} if isinstance(values, dict) else {}
        # A strategy that decides once overlaps completely with itself.
        once = what == "between_batches" and all(v == 1 for vs in layers.values() for v in vs if v == v)
        if any(v == v for vs in layers.values() for v in vs) and not once:
            found.append((c, layers))
    rows = found[:MOST_LINES]
    if not rows:
        return None
    styles = {c.number: series.style for series in series_of(summary) for c in series.members}
    ratios = list(dict.fromkeys(c.ratio for c, _ in rows))
    kinds = [kind for kind in KINDS if any(v == v for _, layers in rows for v in layers.get(kind, ()))]
    chance_style: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "linestyle": ":"}
    with drawing(WIDE, height=3.4) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        handles = []
        for c, layers in rows:
            style = {**styles[c.number], "linestyle": LINES[ratios.index(c.ratio) % len(LINES)]}
            handles.append(Line2D([], [], **style, label=summary.name(c)))
            for panel, kind in zip(panels, kinds, strict=True):
                points = {layer: value for layer, value in enumerate(layers.get(kind, ())) if value == value}
                panel.plot(list(points), list(points.values()), **style)
                panel.plot(_numbers((_details(c, "overlap").get("chance") or {}).get(kind)), **chance_style)
        for panel, kind in zip(panels, kinds, strict=True):
            panel.set(xlabel="layer", title=KINDS[kind], ylim=(0, 1.04))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("Jaccard overlap")
        handles.append(Line2D([], [], label="chance", **chance_style))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), handlelength=2.6)
        caption = f"Overlap of the kept units {OVERLAPS[what]}, per layer: 1 is the same units."
        caption += {
            "full_batch": " Full-batch probing's own decisions use earlier batches, those it is compared with do not.",
            "between_batches": " Strategies that decide once are not shown.",
        }[what]
        if len(found) > len(rows):
            caption += f" Shown are {len(rows)} of {len(found)} configurations, those with the highest ratios."
        name = f"overlap-{what.replace('_', '-')}"
        return finished(figure, name, f"Overlap per layer, {OVERLAPS[what]}", caption, wide=True)


def _numbers(values: Sequence[Any] | None) -> list[float]:
    """Values by layer, NaN for those that are not numbers."""
    return [math.nan if finite(value) is None else value for value in values or ()]
