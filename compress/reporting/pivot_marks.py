"""The best cell of a cross table, and those that cannot be told from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .aggregate import BOUNDS
from .bootstrap import mean_interval
from .columns import Column, find, main_columns
from .configurations import Configuration, key
from .evidence import FEW_SEEDS
from .findings import Trial, axis_title
from .pivot_axes import Grid

if TYPE_CHECKING:
    from .pivot_records import Cell, Place, Question

ROUNDING = 1e-12
"""Differences up to this are of rounding."""


@dataclass(frozen=True)
class Marks:
    """Which cells stand out, and what that rests on."""

    best: tuple[Place, ...] = ()
    """The best value; more than one where they are equal."""
    tied: tuple[Place, ...] = ()
    """Cells whose difference from the best may be none."""
    tested: int = 0
    """On how many units the test rests; 0 for none."""
    units: str = ""
    """What they are: ``group`` or ``seed``."""
    axes: tuple[str, ...] = ()
    """The axes whose combinations are groups."""
    within: tuple[str, ...] = ()
    """The axes that are averaged within each unit."""
    apart: tuple[str, ...] = ()
    """The rows' or columns' axis where its values do not compare, so that each has a best of its own."""
    bounds: tuple[Place, ...] = ()
    """Cells that compute no less than the dense model, and are no contenders."""


def marked(grid: Grid, question: Question, cells: Mapping[Place, Cell], over: Mapping[str, Sequence[Any]]) -> Marks:
    """The best of the cells, and those that a paired 95% interval (Student's) does not tell from it.

    Its units are groups of trials on the same model and texts; seeds and ratios of a group are averaged, being no
    evidence of their own. Where there is one group only, they are its seeds. Different ratios, models and texts do
    not compare: where they are rows or columns, each has a best of its own.
    """
    column = question.metric.column
    if column.better is None:
        return Marks()
    flops = find(main_columns(grid.findings), "cost.flops_ratio")
    bounds = tuple(place for place, cell in cells.items() if cell.effects and not _saves(cell, flops))
    able = {place: cell for place, cell in cells.items() if cell.effects and place not in bounds}
    if not able:
        return Marks(bounds=bounds)
    several = [name for name, values in over.items() if len(values) > 1]
    trials = next(iter(able.values())).trials
    axes, of = tuple(name for name in several if name in grid.circumstances), "group"
    units = _units(trials, axes)
    if len(units) < 2:
        axes, of = tuple(name for name in several if name.endswith("seed")), "seed"
        units = _units(trials, axes)
        units = units if len(units) >= FEW_SEEDS else []
    apart = tuple(name for name in (question.rows, question.columns) if is_apart(grid, name))
    contests: dict[tuple[int, ...], dict[Place, Cell]] = {}
    for place, cell in able.items():
        line = tuple(place[side] for side, name in enumerate((question.rows, question.columns)) if name in apart)
        contests.setdefault(line, {})[place] = cell
    best, tied = [], []
    for contest in contests.values():
        first, others = _contest(contest, units, 1 if column.better == "lower" else -1)
        best += first
        tied += others
    within = tuple(name for name in several if name not in axes)
    return Marks(tuple(best), tuple(tied), len(units), of, axes, within, apart, bounds)


def is_apart(grid: Grid, axis: str) -> bool:
    """Whether an axis's values do not compare: ratios, models and texts."""
    return axis in grid.circumstances or axis_title(axis) == "ratio"


def _contest(cells: Mapping[Place, Cell], units: Sequence[Sequence[str]], sign: int) -> tuple[list[Place], list[Place]]:
    """The best of several cells, and those that are not told from it; none where all have the same value."""
    least = min(sign * cell.effect for cell in cells.values())
    best = [place for place, cell in cells.items() if sign * cell.effect - least <= ROUNDING]
    if len(best) == len(cells):
        return [], []
    first, tied = cells[best[0]].effects, []
    for place, cell in cells.items():
        differences = [fmean(sign * (cell.effects[s] - first[s]) for s in unit) for unit in units]
        if place not in best and differences and mean_interval(differences)[0] <= ROUNDING:
            tied.append(place)
    return best, tied


def _saves(cell: Cell, flops: Column | None) -> bool:
    """As :meth:`Table.saves` says of configurations: by operations where they were measured, else by strategy."""
    trials = list(cell.trials.values())
    share = Configuration({}, trials).mean(flops)
    return any(trial.data["strategy"] not in BOUNDS for trial in trials) if share is None else share < 1


def _units(trials: Mapping[str, Trial], axes: Sequence[str]) -> list[list[str]]:
    """The settings that have the same values of some axes."""
    found: dict[str, list[str]] = {}
    for setting, trial in trials.items():
        found.setdefault(key([trial.settings.get(name) for name in axes]), []).append(setting)
    return list(found.values())
