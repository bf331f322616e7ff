"""Cross tables: trials of studies by two axes, averaged over the same settings of all others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from ...registry import SpecError, near
from ..files.dotted import resolved_settings
from ..files.yaml_plain import plain_data
from ..output.formatting import number
from .axes import axis_title, is_condition, is_repetition, key, setting_text
from .compare import not_comparable
from .metrics import REMOVED, Metric, all_metrics, evaluators_of, find, main_metrics
from .statistics import FEW_SEEDS, mean_interval
from .summary import ABOVE_DENSE
from .trials import Study, Trial

STORE = "store"
"""The axis that distinguishes several stores."""
DENSE = "dense"
"""What ``--relative`` calls the dense model of the same trial."""
SCORES = ("zero_shot", "similarity", "overlap")
"""Evaluators of shares between 0 and 1, which are compared by differences; ``loss`` is another such value."""
ROUNDING = 1e-12
"""Differences up to this are rounding."""
FAILED, WAITING, NO_VALUE, NO_REFERENCE = "failed", "waiting", "without a finite value", "without a reference"
"""Why a planned trial is missing from its cell."""
BEST, TIE, ABOVE = "◆", "◇", "†"
"""Marks of the best cell, of those not significantly worse, and of those that compute no less than dense."""
FEW_GROUPS = 4
"""Fewer groups than this give very wide intervals, which the table then states."""

Place = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Question:
    """What is crossed, and how."""

    rows: str
    columns: str
    metric: Metric
    ratio: bool
    """Whether trials are compared by ratios and averaged geometrically; else by differences."""
    relative: dict[str, Any] = field(default_factory=dict)
    """Settings of the reference; empty for the dense model of the same trial."""
    by: str | None = None
    """The axis that gets a table for each of its values."""

    @property
    def reference(self) -> str:
        return ", ".join(f"{axis_title(n)} {setting_text(n, v)}" for n, v in self.relative.items()) or DENSE

    def text(self, value: float) -> str:
        """A cell's value: a ratio, points of accuracy, or another difference."""
        if value != value:
            return "-"
        if self.ratio:
            return f"{value:.3f}" if 0.01 <= value < 100 else number(value)
        return f"{100 * value:+.1f}" if self.metric.style == "accuracy" else f"{value:+.3g}"


@dataclass(frozen=True)
class Grid:
    """The trials of all studies with every setting that is known of them."""

    study: Study
    axes: dict[str, list[Any]]
    """The values of each axis, in the order of the studies."""
    conditions: tuple[str, ...]
    """Axes that vary the model or the texts: their combinations are the units of the tests."""

    def axis(self, asked: str, option: str) -> str:
        """The axis with this name or title; raises :class:`SpecError` if there is none."""
        titled = [name for name in self.axes if asked in (name, axis_title(name))]
        if asked in titled or len(titled) == 1:
            return asked if asked in titled else titled[0]
        known = [*self.axes, *map(axis_title, self.axes)]
        raise SpecError(
            f"{option}: there is no axis {asked!r}{near(asked, known)}; the axes are {', '.join(self.axes) or 'none'}"
        )

    def value(self, axis: str, asked: str, option: str) -> Any:
        """The axis's value, as a file or a report writes it; raises :class:`SpecError` if there is none."""
        try:
            read = key(plain_data(asked, option))
        except SpecError:
            read = ""
        for value in self.axes[axis]:
            if value == asked or key(value) == read or setting_text(axis, value) == asked:
                return value
        known = [setting_text(axis, value) for value in self.axes[axis]]
        raise SpecError(f"{option}: {axis} has no value {asked!r}{near(asked, known)}; it has {', '.join(known)}")

    def question(
        self, rows: str, columns: str, by: str | None = None, metric: str | None = None, relative: str = DENSE
    ) -> Question:
        """The command's options; raises :class:`SpecError` for axes, values or metrics that the trials do not have."""
        axes: dict[str, str] = {}
        for option, name in {"--rows": rows, "--columns": columns, "--by": by}.items():
            axis = None if name is None else self.axis(name, option)
            if axis in axes:
                raise SpecError(f"{axes[axis]} and {option} are the same axis, {axis}; each needs its own")
            axes |= {axis: option} if axis else {}
        reference = self.relative(relative)
        found, ratio = self._metric(metric, bool(reference))
        of = {option: axis for axis, option in axes.items()}
        return Question(of["--rows"], of["--columns"], found, ratio, reference, of.get("--by"))

    def relative(self, asked: str) -> dict[str, Any]:
        """Settings of the reference, ``AXIS=VALUE[,AXIS=VALUE]``; empty for ``dense``."""
        option, found = "--relative", {}
        pieces = [] if asked.strip() == DENSE else re.split(r",(?=[^,=]+=)", asked)  # other commas belong to a value
        for name, equals, value in (map(str.strip, piece.partition("=")) for piece in pieces):
            if not equals:
                raise SpecError(f"{option}: {asked!r} is neither {DENSE} nor AXIS=VALUE[,AXIS=VALUE]")
            axis = self.axis(name, option)
            if axis in found:
                raise SpecError(f"{option}: {axis} is named twice; name each axis once")
            found[axis] = self.value(axis, value, option)
        those = [trial for trial in self.study.trials if key({**trial.settings, **found}) == key(trial.settings)]
        if not any(trial.result for trial in those):
            why = f"{len(those)} planned, none is finished" if those else "no such combination was planned"
            raise SpecError(f"{option}: no trial has {asked} ({why}); name a reference that was measured, or {DENSE}")
        return found

    def _metric(self, asked: str | None, has_reference: bool) -> tuple[Metric, bool]:
        """The metric ``LABEL.VALUE``, by default the first of quality; and whether it is compared by ratios."""
        frame, main = self.study.frame, main_metrics(self.study)
        known = [*main, *all_metrics(self.study)]
        metric = find(known, asked) if asked else next((m for m in main if m.quality), known[0])
        if metric is None:
            names = list(dict.fromkeys(m.key for m in known))
            raise SpecError(
                f"--metric: nothing measured {asked!r}{near(asked or '', names)}; there are {', '.join(names)}"
            )
        evaluator = evaluators_of(self.study)[metric.label]
        metric = replace(metric, relative=False)  # the table itself divides
        if evaluator == "zero_shot" and not metric.name.endswith("_stderr"):
            metric = replace(metric, better="higher", style="accuracy")
        values, bases = metric.pruned(frame).dropna(), metric.dense(frame).dropna()
        if values.empty:
            raise SpecError(f"--metric: {metric.key} is not a number in any finished trial; choose another")
        if bases.empty and not has_reference:
            raise SpecError(
                f"--metric: {metric.key} has no value for the dense model; name a reference with --relative AXIS=VALUE"
            )
        positive = bool((values > 0).all() and (has_reference or (bases > 0).all()))
        return metric, positive and evaluator not in SCORES and metric.name != "loss"


