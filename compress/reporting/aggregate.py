"""Trials as configurations: seeds taken together, dense models apart, the best of every block marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .axis_kinds import COMPARED, RATIO, USE, is_method, is_protocol, is_repetition
from .columns import Column, find, main_columns
from .configurations import Configuration, Dense, gathered, key
from .findings import Findings, named_text, setting_text
from .references import references

BOUNDS = ("full_batch_probing",)
"""Strategies that compute more than the dense model at any ratio, by what they are."""

MOST_BEST = 2
"""Configurations that may share a mark; more of the same value are no distinction."""

PRUNING = ("prune.", "calibration.")
"""How the settings begin that no dense model has."""


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
        """The axis of strategies, where they vary."""
        return next((name for name in COMPARED if name in self.axes), None)

    @cached_property
    def methods(self) -> list[str]:
        """The axes that say how a model is pruned; their combinations compete."""
        return [name for name in self.axes if is_method(name, self.findings)]

    def name(self, configuration: Configuration, without: Sequence[str] = ()) -> str:
        """The configuration's varying settings in a row."""
        names = [name for name in self.shown_axes if name not in without]
        said = [named_text(name, configuration.settings[name]) for name in names if name in configuration.settings]
        return ", ".join(said) or setting_text(USE, configuration.strategy)

    def saves(self, configuration: Configuration) -> bool:
        """Whether it computes less than the dense model, as far as that was measured or is known."""
        flops = configuration.mean(self.column("cost.flops_ratio"))
        return configuration.strategy not in BOUNDS if flops is None else flops < 1

    @cached_property
    def circumstances(self) -> list[str]:
        """The axes in which what compares must agree, besides the ratio.

        Those that are no method; where there is no method, what is left competes, but for how it is measured.
        """
        if self.methods:
            return [name for name in self.axes if name not in (RATIO, *self.methods)]
        return [name for name in self.axes if is_protocol(name, self.findings)]

    def dense_name(self, reference: int) -> str:
        """``dense``, with what tells it from other dense measurements."""
        settings = self.dense[reference].settings
        return ", ".join(["dense", *(named_text(name, value) for name, value in settings.items())])

    def blocks(self) -> list[list[Configuration]]:
        """Configurations that compare: the same dense measurement, ratio and circumstances."""
        found: dict[Any, list[Configuration]] = {}
        for c in self.configurations:
            where = tuple(key(c.settings.get(name)) for name in self.circumstances)
            found.setdefault((c.reference, c.ratio, where), []).append(c)
        return list(found.values())

    @cached_property
    def best(self) -> set[tuple[int, str]]:
        """``(id(configuration), column key)`` of the best values of every block.

        Among those that save operations, and of which every planned seed has a value.
        """
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
    repeated = [name for name in names if is_repetition(name)]
    configurations = gathered(findings, names, repeated)
    # Like an axis: where trials fail or wait, what was planned still says what varies.
    planned = {name: {key(t.settings[name]) for t in findings.trials if name in t.settings} for name in names}
    axes = [
        name
        for name in names
        if name not in repeated
        and (len({key(c.settings.get(name)) for c in configurations}) > 1 or len(planned[name]) > 1)
    ]
    columns = main_columns(findings)
    for configuration in () if axes else configurations:  # nothing else would say what a row is
        asked = {} if configuration.ratio is None else {RATIO: configuration.ratio}
        configuration.settings = {USE: configuration.strategy, **asked, **configuration.settings}
    dense = _compare_with_dense(findings, configurations, axes)
    configurations.sort(key=lambda c: (c.reference, c.ratio or 0.0))
    seeds = [name for name in repeated if len(planned[name]) > 1]
    return Table(findings, columns, axes, configurations, dense, seeds)


def _compare_with_dense(
    findings: Findings, configurations: Sequence[Configuration], axes: Sequence[str]
) -> list[Dense]:
    """The dense measurements; tells every configuration which of them is its own."""
    groups = references([c.trials for c in configurations], [c.settings for c in configurations])
    members = [[configurations[index] for index in group.members] for group in groups]
    dense = []
    for index, group in enumerate(members):
        settings = {name: group[0].settings[name] for name in axes if _tells_apart(name, index, members)}
        # How it is pruned is none of a dense model's, unless nothing else tells two apart.
        own = {
            name: value
            for name, value in settings.items()
            if not is_method(name, findings) and not name.startswith(PRUNING)
        }
        for member in group:
            member.reference = index
        dense.append(Dense(own or settings, [trial for member in group for trial in member.trials]))
    return dense


def _tells_apart(name: str, index: int, groups: Sequence[Sequence[Configuration]]) -> bool:
    """Whether an axis has one value in a group that another group lacks: all groups one each, or this one alone."""
    values = [{key(member.settings.get(name)) for member in group} for group in groups]
    others = set().union(*(found for i, found in enumerate(values) if i != index))
    if len(groups) < 2 or len(values[index]) > 1 or name not in groups[index][0].settings:
        return False
    return not values[index] & others if any(len(found) > 1 for found in values) else bool(others - values[index])
