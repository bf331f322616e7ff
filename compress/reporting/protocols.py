"""Protocols told once: what a value depends on, gathered over the trials it is made of, and numbered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..output.formatting import number
from .findings import Trial, finite

MOST_VALUES = 4
"""Different values of one key that are listed; more are counted."""


BETWEEN = " / "
"""Stands between different values of one key."""


@dataclass(frozen=True)
class Protocol:
    """How one evaluator measured."""

    number: int
    label: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class Protocols:
    """Every different protocol of a report, numbered in the order in which it was first asked for."""

    def __init__(self) -> None:
        self._known: dict[str, Protocol] = {}

    def of(self, label: str, trials: Iterable[Trial]) -> Protocol | None:
        """The protocol of what an evaluator measured on these trials; None where it did not run.

        What differs from trial to trial, as a seed does, is listed.
        """
        outcomes = [outcome for trial in trials if (outcome := trial.outcome(label))]
        if not outcomes:
            return None
        facts = tuple(merged([outcome["protocol"] for outcome in outcomes]).items())
        notes = tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.get("notes") or ()))
        key = json.dumps([label, facts, notes])
        if key not in self._known:
            self._known[key] = Protocol(len(self._known) + 1, label, facts, notes)
        return self._known[key]

    @property
    def all(self) -> list[Protocol]:
        return list(self._known.values())

    @property
    def by_label(self) -> dict[str, dict[str, str]]:
        """Each evaluator's facts over everything that was asked for; what differs too often is counted."""
        found: dict[str, dict[str, dict[str, None]]] = {}
        for protocol in self.all:
            for name, value in protocol.facts:
                pieces = dict.fromkeys(value.split(BETWEEN))  # those of each trial, as :func:`merged` lists them
                found.setdefault(protocol.label, {}).setdefault(name, {}).update(pieces)
        return {
            label: {
                name: BETWEEN.join(values)
                if len(values) <= MOST_VALUES
                else f"{len(values)} values, one for each result"
                for name, values in facts.items()
            }
            for label, facts in found.items()
        }


def merged(protocols: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Each key's values as text, those that differ one after the other; keys that are null everywhere left out."""
    found: dict[str, dict[str, None]] = {}
    for protocol in protocols:
        for key, value in protocol.items():
            if value is not None:
                found.setdefault(key.replace("_", " "), {})[fact(value)] = None
    return {key: BETWEEN.join(values) for key, values in found.items()}


def fact(value: Any) -> str:
    """A protocol's or setting's value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {fact(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(map(fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and finite(value) is not None:
        return f"{value:g}" if abs(value) < 1e6 else number(value)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]  # a sha256: the results have it whole
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)