def join(studies: Sequence[Study]) -> Grid:
    """All trials of the studies, each with the settings that only another study varied.

    Several studies get an axis ``store`` with the names of their files; raises :class:`SpecError` if those are equal,
    or a study has an axis of that name.
    """
    names = [study.source.name if study.source.is_dir() else study.source.stem for study in studies]
    if len(set(names)) < len(names):
        raise SpecError(f"stores are distinguished by their files' names, which must differ: {', '.join(names)}")
    several = len(studies) > 1
    axes: dict[str, dict[str, Any]] = {STORE: {key(name): name for name in names}} if several else {}
    conditions = []
    for study in studies:
        if several and STORE in study.axes:
            raise SpecError(f"{study.source} has its own axis {STORE!r}; cross it alone, or rename the axis")
        own = dict.fromkeys([*study.axes, *(name for trial in study.trials for name in trial.settings)])
        for name in own:
            axes.setdefault(name, {}).update({key(value): value for value in study.axes.get(name, ())})
        conditions += [name for name in ({STORE: None} | own if several else own) if is_condition(name, study.text)]
    trials = []
    for study, store in zip(studies, names, strict=True):
        for trial in study.trials:
            lacking = any(name not in trial.settings and name != STORE for name in axes)
            known = {**(resolved_settings(trial.resolved) if lacking else {}), **trial.settings, STORE: store}
            settings = {name: known[name] for name in axes if name in known}
            trials.append(replace(trial, settings=settings))
            for name, value in settings.items():
                axes[name].setdefault(key(value), value)
    title = "; ".join(dict.fromkeys(study.title for study in studies))
    joined = replace(studies[0], title=title, trials=tuple(trials), published=())
    ordered = tuple(name for name in axes if name in conditions)
    return Grid(joined, {name: list(values.values()) for name, values in axes.items()}, ordered)


@dataclass(frozen=True)
class Marks:
    """The best cells, those not significantly worse, and those that are not ranked as they compute no less than dense.

    The test counts ``tested`` units (``group`` or ``seed``), the combinations of ``axes``, each averaged ``within``
    others. The values of the axes ``apart`` do not compare: each has its own best.
    """

    best: tuple[Place, ...] = ()
    ties: tuple[Place, ...] = ()
    above_dense: tuple[Place, ...] = ()
    unit: str = ""
    tested: int = 0
    axes: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def bold(self) -> tuple[Place, ...]:
        """The best cells with all that tie; none where nothing could be tested."""
        return (*self.best, *self.ties) if self.tested else ()


