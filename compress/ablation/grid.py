"""The axes of a study, the points of their grid, and the names of the fields that can vary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from ...registry import Catalog, near
from ..files.reader import Place, kind_of, role_of, visible
from ..files.spec import PipelineSpec
from .trials import as_text

MOST_TRIALS = 10_000

NOT_VARIED = {
    "output": "says where results go, which changes no number",
    "plugins": "is the same for all trials; list every plugin file in base",
}

DEEPEST = 5
"""Levels of components within components whose options are fields."""

Report = Callable[[Place, str], None]
"""Reports a mistake: its place in the file, and the message."""


@dataclass(frozen=True)
class Point:
    """One value of an axis, the fields that it sets, and its place in the file."""

    axis: str
    value: Any
    fields: dict[str, Any]
    place: Place
    labelled: bool = False
    """Whether the value is a label, of an axis of a free name."""

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for two points of the same axis and value."""
        return self.axis, as_text(self.value)


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


# Fields


def field_names(catalog: Catalog) -> frozenset[str]:
    """Every dotted field of a pipeline file, options of all installed components included, without list places."""
    fields = (name for name in PipelineSpec.model_fields if name not in NOT_VARIED)
    return frozenset(found for name in fields for found in _below(PipelineSpec, name, name, catalog, DEEPEST))


def _below(cls: type[BaseModel], key: str, name: str, catalog: Catalog, depth: int) -> Iterator[str]:
    """The name of a field and of everything in it."""
    yield name
    inner = kind_of(cls.model_fields[key].annotation)[0]
    if inner is None or depth == 0:
        return
    role = role_of(inner)
    classes: list[type[BaseModel]] = [inner]
    if role is not None:
        yield f"{name}.{'use' if role == 'strategies' else 'name'}"
        classes = [entry.component for entry in catalog.of_role(role)]
    for found in classes:
        for option in visible(found):
            yield from _below(found, option, f"{name}.{option}", catalog, depth - 1)


def problem_with(field: object, known: frozenset[str]) -> str | None:
    """Why a field cannot be varied, with the nearest one that can; ``None`` if it can."""
    if not isinstance(field, str):
        return f"a field is a dotted name such as prune.ratio (found {field!r})"
    first = field.split(".")[0]
    if first in NOT_VARIED:
        return f"cannot be varied: {first} {NOT_VARIED[first]}"
    plain = ".".join(part for part in field.split(".") if not part.isdigit())  # evaluate.0.window -> evaluate.window
    return None if plain in known else f"there is no field {field!r}{_nearest(plain, known)}"


def _nearest(field: str, known: frozenset[str]) -> str:
    found = get_close_matches(field, sorted(known), n=1, cutoff=0.75)
    if not found:  # the last part may be right, or nearly, and the sections before it wrong
        last = field.rsplit(".", 1)[-1]
        ends: dict[str, str] = {}
        for name in sorted(known, key=lambda name: (name.count("."), name != f"prune.{last}", name)):
            ends.setdefault(name.rsplit(".", 1)[-1], name)
        found = [ends[end] for end in get_close_matches(last, list(ends), n=1)]
    if not found:
        return "; prunekit show NAME lists the options of a component"
    return f" (did you mean {found[0].replace('evaluate.', 'evaluate.0.', 1)!r}?)"


# Axes


def read_axes(vary: Mapping[Any, Any], known: frozenset[str], report: Report) -> Axes:
    """The axes by name; mistakes are reported, and what is wrong is left out."""
    axes: Axes = {}
    for name, values in vary.items():
        wrong = _problem_with_axis(name, values, known)
        if wrong:
            report(("vary", name), wrong)
        elif isinstance(values, Mapping):
            found = (_labelled(name, label, fields, known, report) for label, fields in values.items())
            axes[name] = [point for point in found if point is not None]
        else:
            axes[name] = _without_repeats(name, values, report)
    owners: dict[str, str] = {}
    for name, points in axes.items():
        for field in dict.fromkeys(field for point in points for field in point.fields):
            if owners.setdefault(field, name) != name:  # one would silently replace the other
                report(("vary", name), f"{field} is set by the axis {owners[field]} too; let one axis set it")
    return {name: points for name, points in axes.items() if points}


def _problem_with_axis(name: Any, values: Any, known: frozenset[str]) -> str | None:
    if isinstance(values, Mapping):
        if not isinstance(name, str):
            return f"an axis has a name (found {name!r})"
        return None if values else "has no labels; name some, or leave the axis out"
    wrong = problem_with(name, known)
    if wrong:
        free = "" if "." in str(name) else " An axis of a free name is a mapping, label: {field: value}"
        return wrong + free
    if not isinstance(values, (list, tuple)):
        return f"expected a list of values (found {values!r}); write [{as_text(values)}]"
    return None if values else "has no values, so the grid is empty; name some, or leave the axis out"


