"""Trials that differ in nothing but their seeds, and what was measured on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from ..files.dotted import resolved_settings
from .columns import Column
from .findings import Findings, Trial, finite

NOTHING_SAVED = "no time saved"
"""How PRR's note begins where it has no value."""


@dataclass(frozen=True)
class Cell:
    """One value of one configuration: the mean over its seeds."""

    column: Column
    values: tuple[Any, ...]
    """As measured, one for each seed; None where a seed has none."""
    absent: str = "-"
    """What stands in place of a value where there is none."""
    planned: int = 0
    """For how many seeds a value was planned, where that is more than were finished."""

    @cached_property
    def numbers(self) -> list[float]:
        return [value for value in self.values if finite(value) is not None]

    @property
    def complete(self) -> bool:
        """Whether every planned seed has a value."""
        return len(self.numbers) == self.seeds

    @property
    def seeds(self) -> int:
        return max(self.planned, len(self.values))

    @property
    def mean(self) -> float | None:
        """As it is where all are the same: a mean of rounded sums may differ in the last digit."""
        return self.numbers[0] if len(set(self.numbers)) == 1 else fmean(self.numbers) if self.numbers else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds (with n - 1); None for fewer than two, or where all are the same."""
        return stdev(self.numbers) if len(set(self.numbers)) > 1 else None

    @property
    def text(self) -> str:
        """The mean, with the standard deviation where there is one."""
        if self.mean is None:
            return next((self.column.text(value) for value in self.values if value is not None), self.absent)
        text = self.column.text(self.mean) if self.sd is None else self.column.spread(self.mean, self.sd)
        return text if self.complete else f"{text} ({len(self.numbers)} of {self.seeds})"


@dataclass
class Configuration:
    """Trials that differ in nothing but their seeds."""

    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    """Those that are finished."""
    planned: int = 0
    """How many there are when all are finished, failed and waiting ones too."""
    reference: int = 0
    """Which dense measurement it is compared with."""

    @property
    def first(self) -> Trial:
        return self.trials[0]

    @property
    def strategy(self) -> str:
        return self.first.data["strategy"]

    @property
    def ratio(self) -> float | None:
        """The ratio asked for, else the share of units that was cut."""
        ratio = self.first.data["ratio"]
        return ratio["units_cut"] if ratio["asked"] is None else ratio["asked"]

    def cell(self, column: Column) -> Cell:
        """The value over the seeds, with how many were planned."""
        return Cell(column, tuple(map(column.value, self.trials)), self._absent(column), self.planned)

    def _absent(self, column: Column) -> str:
        notes = [note for trial in self.trials for note in (trial.outcome(column.label) or {}).get("notes") or ()]
        return NOTHING_SAVED if any(NOTHING_SAVED in note for note in notes) else "-"

    def mean(self, column: Column | None) -> float | None:
        return None if column is None else self.cell(column).mean

    def kept(self, kind: str) -> list[float | None]:
        """The share of units that each layer keeps, mean over the seeds; None where a layer has no such site."""
        layers = []
        for versions in zip(*(trial.data["layers"] for trial in self.trials), strict=False):
            shares = [layer[kind]["kept"] / layer[kind]["units"] for layer in versions if kind in layer]
            layers.append(fmean(shares) if shares else None)
        return layers


@dataclass
class Dense:
    """A model before pruning, as it was measured for some of the configurations."""

    settings: dict[str, Any]
    """What tells it from other dense measurements of the study."""
    trials: list[Trial]

    def cell(self, column: Column) -> Cell:
        """What was measured; of repeated measurements (times) the median."""
        values = [column.dense(trial) for trial in self.trials]
        numbers = [value for value in values if finite(value) is not None]
        return Cell(column, (median(numbers) if numbers else next((v for v in values if v is not None), None),))


def gathered(findings: Findings, names: Sequence[str], repeated: Sequence[str]) -> list[Configuration]:
    """The configurations of which anything is finished; they count what else was planned of them."""
    found: dict[str, Configuration] = {}
    homes: dict[str, Configuration] = {}
    for trial in findings.done:
        resolved = resolved_settings(trial.resolved) if len(trial.settings) < len(names) else {}
        known = {**{name: resolved[name] for name in names if name in resolved}, **trial.settings}
        settings = {name: known[name] for name in names if name in known and name not in repeated}
        home = found.setdefault(key(settings), Configuration(settings))
        home.trials.append(trial)
        # What is not finished has no resolved pipeline, only what the study's file says.
        homes[_planned_key(trial, repeated)] = home
    for trial in findings.trials:
        home = homes.get(_planned_key(trial, repeated)) or found.get(_planned_key(trial, repeated))
        if home:
            home.planned += 1
    return list(found.values())


def _planned_key(trial: Trial, repeated: Sequence[str]) -> str:
    return key({name: value for name, value in trial.settings.items() if name not in repeated})


def key(value: Any) -> str:
    """A text that is the same for the same settings."""
    return json.dumps(value, sort_keys=True, default=str)
