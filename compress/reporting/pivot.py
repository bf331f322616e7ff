"""Cross tables: the trials of studies by two axes, averaged over the same settings of all others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ...registry import SpecError, near
from ..files.dotted import resolved_settings
from .axes import axis_title, is_condition, is_repetition, key, setting_text
from .compare import not_comparable
from .metrics import Metric, all_metrics, evaluators_of, find, main_metrics
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
        titled = [name for name in self.axes if axis_title(name) == asked]
        if asked in self.axes or len(titled) == 1:
            return asked if asked in self.axes else titled[0]
        known = [*self.axes, *map(axis_title, self.axes)]
        raise SpecError(
            f"{option}: there is no axis {asked!r}{near(asked, known)}; the axes are {', '.join(self.axes) or 'none'}"
        )

    def value(self, axis: str, asked: str, option: str) -> Any:
        """The axis's value, as a file or a report writes it; raises :class:`SpecError` if there is none."""
        try:
            read = key(yaml.safe_load(asked))
        except yaml.YAMLError:
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
        given = {"--rows": rows, "--columns": columns, **({} if by is None else {"--by": by})}
        axes = {option: self.axis(name, option) for option, name in given.items()}
        for option, axis in axes.items():
            others = [other for other in axes if other != option and axes[other] == axis]
            if others:
                raise SpecError(f"{option} and {others[0]} are the same axis, {axis}; each needs its own")
        reference = self.relative(relative)
        found, ratio = self._metric(metric, bool(reference))
        return Question(axes["--rows"], axes["--columns"], found, ratio, reference, axes.get("--by"))

    def relative(self, asked: str) -> dict[str, Any]:
        """Settings of the reference, ``AXIS=VALUE[,AXIS=VALUE]``; empty for ``dense``."""
        option, found = "--relative", {}
        if asked.strip() == DENSE:
            return {}
        for piece in re.split(r",(?=[^,=]+=)", asked):  # other commas belong to a value
            name, equals, value = (part.strip() for part in piece.partition("="))
            if not equals:
                raise SpecError(f"{option}: {asked!r} is neither {DENSE} nor AXIS=VALUE[,AXIS=VALUE]")
            axis = self.axis(name, option)
            if axis in found:
                raise SpecError(f"{option}: {axis} is named twice; name each axis once")
            found[axis] = self.value(axis, value, option)
        those = [t for t in self.study.trials if all(_has(t, name, value) for name, value in found.items())]
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
    for study in studies:
        for name, values in study.axes.items():
            if several and name == STORE:
                raise SpecError(f"{study.source} has its own axis {STORE!r}; cross it alone, or rename the axis")
            axes.setdefault(name, {}).update({key(value): value for value in values})
        for trial in study.trials:
            for name in trial.settings:
                axes.setdefault(name, {})
    trials = []
    for study, store in zip(studies, names, strict=True):
        for trial in study.trials:
            lacking = any(name not in trial.settings and name != STORE for name in axes)
            known = {**(resolved_settings(trial.resolved) if lacking else {}), **trial.settings, STORE: store}
            settings = {name: known[name] for name in axes if name in known}
            trials.append(replace(trial, settings=settings))
            for name, value in settings.items():
                axes[name].setdefault(key(value), value)
    conditions = [
        name
        for name in axes
        for study in studies
        if is_condition(name, study.text)
        and (name in (STORE, *study.axes) or any(name in trial.settings for trial in study.trials))
    ]
    title = "; ".join(dict.fromkeys(study.title for study in studies))
    joined = replace(studies[0], title=title, trials=tuple(trials), published=())
    return Grid(
        joined, {name: list(values.values()) for name, values in axes.items()}, tuple(dict.fromkeys(conditions))
    )


@dataclass(frozen=True)
class Marks:
    """The best cells, and what the test of the others is based on."""

    best: tuple[Place, ...] = ()
    """The best value; several where they are equal."""
    ties: tuple[Place, ...] = ()
    """Cells not significantly worse than the best."""
    above_dense: tuple[Place, ...] = ()
    """Cells that compute no less than the dense model, and are not ranked."""
    unit: str = ""
    """What the test counts: ``group`` or ``seed``."""
    tested: int = 0
    """The number of units; 0 without a test."""
    axes: tuple[str, ...] = ()
    """The axes whose combinations are the units."""
    within: tuple[str, ...] = ()
    """The axes averaged within each unit."""
    apart: tuple[str, ...] = ()
    """The rows' or columns' axis if its values do not compare, so that each has its own best."""


