"""A study's trials as a cross table: two axes, averaged over all others trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any

from ...registry import SpecError
from .configurations import key
from .differences import unlike
from .findings import Trial, finite
from .pivot_axes import Grid, same
from .pivot_marks import Marks, marked
from .pivot_records import Cell, Place, Question

FAILED, WAITING, NO_VALUE, NO_REFERENCE = "failed", "waiting", "without a finite value", "without a reference"
"""Why a planned trial is not in its cell."""


@dataclass
class Cross:
    """One table: all trials, or those with one value of an axis."""

    question: Question
    rows: list[Any]
    columns: list[Any]
    cells: dict[Place, Cell]
    only: tuple[str, Any] | None
    """The axis and the value that all its trials have."""
    over: dict[str, list[Any]]
    """What cells are averaged over: axis -> values."""
    settings: int
    """How many settings every cell is averaged over."""
    left_out: int
    """How many settings some cells have and others lack."""
    outside: int
    """Trials that have no value of the rows' or the columns' axis."""
    unlike: list[str]
    """What was measured otherwise in the references."""
    marks: Marks

    @property
    def trials(self) -> list[Trial]:
        """All that are averaged."""
        return [trial for cell in self.cells.values() for trial in cell.trials.values()]


@dataclass(frozen=True)
class Matched:
    """Every trial with its effect, or with the reason why it has none."""

    grid: Grid
    question: Question

    @cached_property
    def by_settings(self) -> dict[str, Trial]:
        found: dict[str, Trial] = {}
        for trial in self.grid.findings.trials:
            other = found.setdefault(key(trial.settings), trial)
            if other is not trial and "done" == trial.status == other.status:
                raise SpecError(
                    f"trials {other.number} and {trial.number} have the same settings ({trial.label}), so that cells "
                    "cannot be matched; make what they differ in an axis of the study"
                )
        return found

    def reference(self, trial: Trial) -> Trial | None:
        """The trial with the reference's settings and otherwise the same ones."""
        return self.by_settings.get(key({**trial.settings, **self.question.relative}))

    def effect(self, trial: Trial) -> float | str:
        """Logarithm of the ratio, or the difference; a text says why there is none."""
        if trial.status != "done" or not trial.data:
            return FAILED if trial.status == "failed" else WAITING
        column = self.question.metric.column
        value = finite(column.value(trial))
        if value is None:
            return NO_VALUE
        if self.question.relative:
            other = self.reference(trial)
            base = finite(column.value(other)) if other else None
        else:
            base = finite(column.dense(trial))
        if base is None:
            return NO_REFERENCE
        return log(value / base) if self.question.metric.ratio else value - base

    def unlike(self, trials: Sequence[Trial]) -> list[str]:
        """What the metric's protocol says otherwise in their references, each once."""
        label = self.question.metric.column.label
        found: dict[str, None] = {}
        for trial in trials if self.question.relative else ():
            sides = [{"metrics": [each.outcome(label)]} for each in (trial, self.reference(trial))]
            found |= dict.fromkeys(said.partition(" do not compare: ")[2] for said in unlike(*sides))
        return list(found)


def crossed(grid: Grid, question: Question) -> list[Cross]:
    """A table for each value of the question's ``by``, then one over all trials.

    All cells of a table are averaged over the same settings of the other axes: those that every cell has which has
    any. Raises :class:`SpecError` where trials cannot be told apart.
    """
    matched = Matched(grid, question)
    matched.by_settings  # noqa: B018  (finds what cannot be told apart, whatever the reference)
    values = [] if question.by is None else grid.axes[question.by]
    tables = [_cross(matched, (question.by, value)) for value in values] if len(values) > 1 else []
    return [*tables, _cross(matched, None)]


def _cross(matched: Matched, only: tuple[str, Any] | None) -> Cross:
    grid, question = matched.grid, matched.question
    trials = [t for t in grid.findings.trials if only is None or same(t.settings, *only)]
    others = [name for name in grid.axes if name not in (question.rows, question.columns)]
    places = [{key(value): i for i, value in enumerate(grid.axes[name])} for name in (question.rows, question.columns)]
    ratio = question.metric.ratio
    cells = {(i, j): Cell(ratio) for i in range(len(places[0])) for j in range(len(places[1]))}
    inside = [t for t in trials if question.rows in t.settings and question.columns in t.settings]
    for trial in inside:
        i, j = (key(trial.settings[name]) for name in (question.rows, question.columns))
        cell = cells[places[0][i], places[1][j]]
        cell.planned += 1
        effect = matched.effect(trial)
        if isinstance(effect, str):
            cell.troubles[effect] = cell.troubles.get(effect, 0) + 1
            continue
        setting = key({name: trial.settings[name] for name in others if name in trial.settings})
        cell.effects[setting], cell.trials[setting] = effect, trial
    measured = [set(cell.effects) for cell in cells.values() if cell.effects]
    shared = shared_settings(measured)
    for cell in cells.values():
        keep = [setting for setting in cell.effects if shared <= set(cell.effects) and setting in shared]
        cell.spare = len(cell.effects) - len(keep)
        cell.effects = {setting: cell.effects[setting] for setting in keep}
        cell.trials = {setting: cell.trials[setting] for setting in keep}
    used = [trial for cell in cells.values() for trial in cell.trials.values()]
    over = {
        name: [value for value in grid.axes[name] if any(same(trial.settings, name, value) for trial in used)]
        for name in others
        if only is None or name != only[0]
    }
    cross = Cross(
        question=question,
        rows=grid.axes[question.rows],
        columns=grid.axes[question.columns],
        cells=cells,
        only=only,
        over={name: values for name, values in over.items() if values},
        settings=len(shared),
        left_out=len(set().union(*measured)) - len(shared),
        outside=len(trials) - len(inside),
        unlike=matched.unlike(used),
        marks=Marks(),
    )
    return replace(cross, marks=marked(grid, question, cells, cross.over))


def shared_settings(measured: Sequence[set[str]]) -> set[str]:
    """What all have; where there is nothing, what those have that share the setting which most of them have."""
    if not measured:
        return set()
    shared = set.intersection(*measured)
    if shared:
        return shared
    settings = dict.fromkeys(setting for each in measured for setting in sorted(each))
    most = max(settings, key=lambda setting: sum(setting in each for each in measured))
    return set.intersection(*(each for each in measured if most in each))
