"""The axes of a study and the points of their grid, as plain settings of fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...registry import near
from ..files.reader import Place
from .fields import problem_with
from .planned import spelt

MOST_TRIALS = 10_000

Complain = Callable[[Place, str], None]


@dataclass(frozen=True)
class Point:
    """One value of an axis: what it is called in settings, the fields it sets, and where the file says so."""

    axis: str
    value: Any
    fields: dict[str, Any]
    place: Place
    labelled: bool = False
    """Whether the value is a label, of an axis of a free name."""

    @property
    def identity(self) -> tuple[str, str]:
        """What two points of the same axis and value have in common."""
        return self.axis, spelt(self.value)


@dataclass(frozen=True)
class Draft:
    """A trial before it is validated: its points, in axis order."""

    points: tuple[Point, ...]
    place: Place

    @property
    def settings(self) -> dict[str, Any]:
        return {point.axis: point.value for point in self.points}

    @property
    def fields(self) -> dict[str, Any]:
        """Fields to set, sections before what is in them."""
        found = {field: value for point in self.points for field, value in point.fields.items()}
        return dict(sorted(found.items(), key=lambda item: item[0].count(".")))


Axes = dict[str, list[Point]]


def read_axes(vary: Mapping[Any, Any], known: frozenset[str], complain: Complain) -> Axes:
    """The axes by name; what is wrong with one is complained about, and it is left out."""
    axes: Axes = {}
    for name, values in vary.items():
        place = ("vary", name)
        wrong = _shape(name, values, known)
        if wrong:
            complain(place, wrong)
        elif isinstance(values, Mapping):
            points = [_labelled(name, label, fields, known, complain) for label, fields in values.items()]
            axes[name] = [point for point in points if point is not None]
        else:
            points = [Point(name, value, {name: value}, (*place, index)) for index, value in enumerate(values)]
            axes[name] = _without_repeats(points, complain)
    _check_overlap(axes, complain)
    return {name: points for name, points in axes.items() if points}


def _shape(name: Any, values: Any, known: frozenset[str]) -> str | None:
    if isinstance(values, Mapping):
        if not isinstance(name, str):
            return f"an axis has a name (found {name!r})"
        return None if values else "has no labels; name some, or leave the axis out"
    wrong = problem_with(name, known)
    if wrong:
        return (
            f"{wrong} An axis of a free name is a mapping, label: {{field: value}}" if "." not in str(name) else wrong
        )
    if not isinstance(values, (list, tuple)):
        return f"expected a list of values (found {values!r}); write [{spelt(values)}]"
    return None if values else "has no values, so the grid is empty; name some, or leave the axis out"


def _labelled(name: str, label: Any, fields: Any, known: frozenset[str], complain: Complain) -> Point | None:
    place = ("vary", name, label)
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        complain(place, f"expected the fields that the label sets, such as {{prune.ratio: 0.2}} (found {fields!r})")
        return None
    wrong = {field: problem_with(field, known) for field in fields}
    for field, message in wrong.items():
        if message:
            complain((*place, field), message)
    return Point(name, label, {field: value for field, value in fields.items() if not wrong[field]}, place, True)


def _without_repeats(points: list[Point], complain: Complain) -> list[Point]:
    kept: dict[tuple[str, str], Point] = {}
    for point in points:
        if point.identity in kept:
            complain(point.place, f"{spelt(point.value)} is given twice; keep one")
        kept.setdefault(point.identity, point)
    return list(kept.values())


def _check_overlap(axes: Axes, complain: Complain) -> None:
    """No field may be set by two axes: one would win silently."""
    owners: dict[str, str] = {}
    for name, points in axes.items():
        for field in dict.fromkeys(field for point in points for field in point.fields):
            owner = owners.setdefault(field, name)
            if owner != name:
                complain(("vary", name), f"{field} is set by the axis {owner} too; let one axis set it")


def grid(
    axes: Axes, exclude: Mapping[int, Mapping[Any, Any]], complain: Complain, changed: Collection[str] = ()
) -> list[Draft]:
    """All points of the grid, in the order of the axes, without those that match an entry of ``exclude``."""
    size = math.prod(len(points) for points in axes.values()) if axes else 0
    if size > MOST_TRIALS:
        complain(("vary",), f"the grid has {size:,} trials, more than {MOST_TRIALS:,}; vary less, or list trials")
        return []
    drafts = [Draft(points, ("vary",)) for points in itertools.product(*axes.values())] if axes else []
    left_out = []
    for index, entry in exclude.items():
        place = ("exclude", index)
        if not entry:
            complain(place, "would leave out the whole grid; name axis values")
        elif check_settings(entry, place, axes, complain, changed):
            left_out.append(entry)
    kept = [draft for draft in drafts if not any(matches(entry, draft.settings) for entry in left_out)]
    if drafts and not kept:
        complain(("exclude",), "no trial of the grid is left")
    return kept


def listed(
    trials: Mapping[int, Mapping[Any, Any]],
    axes: Axes,
    known: frozenset[str],
    complain: Complain,
    broken: Collection[str] = (),
) -> list[Draft]:
    """The trials that are listed one by one; each key is a field, or an axis of a free name with one of its labels.

    Labels of ``broken`` axes are not complained about.
    """
    free = [name for name, points in axes.items() if points[0].labelled]
    drafts = []
    for index, entry in trials.items():
        place: Place = ("trials", index)
        points = []
        for name, value in entry.items():
            here = (*place, name)
            labels = {spelt(point.value): point for point in axes[name]} if name in free else {}
            if name in free and spelt(value) in labels:
                points.append(Point(name, value, labels[spelt(value)].fields, here, True))
            elif name in broken and problem_with(name, known) is not None:
                continue
            elif name in free:
                complain(here, _no_value(name, value, axes))
            elif problem_with(name, known) is None:
                points.append(Point(name, value, {name: value}, here))
            else:
                others = f"; axes of a free name are {', '.join(free)}" if free else ""
                complain(here, f"{problem_with(name, known)}{others}")
        if len(points) == len(entry):
            drafts.append(Draft(tuple(points), place))
    return drafts


def matches(where: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a trial has all values that ``where`` gives."""
    return all(name in settings and spelt(settings[name]) == spelt(value) for name, value in where.items())


