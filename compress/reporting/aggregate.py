"""Trials as configurations: seeds taken together, dense models apart, the best of every block marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from .columns import Column, find, main_columns
from .findings import Findings, Trial, finite, named_text, resolved_settings, setting_text

BOUNDS = ("full_batch_probing",)
"""Strategies that compute more than the dense model at any ratio, by what they are."""

MOST_BEST = 2
"""Configurations that may share a mark; more of the same value are no distinction."""

USE, RATIO = "prune.use", "prune.ratio"

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

    @cached_property
    def numbers(self) -> list[float]:
        return [value for value in self.values if finite(value) is not None]

    @property
    def complete(self) -> bool:
        """Whether every seed has a value."""
        return len(self.numbers) == len(self.values)

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
        return text if self.complete else f"{text} ({len(self.numbers)} of {len(self.values)})"


@dataclass
class Configuration:
    """Trials that differ in nothing but their seeds."""

    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
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
        return Cell(column, tuple(column.value(trial) for trial in self.trials), self._absent(column))

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


@dataclass
class Table:
    """Everything that a report's tables and plots are made from."""

    findings: Findings
    columns: list[Column]
    axes: list[str]
    """The settings that vary, seeds left out, in order."""
    configurations: list[Configuration]
    """Ordered by dense measurement and ratio, else as planned."""
    dense: list[Dense]
    repeated: list[str]
    """The axes that are repetitions."""

    def column(self, evaluator_value: str) -> Column | None:
        return find(self.columns, evaluator_value)

    @property
    def quality(self) -> list[Column]:
        return [column for column in self.columns if column.quality]

    @property
    def shown_axes(self) -> list[str]:
        """The axes that get a column: those that vary, or strategy and ratio where nothing does."""
        known = [name for name in (USE, RATIO) if any(name in c.settings for c in self.configurations)]
        return self.axes or known

    @property
    def compared(self) -> str | None:
        """The axis that says what is compared, where strategies are; its others are circumstances."""
        return next((name for name in (USE, "strategy") if name in self.axes), None)

    def name(self, configuration: Configuration, without: Sequence[str] = ()) -> str:
        """The configuration's varying settings in a row."""
        names = [name for name in self.shown_axes if name not in without]
        said = [named_text(name, configuration.settings[name]) for name in names if name in configuration.settings]
        return ", ".join(said) or setting_text(USE, configuration.strategy)

    def saves(self, configuration: Configuration) -> bool:
        """Whether it computes less than the dense model, as far as that was measured or is known."""
        flops = configuration.mean(self.column("cost.flops_ratio"))
        return configuration.strategy not in BOUNDS if flops is None else flops < 1

    @property
    def circumstances(self) -> list[str]:
        """The axes in which what compares must agree, besides the ratio: none where there are no strategies."""
        return [name for name in self.axes if name not in (self.compared, RATIO)] if self.compared else []

    def blocks(self) -> list[list[Configuration]]:
        """Configurations that compare: the same dense measurement, ratio and circumstances."""
        found: dict[Any, list[Configuration]] = {}
        for c in self.configurations:
            where = tuple(_key(c.settings.get(name)) for name in self.circumstances)
            found.setdefault((c.reference, c.ratio, where), []).append(c)
        return list(found.values())

    @cached_property
    def best(self) -> set[tuple[int, str]]:
        """``(id(configuration), column key)`` of the best values of every block, among those that save operations."""
        marked = set()
        for block in self.blocks():
            able = [configuration for configuration in block if self.saves(configuration)]
            for column in (column for column in self.columns if column.better):
                means = {id(c): c.mean(column) for c in able if c.mean(column) is not None and c.cell(column).complete}
                texts = {column.text(value) for value in means.values()}
                if len(texts) < 2:
                    continue
                best = (min if column.better == "lower" else max)(means.values())
                found = {(c, column.key) for c, v in means.items() if column.text(v) == column.text(best)}
                marked |= found if len(found) <= MOST_BEST else set()
        return marked


def tabulate(findings: Findings) -> Table:
    """Gather trials into configurations."""
    names = list(dict.fromkeys(name for trial in findings.trials for name in trial.settings))
    names = [*(name for name in findings.axes if name in names), *(name for name in names if name not in findings.axes)]
    repeated = [name for name in names if name.endswith("seed") and name not in (USE, RATIO)]
    found: dict[str, Configuration] = {}
    for trial in findings.done:
        resolved = resolved_settings(trial.resolved) if len(trial.settings) < len(names) else {}
        known = {**{name: resolved[name] for name in names if name in resolved}, **trial.settings}
        settings = {name: known[name] for name in names if name in known and name not in repeated}
        found.setdefault(_key(settings), Configuration(settings)).trials.append(trial)
    configurations = list(found.values())
    # Like an axis: where trials fail or wait, what was planned still says what varies.
    planned = {name: {_key(t.settings[name]) for t in findings.trials if name in t.settings} for name in names}
    axes = [
        name
        for name in names
        if name not in repeated
        and (len({_key(c.settings.get(name)) for c in configurations}) > 1 or len(planned[name]) > 1)
    ]
    columns = main_columns(findings)
    dense = _references(configurations, columns, axes)
    configurations.sort(key=lambda c: (c.reference, c.ratio or 0.0))
    seeds = [name for name in repeated if len(planned[name]) > 1]
    return Table(findings, columns, axes, configurations, dense, seeds)


def _references(configurations: list[Configuration], columns: list[Column], axes: list[str]) -> list[Dense]:
    """Tells dense measurements apart by model and by the protocol of the first measure of quality."""
    primary = next((column for column in columns if column.quality), None)
    groups: dict[str, list[Configuration]] = {}
    for configuration in configurations:
        outcome = configuration.first.outcome(primary.label) if primary else None
        protocol = outcome["protocol"] if outcome else None
        key = _key([configuration.first.data["model"].get("fingerprint"), protocol])
        groups.setdefault(key, []).append(configuration)
    found = []
    for index, members in enumerate(groups.values()):
        settings = {}
        for name in axes if len(groups) > 1 else ():
            values = {_key(member.settings.get(name)) for member in members}
            outside = {_key(c.settings.get(name)) for other in groups.values() if other is not members for c in other}
            if len(values) == 1 and not values & outside and name in members[0].settings:
                settings[name] = members[0].settings[name]
        for member in members:
            member.reference = index
        found.append(Dense(settings, [trial for member in members for trial in member.trials]))
    return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
