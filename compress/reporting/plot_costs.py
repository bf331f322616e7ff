"""Where the time and the operations go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Rectangle

from ...registry.roles.evaluation import STAGES
from .aggregate import Table
from .configurations import Configuration
from .figures import COLOURS, HATCHES, INK, PAPER, WIDTH, Plot, drawing, finished, percent
from .findings import finite

TIME_PARTS = ("attention", "mlp", "head", "other", *STAGES)
FLOP_PARTS = ("attention_projections", "attention_scores", "mlp", "head", "probe", "compensation", "other")
PART_TITLES = {"mlp": "MLP", "head": "output layer"}
LOOKS = {
    "attention": (0, 0), "attention_projections": (0, 0), "attention_scores": (5, 1), "mlp": (1, 0), "head": (2, 2),
    "other": (7, 0), "probe": (3, 0), "select": (4, 0), "score": (6, 0), "gather": (4, 1), "history": (6, 2),
    "compensate": (5, 0), "compensation": (5, 0),
}  # fmt: skip
"""Part -> its colour and hatch, the same in every figure; parts of one colour are never beside each other."""
HATCH = "hatch"
"""How the ids of hatches begin in a drawing."""
MOST_BARS = 30

Bars = list[tuple[str, dict[str, float]]]


def cost_plots(table: Table) -> list[Plot]:
    """Stacked bars of a prefill's seconds, and of a token's operations."""
    return [plot for plot in (_time(table), _operations(table)) if plot is not None]


def _time(table: Table) -> Plot | None:
    bars: Bars = []
    shown: set[int] = set()
    for configuration in table.configurations:
        pruned, dense = _breakdowns(configuration)
        if pruned and dense:
            whole = sum(dense.values())
            if not whole:
                continue
            if configuration.reference not in shown:
                shown.add(configuration.reference)
                bars.append(
                    (table.dense_name(configuration.reference), {part: value / whole for part, value in dense.items()})
                )
            bars.append((table.name(configuration), {part: value / whole for part, value in pruned.items()}))
    caption = (
        "Seconds of one prefill by part, relative to the dense model's in the same run. Select, probe, score, gather, "
        "compensate and history are what deciding and compensating anew for a batch takes; measured apart from the "
        "ratios in the table, with timers around every part."
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
    shown: set[int] = set()
    for configuration in table.configurations:
        outcome = next((o for o in configuration.first.outcomes if o["evaluator"] == "cost"), None)
        if outcome is None:
            continue
        dense, pruned = (_split(outcome[side] or {}) for side in ("dense", "pruned"))
        whole = sum(dense.values())
        if not (whole and pruned):
            continue
        if configuration.reference not in shown:
            shown.add(configuration.reference)
            bars.append(
                (table.dense_name(configuration.reference), {part: value / whole for part, value in dense.items()})
            )
            floors.append(None)
        bars.append((table.name(configuration), {part: value / whole for part, value in pruned.items()}))
        floors.append(finite(outcome["pruned"].get("floor_ratio")))
    caption = (
        "Operations per token of a prefill by part, relative to dense"
        + ("; the thick tick is the floor: the same counts sliced, no probe, no compensation." if any(floors) else ".")
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
        caption += f" The first {MOST_BARS} bars; the others are in table.csv."
        bars, floors = bars[:MOST_BARS], floors[:MOST_BARS]
    present = {part for _, parts in bars for part in parts}
    parts = [part for part in order if part in present] + sorted(present - set(order))
    with drawing(2 * WIDTH + 0.4, 1.4 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        starts = [0.0] * len(bars)
        handles = []
        for part in parts:
            colour, hatch = LOOKS.get(part, (7, 3))
            widths = [found.get(part, 0.0) for _, found in bars]
            place = {"y": range(len(bars)), "width": widths, "left": starts, "height": 0.72, "linewidth": 0.6}
            look = {"edgecolor": PAPER, "alpha": 0.6 if hatch else None}
            handles.append([axes.barh(**place, **look, color=COLOURS[colour])])
            if hatch:
                # Drawn apart, so that print can leave them out: as patterns they make a PDF many times as large.
                handles[-1].append(axes.barh(**place, color="none", edgecolor=PAPER, hatch=HATCHES[hatch]))
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, floor in enumerate(floors):
            if floor is not None:
                axes.plot((floor, floor), (row - 0.46, row + 0.46), color=INK, linewidth=2, solid_capstyle="butt")
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=":")
        axes.set_yticks(range(len(bars)), [bar for bar, _ in bars])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(percent)
        axes.set_xlabel(label)
        titles = [PART_TITLES.get(part, part.replace("_", " ")) for part in parts]
        legend = figure.legend(
            list(map(tuple, handles)), titles, handler_map={tuple: HandlerTuple(ndivide=1)}, loc="outside lower left",
            ncols=min(len(parts), 9), handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip
        for index, patch in enumerate(p for p in [*axes.patches, *legend.findobj(Rectangle)] if p.get_hatch()):
            patch.set_gid(f"{HATCH}-{index}")
        return finished(figure, f"where-{name}", title, caption, wide=True)
