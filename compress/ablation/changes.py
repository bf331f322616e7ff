"""Explains how a study differs from the one that a results store was created for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.dotted import flatten
from ..output.folders import plain
from .published import StudyRecord
from .trials import StoredTrial, as_text

if TYPE_CHECKING:
    from .study import Study

MOST_LINES = 12


def explain(path: Path, before: StudyRecord, stored: Sequence[StoredTrial], study: Study) -> str:
    """One message: what changed, how much of the store still applies, and how to go on."""
    finished = {trial.key for trial in stored if trial.status != "waiting"}
    planned = {trial.key for trial in study.trials}
    changes = [*_axes(before.axes, study.axes), *_fields(stored, study)]
    if not changes:
        changes = ["other trials of the same axes, or another order of them"]
    if len(changes) > MOST_LINES:
        changes = [*changes[:MOST_LINES], f"and {len(changes) - MOST_LINES} more"]
    return "\n".join(
        [
            f"results store {path} was begun with another version of {study.file.name}:",
            *(f"  {change}" for change in changes),
            f"{len(finished & planned)} of its {len(finished)} finished trials still apply, "
            f"{len(planned - finished)} of {len(study.trials)} would run.",
            "Go on in it with --update (the others stay in it, unused), or begin another store with --out",
        ]
    )


def _axes(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> Iterator[str]:
    for name in before:
        if name not in after:
            yield f"axis {name}: gone"
    for name, values in after.items():
        new = list(map(as_text, plain(values)))
        if name not in before:
            yield f"axis {name}: new, with {', '.join(new)}"
            continue
        old = list(map(as_text, before[name]))
        differences = (("new", [v for v in new if v not in old]), ("gone", [v for v in old if v not in new]))
        changes = [f"{what} {', '.join(which)}" for what, which in differences if which]
        if changes or old != new:
            yield f"axis {name}: {'; '.join(changes) or 'another order'}"


def _fields(stored: Sequence[StoredTrial], study: Study) -> Iterator[str]:
    """Fields that differ in trials whose settings are the same."""
    old = {_settings(trial.settings): trial.pipeline for trial in stored}
    counts: dict[str, int] = {}
    for trial in study.trials:
        was = old.get(_settings(plain(trial.settings)))
        if was is None or was == trial.pipeline:
            continue
        before, after = flatten(was), flatten(trial.pipeline)
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                change = f"{name}: {_value(before, name)} -> {_value(after, name)}"
                counts[change] = counts.get(change, 0) + 1
    for change, count in counts.items():
        yield f"{change} (in {count} trial{'s' * (count > 1)})"


def _value(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "none"
    value = as_text(values[name])
    return f"content {value[7:19]}" if value.startswith("sha256 ") else value


def _settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, as_text(value)) for name, value in settings.items()))