@dataclass(frozen=True)
class Cross:
    """One table: all trials, or those with one value of an axis (``only``)."""

    question: Question
    only: tuple[str, Any] | None
    rows: list[Any]
    columns: list[Any]
    cells: dict[Place, dict[str, Any]]
    """Value, least, largest, effect and share removed (NaN without trials); trials, planned, not_shared and missing."""
    settings: int
    """The settings of the other axes that each cell is averaged over; ``left_out`` are those that some cells lack."""
    left_out: int
    outside: int
    """Trials without a value of the rows' or the columns' axis."""
    trials: list[Trial]
    """Those averaged, over the values ``over`` of each axis."""
    over: dict[str, list[Any]]
    not_comparable: list[str]
    """What was measured differently in the references."""
    marks: Marks

    @property
    def reasons(self) -> list[str]:
        """Why trials are missing."""
        return [name for name in next(iter(self.cells.values())) if name in (FAILED, WAITING, NO_VALUE, NO_REFERENCE)]

    @property
    def head(self) -> list[str]:
        """Titles of the columns; the first names both axes."""
        rows, columns = self.question.rows, self.question.columns
        return [f"{axis_title(rows)} \\ {axis_title(columns)}", *(setting_text(columns, v) for v in self.columns)]

    @property
    def lines(self) -> list[tuple[str, list[Place]]]:
        """Title and places of each row."""
        return [
            (setting_text(self.question.rows, value), [(i, j) for j in range(len(self.columns))])
            for i, value in enumerate(self.rows)
        ]


def cross(grid: Grid, question: Question) -> list[Cross]:
    """A table for each value of the question's ``by``, then one over all trials.

    All cells of a table are averaged over the same settings of the other axes, those that every non-empty cell has.
    Raises :class:`SpecError` if two finished trials have the same settings.
    """
    trials = grid.study.trials
    keys = pd.DataFrame({n: [key(t.settings[n]) if n in t.settings else "" for t in trials] for n in grid.axes})
    frame = _effects(grid, question, keys)
    values = [] if question.by is None else grid.axes[question.by]
    tables = [(question.by, value) for value in values] if question.by and len(values) > 1 else []
    return [_cross(grid, question, keys, frame, only) for only in (*tables, None)]


def _effects(grid: Grid, question: Question, keys: pd.DataFrame) -> pd.DataFrame:
    """One row for each trial: its cell, other settings, effect or why it has none, reference, and whether it saves."""
    trials, metric, measured = grid.study.trials, question.metric, grid.study.frame
    by_settings: dict[str, int] = {}
    for place, trial in enumerate(trials):
        known = by_settings.setdefault(key(trial.settings), place)
        if known != place and trials[known].result and trial.result:
            raise SpecError(
                f"trials {trials[known].number} and {trial.number} have the same settings ({trial.label}), so that "
                "cells cannot be matched; make their difference an axis of the study"
            )
    axes = [question.rows, question.columns]
    rows, columns = (keys[n].map({key(v): i for i, v in enumerate(grid.axes[n])}).fillna(-1).astype(int) for n in axes)
    others = [key({n: v for n, v in trial.settings.items() if n not in axes}) for trial in trials]
    frame = pd.DataFrame({"row": rows, "column": columns, "other": others})
    value, base = metric.pruned(measured), metric.dense(measured)
    if question.relative:
        frame["reference"] = [by_settings.get(key({**t.settings, **question.relative}), -1) for t in trials]
        base = pd.Series([value.get(place, np.nan) for place in frame["reference"]])
    frame["effect"] = np.log(value / base) if question.ratio else value - base
    done, failed = measured["trial", "status"].eq("done"), measured["trial", "status"].eq("failed")
    conditions = [failed, ~done, value.isna(), base.isna()]
    frame["reason"] = np.select(conditions, [FAILED, WAITING, NO_VALUE, NO_REFERENCE], default="")
    above = pd.Series([float(t.result is not None and t.result.strategy in ABOVE_DENSE) for t in trials])
    flops = find(main_metrics(grid.study), "cost.flops_ratio")
    frame["flops"] = flops.pruned(measured).fillna(above) if flops else above
    frame["removed"] = REMOVED.pruned(measured)
    return frame


def shared_settings(wide: pd.DataFrame) -> pd.DataFrame:
    """The rows (settings) that all columns (cells) have.

    If there are none, the columns that have the most frequent setting, and the rows that those share.
    """
    wide = wide.dropna(axis=1, how="all")
    shared = wide.dropna()
    if shared.empty and not wide.empty:
        most = wide.notna().sum(axis=1).idxmax()
        shared = wide.dropna(axis=1, subset=[most]).dropna()
    return shared


