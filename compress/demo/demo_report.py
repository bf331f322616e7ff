"""The demo's table, and sentences on its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..output.formatting import TIE, TITLES, number, share
from ..reporting.metrics import unequal

HEAD = ("cut", "strategy", "other text", "same kind", "accuracy", "FLOPs", "parameters", "time per batch")

SITUATIONS = {"other": "other text", "same": "same kind"}
"""Situation -> its column in the table."""


@dataclass
class Row:
    """One line of the table: perplexities in both situations, accuracy, and costs relative to dense."""

    strategy: str
    ratio: float | None
    other: float | None = None
    same: float | None = None
    accuracy: float | None = None
    flops: float | None = None
    parameters: float | None = None
    time: float | None = None
    dynamic: bool = False
    compensated: bool = False

    @property
    def title(self) -> str:
        return TITLES.get(self.strategy, self.strategy)


def table_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Cells under :data:`HEAD`; the ratio is written once for its block."""
    cells: list[tuple[str, ...]] = []
    last: float | None = None
    for row in rows:
        ratio = "" if row.ratio == last or row.ratio is None else share(row.ratio)
        last = row.ratio
        time = "-" if row.time is None else f"{row.time:.2f}"
        costs = (percent(row.accuracy), share(row.flops), share(row.parameters), time)
        cells.append((ratio, row.title, number(row.other), number(row.same), *costs))
    return cells


def percent(value: float | None) -> str:
    """0.4444 -> 44.4%."""
    return "-" if value is None else f"{100 * value:.1f}%"


def sentences(rows: Sequence[Row], ratios: Sequence[float]) -> list[str]:
    """PP compared with the best static strategy and with full-batch probing, and its time."""
    blocks = {ratio: {row.strategy: row for row in rows if row.ratio == ratio} for ratio in ratios}
    found = [
        f"{share(ratio)}, {words}: {_compared(block, situation)}."
        for ratio, block in blocks.items()
        for situation, words in SITUATIONS.items()
    ]
    beaten_by = {
        static.title
        for block in blocks.values()
        for situation in SITUATIONS
        for static in [_best_static(block, situation)]
        if static.compensated and _gap(getattr(block["pp"], situation), getattr(static, situation)) > TIE
    }
    if beaten_by:
        found.append(
            f"{' and '.join(sorted(beaten_by))} adds the mean of what it drops as a bias; PP as published does not "
            "(compensate: mean adds it)."
        )
    pp = blocks[max(ratios)]["pp"]
    found.append(
        f"At {share(pp.ratio)} PP computes {share(pp.flops)} of dense's operations, its probe included, in "
        f"{pp.time:.2f} of dense's time per batch on this machine."
    )
    return found


def _best_static(block: dict[str, Row], situation: str) -> Row:
    return best_of((row for row in block.values() if not row.dynamic), situation)


def best_of(rows: Iterable[Row], situation: str) -> Row:
    """The row of the lowest perplexity."""
    return min(rows, key=lambda row: getattr(row, situation))


def _compared(block: dict[str, Row], situation: str) -> str:
    pp, static = getattr(block["pp"], situation), _best_static(block, situation)
    best, bound = getattr(static, situation), getattr(block["full_batch_probing"], situation)
    gap, room = _gap(pp, best), -_gap(bound, pp)
    flops = block["pp"].flops, static.flops
    cost = f", at unequal cost (PP {share(flops[0])} of dense's FLOPs, {static.title} {share(flops[1])})"
    if abs(gap) <= TIE:
        verdict = f"ties with the best static strategy, {static.title} ({number(best)})"
    else:
        verdict = f"is {_percent(gap)} {'worse' if gap > 0 else 'better'} than the best static strategy, "
        verdict += f"{static.title} ({number(best)})"
    if room > TIE:
        left = f"probing the full batch would gain another {_percent(room)}"
    elif room < -TIE:
        left = f"probing the full batch would lose {_percent(room)}: the score, not the probe, is the limit"
    else:
        left = "probing the full batch would gain next to nothing"
    return f"PP ({number(pp)}) {verdict}{cost if unequal(*flops) else ''}; {left}"


def _gap(value: float, other: float) -> float:
    return value / other - 1


def _percent(difference: float) -> str:
    return f"{100 * abs(difference):.2g}%"