def _labelled(name: str, label: Any, fields: Any, known: frozenset[str], report: Report) -> Point | None:
    place = ("vary", name, label)
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        report(place, f"expected the fields that the label sets, such as {{prune.ratio: 0.2}} (found {fields!r})")
        return None
    wrong = {field: message for field in fields if (message := problem_with(field, known))}
    for field, message in wrong.items():
        report((*place, field), message)
    return Point(name, label, {field: value for field, value in fields.items() if field not in wrong}, place, True)


def _without_repeats(name: str, values: Sequence[Any], report: Report) -> list[Point]:
    kept: dict[tuple[str, str], Point] = {}
    for index, value in enumerate(values):
        point = Point(name, value, {name: value}, ("vary", name, index))
        if kept.setdefault(point.identity, point) is not point:
            report(point.place, f"{as_text(value)} is given twice; keep one")
    return list(kept.values())


# Trials


def grid(
    axes: Axes, exclude: Mapping[int, Mapping[Any, Any]], report: Report, ignored: Collection[str] = ()
) -> list[Draft]:
    """All points of the grid, in the order of the axes, without those that match an entry of ``exclude``.

    Mistakes at the ``ignored`` axes are not reported.
    """
    size = math.prod(len(points) for points in axes.values()) if axes else 0
    if size > MOST_TRIALS:
        report(("vary",), f"the grid has {size:,} trials, more than {MOST_TRIALS:,}; vary less, or list trials")
        return []
    drafts = [Draft(points, ("vary",)) for points in itertools.product(*axes.values())] if axes else []
    excluded = []
    for index, entry in exclude.items():
        place = ("exclude", index)
        if not entry:
            report(place, "would leave out the whole grid; name axis values")
        elif check_settings(entry, place, axes, report, ignored):
            excluded.append(entry)
    kept = [draft for draft in drafts if not any(matches(entry, draft.settings) for entry in excluded)]
    if drafts and not kept:
        report(("exclude",), "no trial of the grid is left")
    return kept


def listed(
    trials: Mapping[int, Mapping[Any, Any]],
    axes: Axes,
    known: frozenset[str],
    report: Report,
    broken: Collection[str] = (),
) -> list[Draft]:
    """The trials that are listed one by one; each key is a field, or an axis of a free name with one of its labels.

    Labels of ``broken`` axes are not reported.
    """
    free = [name for name, points in axes.items() if points[0].labelled]
    drafts = []
    for index, entry in trials.items():
        place: Place = ("trials", index)
        points = []
        for name, value in entry.items():
            here, wrong = (*place, name), problem_with(name, known)
            labels = {as_text(point.value): point for point in axes[name]} if name in free else {}
            if as_text(value) in labels:
                points.append(Point(name, value, labels[as_text(value)].fields, here, True))
            elif name in broken and wrong is not None:
                continue
            elif name in free:
                report(here, _no_value(name, value, axes))
            elif wrong is None:
                points.append(Point(name, value, {name: value}, here))
            else:
                report(here, f"{wrong}; axes of a free name are {', '.join(free)}" if free else wrong)
        if len(points) == len(entry):
            drafts.append(Draft(tuple(points), place))
    return drafts


def axes_of(drafts: Sequence[Draft]) -> Axes:
    """The axes of trials, listed ones included, with the values that occur."""
    found: dict[str, dict[tuple[str, str], Point]] = {}
    for point in (point for draft in drafts for point in draft.points):
        found.setdefault(point.axis, {}).setdefault(point.identity, point)
    return {name: list(points.values()) for name, points in found.items()}


def matches(where: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a trial has all values of ``where``."""
    return all(name in settings and as_text(settings[name]) == as_text(value) for name, value in where.items())


def check_settings(
    where: Mapping[Any, Any], place: Place, axes: Axes, report: Report, ignored: Collection[str] = ()
) -> bool:
    """Whether every name of ``where`` is an axis and every value one of its values; reports what is not.

    Nothing is reported about ``ignored`` axes, such as those that ``--set`` has changed.
    """
    good = True
    for name, value in where.items():
        if as_text(value) in {as_text(point.value) for point in axes.get(name, ())}:
            continue
        good = False
        if name in ignored:
            continue
        if name in axes:
            report((*place, name), _no_value(name, value, axes))
        else:
            known = ", ".join(axes) or "none"
            report((*place, name), f"no axis is called {name!r}{near(name, axes)}; there are {known}")
    return good


def _no_value(name: str, value: Any, axes: Axes) -> str:
    values = [as_text(point.value) for point in axes[name]]
    texts = [point.value for point in axes[name] if isinstance(point.value, str)]
    like = near(value, texts) if isinstance(value, str) else ""
    return f"{name} has no value {as_text(value)}{like}; there are {', '.join(values)}"