def _cross(
    grid: Grid, question: Question, keys: pd.DataFrame, frame: pd.DataFrame, only: tuple[str, Any] | None
) -> Cross:
    trials, axes = grid.study.trials, (question.rows, question.columns)
    if only:
        frame = frame[keys[only[0]] == key(only[1])]
    inside = frame[(frame["row"] >= 0) & (frame["column"] >= 0)]
    measured = inside[inside["reason"] == ""]
    wide = measured.pivot(index="other", columns=["row", "column"], values="effect")
    shared = shared_settings(wide)
    places = pd.MultiIndex.from_product([range(len(grid.axes[name])) for name in axes])
    counts = inside.groupby(["row", "column", "reason"]).size().unstack(fill_value=0).reindex(places, fill_value=0)
    effects = pd.DataFrame({"value": shared.mean(), "least": shared.min(), "largest": shared.max()}).reindex(places)
    cells = effects.apply(np.exp) if question.ratio else effects
    cells = cells.assign(effect=effects["value"], trials=shared.count().reindex(places, fill_value=0))
    planned, found = counts.sum(axis=1), counts.pop("") if "" in counts else 0
    cells = cells.assign(planned=planned, not_shared=found - cells["trials"]).join(counts)
    at = pd.Series(list(zip(measured["row"], measured["column"], strict=True)), measured.index, dtype=object)
    used = measured[measured["other"].isin(shared.index) & at.isin(list(shared))]
    cells["removed"] = used.groupby(["row", "column"])["removed"].mean().reindex(places)
    others = [name for name in grid.axes if name not in axes and not (only and name == only[0])]
    over = {n: [v for v in grid.axes[n] if key(v) in set(keys.loc[used.index, n])] for n in others}
    over = {name: values for name, values in over.items() if values}
    different: list[str] = []
    for pair in zip(used.index.tolist(), used["reference"].tolist(), strict=True) if question.relative else ():
        one, other = (trials[place].metric(question.metric.label) for place in pair)
        different += not_comparable(one, other, question.metric.name) if one and other else []
    by_place: dict[Any, Any] = cells.to_dict("index")
    return Cross(
        question, only, grid.axes[question.rows], grid.axes[question.columns], by_place, len(shared),
        len(wide) - len(shared), len(frame) - len(inside), [trials[place] for place in used.index], over,
        list(dict.fromkeys(different)), _mark(grid, question, keys, used, [n for n, vs in over.items() if len(vs) > 1]),
    )  # fmt: skip


def _mark(grid: Grid, question: Question, keys: pd.DataFrame, used: pd.DataFrame, several: Sequence[str]) -> Marks:
    """The best cells, and those that Student's 95% interval of the paired differences does not distinguish from them.

    The units of the test are groups of trials on the same model and texts; seeds and ratios within a group are averaged
    first. With one group only, they are its seeds. Ratios, models and texts do not compare: where they are rows or
    columns, each has its own best. ``several`` are the axes that cells are averaged over.
    """
    metric = question.metric
    if metric.better is None or used.empty:
        return Marks()
    flops = used.groupby(["row", "column"])["flops"].mean()
    above = tuple(flops.index[flops >= 1])
    apart = tuple(n for n in (question.rows, question.columns) if n in grid.conditions or axis_title(n) == "ratio")

    def units(names: Sequence[str]) -> pd.DataFrame:
        by = used.index.map(lambda place: tuple(keys.loc[place, list(names)]))
        return used.assign(unit=by).groupby(["unit", "row", "column"])["effect"].mean().unstack([1, 2])

    axes, unit = [name for name in several if name in grid.conditions], "group"
    groups = units(axes)
    if len(groups) < 2:
        axes, unit = [name for name in several if is_repetition(name)], "seed"
        groups = units(axes)
    tested = len(groups) if len(groups) >= (2 if unit == "group" else FEW_SEEDS) else 0
    contests: dict[Place, list[Place]] = {}
    for row, column in (place for place in flops.index if place not in above):
        contest = (row if question.rows in apart else -1, column if question.columns in apart else -1)
        contests.setdefault(contest, []).append((row, column))
    best: list[Place] = []
    ties: list[Place] = []
    for cells in contests.values():
        means = metric.sign * groups[cells].mean()
        first = [place for place in cells if means[place] - means.min() <= ROUNDING]
        if len(first) == len(cells):
            continue
        best += first
        if tested:
            low, _ = mean_interval(metric.sign * groups[cells].sub(groups[first[0]], axis=0))
            ties += [place for place, end in zip(cells, low, strict=True) if place not in first and end <= ROUNDING]
    within = tuple(name for name in several if name not in axes)
    return Marks(tuple(best), tuple(ties), above, unit, tested, tuple(axes), within, apart)
