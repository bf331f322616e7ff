"""Mistakes of trials: those that only this machine can find, and which axis value causes a mistake of many trials."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Hashable, Mapping, Sequence

from ..files.reader import Mistake, Place
from ..output.formatting import ranges
from ..runs.preflight import checks, message_of, placed
from .grid import Draft, Point
from .trials import Planned, as_text

FREE_AXIS = (
    "; options that only some strategies have go on an axis of a free name, such as "
    "method: {a: {prune.use: pp, prune.selector.rows: 0.1}, b: {prune.use: flap}}"
)

Cause = tuple[tuple[Point, ...], set[int]]
"""Axis values, and the trials that have them, by their place."""


# Which axis value causes a mistake


def explain_mistakes(drafts: Sequence[Draft], found: Mapping[int, Sequence[Mistake]]) -> list[Mistake]:
    """The mistakes of all trials (by place in ``drafts``), each reported once, at what causes it."""
    trials_of: dict[Mistake, set[int]] = {}
    for index, mistakes in found.items():
        for mistake in mistakes:
            trials_of.setdefault(mistake, set()).add(index)
    return [each for mistake, trials in trials_of.items() for each in _explained(mistake, trials, drafts)]


def _explained(mistake: Mistake, wrong: set[int], drafts: Sequence[Draft]) -> list[Mistake]:
    """One mistake of the ``wrong`` trials: at a value, else at a pair of values, else at the base or each trial."""
    found = []
    everywhere = len(wrong) == len(drafts)
    unexplained = set(wrong)
    for size in (1,) if everywhere else (1, 2):
        for points, having in _causes(mistake, wrong, drafts, size):
            # What is wrong in every trial is the base's mistake, unless an axis sets that very field.
            if having & unexplained and not (everywhere and not _related(points, mistake.place)):
                found.append(_at(points, mistake, having, drafts))
                unexplained -= having
    if everywhere and unexplained:
        return [Mistake(("base", *mistake.place), mistake.message)]
    return found + [_at(drafts[index].points, mistake, {index}, drafts) for index in sorted(unexplained)]


def _causes(mistake: Mistake, wrong: set[int], drafts: Sequence[Draft], size: int) -> list[Cause]:
    """Combinations of axis values that are wrong wherever they occur, the likeliest first."""
    found: dict[tuple[tuple[str, str], ...], Cause] = {}
    for index, draft in enumerate(drafts):
        for points in itertools.combinations(draft.points, size):
            found.setdefault(tuple(point.identity for point in points), (points, set()))[1].add(index)
    causes = [(points, having) for points, having in found.values() if having <= wrong]
    return sorted(causes, key=lambda cause: (not _related(cause[0], mistake.place), -len(cause[1])))


def _related(points: Sequence[Point], place: Place) -> bool:
    """Whether one of the points sets the field at ``place``, something in it, or what it is in."""
    where = tuple(map(str, place))
    fields = (tuple(field.split(".")) for point in points for field in point.fields)
    return any(field[: len(where)] == where[: len(field)] for field in fields)


def _at(points: Sequence[Point], mistake: Mistake, having: set[int], drafts: Sequence[Draft]) -> Mistake:
    """The mistake at the first of the points, with the others and the trials named."""
    first, *others = points
    where = ".".join(map(str, mistake.place))
    # A label is in its place already, and many messages name the value that they found.
    named = not others and (first.labelled or _names(mistake.message, first.value))
    values = [] if named else [as_text(first.value)]
    if others:
        values.append("with " + " and ".join(f"{point.axis} {as_text(point.value)}" for point in others))
    before = f"{' '.join(values)}: " if values else ""
    about = f"{where}: " if first.labelled or where not in first.fields else ""
    hint = "; leave the combination out with exclude" if others else ""
    if any("prune.use" in point.fields for point in points) and where.startswith("prune") and where != "prune.use":
        hint = FREE_AXIS
    numbers = f"trial{'s' * (len(having) > 1)} {ranges(index + 1 for index in having)}"
    which = "all trials" if len(having) == len(drafts) else numbers
    return Mistake(first.place, f"{before}{about}{mistake.message}{hint} ({which})")


def _names(message: str, value: object) -> bool:
    if not isinstance(value, str):
        return f"(found {value!r})" in message
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None


# What only this machine can find


def preflight(trials: Sequence[Planned], due: Collection[str], here: bool) -> dict[int, list[Mistake]]:
    """Mistakes that :mod:`~prunekit.compress.runs.preflight` finds, by the place of the trial; nothing is loaded.

    Checked is what the ``due`` trials (by key) use, their models only if they run ``here``, on this machine; finished
    trials that have the same mistake are named with them.
    """
    needed = {what for trial in trials if trial.key in due for _, what, _ in checks(trial.spec, here)}
    messages: dict[Hashable, str | None] = {}
    found: dict[int, list[Mistake]] = {}
    for index, trial in enumerate(trials):
        for place, what, check in checks(trial.spec, here):
            if what not in needed:
                continue
            if what not in messages:
                messages[what] = message_of(check)
            message = messages[what]
            if message is not None:
                found.setdefault(index, []).append(placed(place, message))
    return found
