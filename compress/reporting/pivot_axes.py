"""What a cross table is asked about: axes, metric and reference by name, in one study or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ...registry import SpecError, near
from ..files.dotted import resolved_settings
from .axis_kinds import is_circumstance
from .columns import Column, all_columns, evaluators_of, find, main_columns
from .configurations import key
from .findings import Findings, Trial, axis_title, finite, setting_text

STORE = "store"
"""The axis that tells several stores apart."""

DENSE = "dense"
"""What ``--relative`` calls the dense model of the same trial."""

SCORES = ("zero_shot", "similarity", "overlap")
"""Evaluators of shares between 0 and 1, of which differences mean something; ``loss`` is another such value."""


@dataclass(frozen=True)
class Metric:
    """A value, and how trials of it are compared."""

    column: Column
    ratio: bool
    """Whether by ratios, averaged geometrically; else by differences, averaged arithmetically."""


@dataclass(frozen=True)
class Grid:
    """The trials of all stores with every setting that is known of them."""

    findings: Findings
    axes: dict[str, list[Any]]
    """Name -> values, in the order of the studies."""
    circumstances: tuple[str, ...]
    """Axes that say on what is measured (model, texts): their combinations are what evidence is counted in."""

    def axis(self, asked: str, option: str) -> str:
        """The axis of that name, or of that title in reports (``ratio``); raises :class:`SpecError` for none."""
        titled = [name for name in self.axes if axis_title(name) == asked]
        if asked in self.axes or len(titled) == 1:
            return asked if asked in self.axes else titled[0]
        known = [*self.axes, *map(axis_title, self.axes)]
        raise SpecError(
            f"{option}: there is no axis {asked!r}{near(asked, known)}; the axes are {', '.join(self.axes) or 'none'}"
        )

    def value(self, axis: str, asked: str, option: str) -> Any:
        """The axis's value that is written so in a file or in a report; raises :class:`SpecError` for none."""
        try:
            read = key(yaml.safe_load(asked))
        except yaml.YAMLError:
            read = ""
        for value in self.axes[axis]:
            if value == asked or key(value) == read or setting_text(axis, value) == asked:
                return value
        known = [setting_text(axis, value) for value in self.axes[axis]]
        raise SpecError(f"{option}: {axis} has no value {asked!r}{near(asked, known)}; it has {', '.join(known)}")

    def relative(self, asked: str) -> dict[str, Any]:
        """Settings of the reference, ``AXIS=VALUE[,AXIS=VALUE]``; none for ``dense``.

        Raises :class:`SpecError` for what is no axis, value or trial.
        """
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
        those = [t for t in self.findings.trials if all(same(t.settings, name, v) for name, v in found.items())]
        if not any(trial.status == "done" for trial in those):
            why = f"{len(those)} planned, none is finished" if those else "no such combination was planned"
            raise SpecError(f"{option}: no trial has {asked} ({why}); name a reference that was measured, or {DENSE}")
        return found

    def metric(self, asked: str | None, relative: Mapping[str, Any]) -> Metric:
        """The value called ``LABEL.VALUE``, the first of quality where nothing is asked for.

        Raises :class:`SpecError` for one that nothing measured, and for one that has no dense value to be relative to.
        """
        main = main_columns(self.findings)
        columns = [*main, *all_columns(self.findings)]
        column = find(columns, asked) if asked else next((c for c in main if c.quality), columns[0])
        if column is None:
            known = list(dict.fromkeys(c.key for c in columns))
            raise SpecError(f"--metric: nothing measured {asked!r}{near(asked, known)}; there are {', '.join(known)}")
        evaluator = evaluators_of(self.findings)[column.label]
        column = replace(column, relative=False)  # it is divided by the dense value, or by another trial's, here
        if evaluator == "zero_shot" and not column.name.endswith("_stderr"):
            column = replace(column, better="higher", style="accuracy")
        done = self.findings.done
        values = [finite(column.value(trial)) for trial in done]
        bases = [] if relative else [finite(column.dense(trial)) for trial in done]
        if all(value is None for value in values):
            raise SpecError(f"--metric: {column.key} is no number in any finished trial; choose another")
        if bases and all(base is None for base in bases):
            raise SpecError(
                f"--metric: {column.key} has no value for the dense model; name a reference with --relative AXIS=VALUE"
            )
        positive = all(value > 0 for value in (*values, *bases) if value is not None)
        return Metric(column, positive and evaluator not in SCORES and column.name != "loss")


def same(settings: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a trial has the setting."""
    return name in settings and key(settings[name]) == key(value)


def joined(studies: Sequence[Findings]) -> Grid:
    """All trials of one study or several, each with the settings that its study did not vary but another did.

    Several get an axis ``store``, with the names of their files; raises :class:`SpecError` where those are not
    different, or where a study has an axis of that name.
    """
    names = [study.source.name if study.source.is_dir() else study.source.stem for study in studies]
    if len(set(names)) < len(names):
        raise SpecError(f"stores are told apart by their files' names, which must differ: {', '.join(names)}")
    several = len(studies) > 1
    axes: dict[str, dict[str, Any]] = {STORE: {key(name): name for name in names}} if several else {}
    for study in studies:
        for name, values in study.axes.items():
            if several and name == STORE:
                raise SpecError(f"{study.source} has an axis {STORE!r} of its own; cross it alone, or rename the axis")
            axes.setdefault(name, {}).update({key(value): value for value in values})
        for trial in study.trials:
            for name, value in trial.settings.items():
                axes.setdefault(name, {}).setdefault(key(value), value)
    trials = []
    for study, name in zip(studies, names, strict=True):
        own = {STORE: name} if several else {}
        trials += [replace(trial, settings={**own, **_known(trial, axes)}) for trial in study.trials]
    for trial in trials:
        for name, value in trial.settings.items():
            axes[name].setdefault(key(value), value)
    title = "; ".join(dict.fromkeys(study.title for study in studies))
    findings = replace(studies[0], title=title, trials=tuple(trials), published=())
    return Grid(
        findings,
        {name: list(values.values()) for name, values in axes.items()},
        tuple(name for name in axes if any(_circumstance(name, study) for study in studies)),
    )


def _known(trial: Trial, axes: Mapping[str, Any]) -> dict[str, Any]:
    """The trial's settings, those that its study did not vary from its resolved pipeline, in the order of the axes."""
    lacking = any(name not in trial.settings and name != STORE for name in axes)
    known = {**(resolved_settings(trial.resolved) if lacking else {}), **trial.settings}
    return {name: known[name] for name in axes if name in known}


def _circumstance(name: str, study: Findings) -> bool:
    """Whether an axis that the study knows says on what is measured."""
    known = {STORE, *study.axes, *(setting for trial in study.trials for setting in trial.settings)}
    return name in known and is_circumstance(name, study)
