"""Says once what is wrong with many trials: which axis value, or pair of values, or the base, is to blame."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence

from ..files.reader import Mistake, Place
from .axes import Draft, Point
from .planned import spelt

Identity = tuple[str, str]

FREE_AXIS = (
    "; options that only some strategies have go on an axis of a free name, such as "
    "method: {a: {prune.use: pp, prune.selector.rows: 0.1}, b: {prune.use: flap}}"
)


def blamed(drafts: Sequence[Draft], found: Mapping[int, Sequence[Mistake]]) -> list[Mistake]:
    """The mistakes of all trials (by place in ``drafts``), each said once, at what causes it."""
    trials_of: dict[Mistake, list[int]] = {}
    for index, mistakes in found.items():
        for mistake in dict.fromkeys(mistakes):
            trials_of.setdefault(mistake, []).append(index)
    return [said for mistake, trials in trials_of.items() for said in _say(mistake, trials, drafts)]


def _say(mistake: Mistake, trials: list[int], drafts: Sequence[Draft]) -> list[Mistake]:
    wrong, said = set(trials), []
    everywhere = len(wrong) == len(drafts)
    left = set(wrong)
    for size in (1, 2):
        for points, having in _causes(mistake, wrong, drafts, size):
            # What is wrong in every trial is the base's, unless an axis sets that very field.
            if not having & left or (everywhere and not _related(points, mistake.place)):
                continue
            said.append(_mistake(points, mistake, having, drafts))
            left -= having
        if everywhere:
            break
    if everywhere and left:
        return [Mistake(("base", *mistake.place), mistake.message)]
    for index in sorted(left):
        said.append(_mistake(drafts[index].points, mistake, {index}, drafts))
    return said


def _causes(
    mistake: Mistake, wrong: set[int], drafts: Sequence[Draft], size: int
) -> list[tuple[tuple[Point, ...], set[int]]]:
    """Combinations of axis values that are wrong wherever they occur, the likeliest first."""
    having: dict[tuple[Identity, ...], set[int]] = {}
    points: dict[tuple[Identity, ...], tuple[Point, ...]] = {}
    for index, draft in enumerate(drafts):
        for combination in itertools.combinations(draft.points, size):
            key = tuple(point.identity for point in combination)
            having.setdefault(key, set()).add(index)
            points.setdefault(key, combination)
    causes = [(points[key], indices) for key, indices in having.items() if indices <= wrong]
    return sorted(causes, key=lambda cause: (not _related(cause[0], mistake.place), -len(cause[1])))


def _related(points: Sequence[Point], place: Place) -> bool:
    """Whether one of the points sets the field at ``place``, something in it, or what it is in."""
    where = tuple(map(str, place))
    fields = (tuple(field.split(".")) for point in points for field in point.fields)
    return any(field[: len(where)] == where[: len(field)] for field in fields)


def _mistake(points: Sequence[Point], mistake: Mistake, having: set[int], drafts: Sequence[Draft]) -> Mistake:
    first, *others = points
    where = ".".join(map(str, mistake.place))
    # A label stands in its place already, and many messages name the value that they found.
    named = not others and (first.labelled or _names(mistake.message, first.value))
    said = [] if named else [spelt(first.value)]
    if others:
        said.append("with " + " and ".join(f"{point.axis} {spelt(point.value)}" for point in others))
    values = f"{' '.join(said)}: " if said else ""
    about = f"{where}: " if first.labelled or where not in first.fields else ""
    hint = "; leave the combination out with exclude" if others else ""
    if any("prune.use" in point.fields for point in points) and where.startswith("prune") and where != "prune.use":
        hint = FREE_AXIS
    which = "all trials" if len(having) == len(drafts) else f"trial{'s' * (len(having) > 1)} {ranges(having)}"
    return Mistake(first.place, f"{values}{about}{mistake.message}{hint} ({which})")


def _names(message: str, value: object) -> bool:
    if not isinstance(value, str):
        return f"(found {value!r})" in message
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None


def ranges(indices: Collection[int]) -> str:
    """Places of trials as their numbers: 0, 1, 2, 6 -> 1-3, 7: trials count from one."""
    ordered = sorted(indices)
    runs: list[list[int]] = []
    for index in ordered:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a + 1) if a == b else f"{a + 1}-{b + 1}" for a, b in runs)