@dataclass(frozen=True)
class Cross:
    """One table: all trials, or those with one value of an axis."""

    question: Question
    only: tuple[str, Any] | None
    """The axis and value that all its trials have."""
    rows: list[Any]
    columns: list[Any]
    cells: dict[Place, dict[str, Any]]
    """Value, least, largest and effect (NaN without trials); trials, planned, not_shared, and missing trials."""
    settings: int
    """The settings of the other axes that each cell is averaged over."""
    left_out: int
    """Further settings, which some cells lack."""
    outside: int
    """Trials without a value of the rows' or the columns' axis."""
    trials: list[Trial]
    """Those averaged."""
    over: dict[str, list[Any]]
    """The values that cells are averaged over, by axis."""
    not_comparable: list[str]
    """What was measured differently in the references."""
    marks: Marks

    @property
    def reasons(self) -> list[str]:
        """Why trials are missing."""
        return [name for name in next(iter(self.cells.values())) if name in (FAILED, WAITING, NO_VALUE, NO_REFERENCE)]


def cross(grid: Grid, question: Question) -> list[Cross]:
    """A table for each value of the question's ``by``, then one over all trials.

    All cells of a table are averaged over the same settings of the other axes, those that every non-empty cell has.
    Raises :class:`SpecError` if two finished trials have the same settings.
    """
    frame = _effects(grid, question)
    values = [] if question.by is None else grid.axes[question.by]
    tables = [(question.by, value) for value in values] if question.by and len(values) > 1 else []
    return [_cross(grid, question, frame, only) for only in (*tables, None)]


def _has(trial: Trial, name: str, value: Any) -> bool:
    return name in trial.settings and key(trial.settings[name]) == key(value)


def _effects(grid: Grid, question: Question) -> pd.DataFrame:
    """One row for each trial: its cell, its other settings, its effect or why it has none, and its reference."""
    trials, metric = grid.study.trials, question.metric
    by_settings: dict[str, int] = {}
    for place, trial in enumerate(trials):
        known = by_settings.setdefault(key(trial.settings), place)
        if known != place and trials[known].result and trial.result:
            raise SpecError(
                f"trials {trials[known].number} and {trial.number} have the same settings ({trial.label}), so that "
                "cells cannot be matched; make their difference an axis of the study"
            )
    axes = (question.rows, question.columns)
    places = [{key(value): i for i, value in enumerate(grid.axes[name])} for name in axes]
    rows, columns = ([p.get(key(t.settings[n]), -1) if n in t.settings else -1 for t in trials]
                     for n, p in zip(axes, places, strict=True))  # fmt: skip
    others = [key({n: v for n, v in trial.settings.items() if n not in axes}) for trial in trials]
    frame = pd.DataFrame({"row": rows, "column": columns, "other": others})
    value, base = metric.pruned(grid.study.frame), metric.dense(grid.study.frame)
    if question.relative:
        matches = [by_settings.get(key({**trial.settings, **question.relative}), -1) for trial in trials]
        base = pd.Series([value.get(match, np.nan) for match in matches])
        frame["reference"] = matches
    frame["effect"] = np.log(value / base) if question.ratio else value - base
    done = pd.Series([trial.result is not None for trial in trials])
    failed = pd.Series([trial.status == "failed" for trial in trials])
    conditions = [~done & failed, ~done, value.isna(), base.isna()]
    frame["reason"] = np.select(conditions, [FAILED, WAITING, NO_VALUE, NO_REFERENCE], default="")
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


