"""Notes of trials told once: those that differ in nothing but measured numbers are one note."""

from __future__ import annotations

import re

from .aggregate import Table
from .configurations import NOTHING_SAVED

MOST_NAMED = 4
"""Most configurations that a note names; more are counted, with their trials."""

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"

MEASURED = re.compile(
    rf"\blayers? \d+(?:(?:, | to )\d+)*|(?<![\w.,])\d+%|(?<![\w.])({NUMBER})(?: to ({NUMBER}))?(?!\w|\.\d)"
)
"""Numbers and ranges, in groups. Layers and whole percentages (what was asked for) match without: they stay apart."""


def notes(table: Table) -> list[tuple[str, str]]:
    """Every note with the configurations that it is about, and of how many of their trials where not of all.

    Of notes that differ in measured numbers alone there is one, with the least and the largest of each number.
    """
    texts: dict[str, list[str]] = {}
    counts: dict[str, dict[int, int]] = {}
    for index, configuration in enumerate(table.configurations):
        for trial in configuration.trials:
            own = [_without_seconds(note) for note in trial.data.get("notes") or ()]
            for note in own:
                texts.setdefault(_wording(note), []).append(note)
            for wording in dict.fromkeys(map(_wording, own)):
                about = counts.setdefault(wording, {})
                about[index] = about.get(index, 0) + 1
    return [(_merged(same), _about(table, counts[wording])) for wording, same in texts.items()]


def _wording(note: str) -> str:
    """The note with a mark in place of each measured number or range."""
    return MEASURED.sub(lambda found: "\0" if found[1] else found[0], note)


def _merged(same: list[str]) -> str:
    """Notes of one wording as one, each number from its least to its largest."""
    rows = [[(found[1], found[2] or found[1]) for found in MEASURED.finditer(note) if found[1]] for note in same]
    said = []
    for ranges in zip(*rows, strict=True):
        least, largest = (pick((r[side] for r in ranges), key=_value) for side, pick in enumerate((min, max)))
        said.append(least if least == largest else f"{least} to {largest}")
    first, *others = _wording(same[0]).split("\0")
    return first + "".join(number + rest for number, rest in zip(said, others, strict=True))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _about(table: Table, counts: dict[int, int]) -> str:
    """Configurations by their index, with the number of trials."""
    those = [(table.configurations[index], count) for index, count in counts.items()]
    whole = all(count == len(c.trials) for c, count in those)
    if whole and len(those) == len(table.configurations) > 1:
        return "all configurations"
    if len(those) > MOST_NAMED:
        trials = f"{sum(count for _, count in those)} of {len(table.findings.done)} trials"
        return f"{len(those)} of {len(table.configurations)} configurations, {trials}"
    said = []
    for configuration, count in those:
        part = "" if count == len(configuration.trials) else f" ({count} of {len(configuration.trials)} trials)"
        said.append(table.name(configuration) + part)
    return "; ".join(said)


def _without_seconds(note: str) -> str:
    """A note that no time was saved without its seconds, which are each trial's own; others as they are."""
    place, found, _ = note.partition(NOTHING_SAVED)
    return f"{place}{found}, so there is no PRR" if found else note
