"""Where the time and the operations go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...registry.evaluation import STAGES
from .aggregate import Configuration, Table
from .figures import COLOURS, HATCHES, INK, PAPER, WIDTH, Plot, drawing, finished
from .findings import finite

TIME_PARTS = ("attention", "mlp", "head", "other", *STAGES)
FLOP_PARTS = ("attention_projections", "attention_scores", "mlp", "head", "probe", "other")
PART_TITLES = {"mlp": "MLP", "head": "output layer"}
MOST_BARS = 30

Bars = list[tuple[str, dict[str, float]]]


def cost_plots(table: Table) -> list[Plot]:
    """Stacked bars of a prefill's seconds, and of a token's operations."""
    return [plot for plot in (_time(table), _operations(table)) if plot is not None]


def _time(table: Table) -> Plot | None:
    bars: Bars = []
    for configuration in table.configurations:
        pruned, dense = _breakdowns(configuration)
        if pruned and dense:
            whole = sum(dense.values())
            if not whole:
                continue
            if not bars:
                bars.append(("dense", {part: value / whole for part, value in dense.items()}))
            bars.append((table.name(configuration), {part: value / whole for part, value in pruned.items()}))
    caption = (
        "Seconds of one prefill by part, relative to the dense model's in the same run. Select, probe, score, gather "
        "and history are what deciding anew for a batch takes; measured apart from the ratios in the table, with "
        "timers around every part."
    )
    return _stacked(bars, TIME_PARTS, "time", "Where the time goes", caption, "share of dense's seconds")


def _breakdowns(configuration: Configuration) -> tuple[dict[str, float], dict[str, float]]:
    for outcome in configuration.first.outcomes:
        found = ((outcome.get("details") or {}).get("pruned") or {}).get("breakdown")
        if outcome["evaluator"] == "latency" and isinstance(found, dict):
            return _positive(found.get("pruned")), _positive(found.get("dense"))
    return {}, {}


def _positive(parts: Any) -> dict[str, float]:
    return {part: value for part, value in (parts or {}).items() if (finite(value) or 0) > 0}


def _operations(table: Table) -> Plot | None:
    bars: Bars = []
    floors: list[float | None] = []
    for configuration in table.configurations:
        outcome = next((o for o in configuration.first.outcomes if o["evaluator"] == "cost"), None)
        if outcome is None:
            continue
        dense, pruned = (_split(outcome[side] or {}) for side in ("dense", "pruned"))
        whole = sum(dense.values())
        if not (whole and pruned):
            continue
        if not bars:
            bars.append(("dense", {part: value / whole for part, value in dense.items()}))
            floors.append(None)
        bars.append((table.name(configuration), {part: value / whole for part, value in pruned.items()}))
        floors.append(finite(outcome["pruned"].get("floor_ratio")))
    caption = (
        "Operations per token of a prefill by part, relative to dense"
        + ("; the thick tick is the floor: the same counts physically sliced, without a probe." if any(floors) else ".")
    )  # fmt: skip
    title = "Where the operations go"
    return _stacked(bars, FLOP_PARTS, "operations", title, caption, "share of dense's operations", floors)


def _split(values: dict[str, Any]) -> dict[str, float]:
    return {part: values[part] for part in FLOP_PARTS if (finite(values.get(part)) or 0) > 0}


def _stacked(
    bars: Bars,
    order: Sequence[str],
    name: str,
    title: str,
    caption: str,
    label: str,
    floors: Sequence[float | None] = (),
) -> Plot | None:
    if len(bars) < 2:
        return None
    if len(bars) > MOST_BARS:
        caption += f" The first {MOST_BARS - 1} configurations; the others are in table.csv."
        bars, floors = bars[:MOST_BARS], floors[:MOST_BARS]
    present = {part for _, parts in bars for part in parts}
    parts = [part for part in order if part in present] + sorted(present - set(order))
    with drawing(2 * WIDTH + 0.4, 1.4 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(bars)
        for index, part in enumerate(parts):
            widths = [found.get(part, 0.0) for _, found in bars]
            axes.barh(
                range(len(bars)), widths, left=starts, height=0.72, label=PART_TITLES.get(part, part.replace("_", " ")),
                color=COLOURS[index % len(COLOURS)], hatch=HATCHES[index % len(HATCHES)], edgecolor=PAPER,
                linewidth=0.6,
            )  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, floor in enumerate(floors):
            if floor is not None:
                axes.plot((floor, floor), (row - 0.46, row + 0.46), color=INK, linewidth=2, solid_capstyle="butt")
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=":")
        axes.set_yticks(range(len(bars)), [bar for bar, _ in bars])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.set_xlabel(label)
        figure.legend(loc="outside lower left", ncols=min(len(parts), 9), handlelength=1.6, columnspacing=1.2)
        return finished(figure, f"where-{name}", title, caption, wide=True)