def axes_of(drafts: Sequence[Draft]) -> Axes:
    """The axes of trials, listed ones included, with the values that occur."""
    found: dict[str, dict[tuple[str, str], Point]] = {}
    for point in (point for draft in drafts for point in draft.points):
        found.setdefault(point.axis, {}).setdefault(point.identity, point)
    return {name: list(points.values()) for name, points in found.items()}


def check_settings(
    where: Mapping[Any, Any], place: Place, axes: Axes, complain: Complain, changed: Collection[str] = ()
) -> bool:
    """Whether every name of ``where`` is an axis and every value one of its values; complains if not.

    Nothing is said about axes that ``--set`` has ``changed``: the file was right about its own.
    """
    good = True
    for name, value in where.items():
        if spelt(value) in {spelt(point.value) for point in axes.get(name, ())}:
            continue
        good = False
        if name in changed:
            continue
        if name in axes:
            complain((*place, name), _no_value(name, value, axes))
        else:
            known = ", ".join(axes) or "none"
            complain((*place, name), f"no axis is called {name!r}{near(name, axes)}; there are {known}")
    return good


def _no_value(name: str, value: Any, axes: Axes) -> str:
    values = [spelt(point.value) for point in axes[name]]
    texts = [point.value for point in axes[name] if isinstance(point.value, str)]
    like = near(value, texts) if isinstance(value, str) else ""
    return f"{name} has no value {spelt(value)}{like}; there are {', '.join(values)}"