def _cross(grid: Grid, question: Question, frame: pd.DataFrame, only: tuple[str, Any] | None) -> Cross:
    trials, axes = grid.study.trials, (question.rows, question.columns)
    frame = frame[[only is None or _has(trial, *only) for trial in trials]]
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
    averaged = [trials[place] for place in used.index]
    others = [name for name in grid.axes if name not in axes and not (only and name == only[0])]
    over = {name: [v for v in grid.axes[name] if any(_has(trial, name, v) for trial in averaged)] for name in others}
    over = {name: values for name, values in over.items() if values}
    by_place: dict[Any, Any] = cells.to_dict("index")
    return Cross(
        question, only, grid.axes[question.rows], grid.axes[question.columns], by_place, len(shared),
        len(wide) - len(shared), len(frame) - len(inside), averaged, over, _not_comparable(question, trials, used),
        _mark(grid, question, shared, used, over),
    )  # fmt: skip


def _not_comparable(question: Question, trials: Sequence[Trial], used: pd.DataFrame) -> list[str]:
    """What the metric's protocol states differently in the references, each once."""
    found: dict[str, None] = {}
    for pair in zip(used.index.tolist(), used["reference"].tolist(), strict=True) if question.relative else ():
        one, other = (trials[place].metric(question.metric.label) for place in pair)
        found |= dict.fromkeys(not_comparable(one, other, question.metric.name) if one and other else ())
    return list(found)


def _mark(
    grid: Grid, question: Question, effects: pd.DataFrame, used: pd.DataFrame, over: Mapping[str, Sequence[Any]]
) -> Marks:
    """The best cells, and those that Student's 95% interval of the paired differences does not distinguish from them.

    The units of the test are groups of trials on the same model and texts; seeds and ratios within a group are averaged
    first. With one group only, they are its seeds. Ratios, models and texts do not compare: where they are rows or
    columns, each has its own best.
    """
    metric = question.metric
    if metric.better is None or effects.empty:
        return Marks()
    rows, columns = (effects.columns.get_level_values(level).tolist() for level in (0, 1))
    places: list[Place] = list(zip(rows, columns, strict=True))
    above = [place for place in places if not _saves(grid, used, place)]
    able = effects.drop(columns=above)
    apart = tuple(n for n in (question.rows, question.columns) if n in grid.conditions or axis_title(n) == "ratio")
    several = [name for name, values in over.items() if len(values) > 1]
    trials = zip(used["other"].tolist(), used.index.tolist(), strict=True)
    settings = {other: grid.study.trials[place].settings for other, place in trials}

    def units(names: Sequence[str]) -> pd.DataFrame:
        values = [key([settings[other].get(name) for name in names]) for other in able.index.tolist()]
        return able.groupby(values).mean()

    axes, unit = [name for name in several if name in grid.conditions], "group"
    groups = units(axes)
    if len(groups) < 2:
        axes, unit = [name for name in several if is_repetition(name)], "seed"
        groups = units(axes)
    tested = len(groups) if unit == "group" or len(groups) >= FEW_SEEDS else 0
    contests: dict[Place, list[Place]] = {}
    for row, column in (place for place in places if place not in above):
        contest = (row if question.rows in apart else -1, column if question.columns in apart else -1)
        contests.setdefault(contest, []).append((row, column))
    best: list[Place] = []
    ties: list[Place] = []
    for cells in contests.values():
        means = metric.sign * able[cells].mean()
        first = [place for place in cells if means[place] - means.min() <= ROUNDING]
        if len(first) == len(cells):
            continue
        best += first
        if tested:
            low, _ = mean_interval(metric.sign * groups[cells].sub(groups[first[0]], axis=0))
            ties += [place for place, end in zip(cells, low, strict=True) if place not in first and end <= ROUNDING]
    within = tuple(name for name in several if name not in axes)
    return Marks(tuple(best), tuple(ties), tuple(above), unit, tested, tuple(axes), within, apart)


def _saves(grid: Grid, used: pd.DataFrame, place: Place) -> bool:
    """Whether a cell computes less than the dense model: as measured, else as known of the strategies."""
    mine = used[(used["row"] == place[0]) & (used["column"] == place[1])].index
    flops = find(main_metrics(grid.study), "cost.flops_ratio")
    shares = flops.pruned(grid.study.frame)[mine].dropna() if flops else pd.Series(dtype=float)
    if len(shares):
        return bool(shares.mean() < 1)
    results = [grid.study.trials[i].result for i in mine.tolist()]
    return any(result.strategy not in ABOVE_DENSE for result in results if result)
