"""What a study found, in sentences computed from its numbers, whoever wins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt

from ..report import TIE, number, share
from .aggregate import RATIO, USE, Configuration, Dense, Table
from .bootstrap import Interval, Windows, paired_interval, unpaired
from .columns import Column
from .findings import finite, setting_text

SAMPLES = 2000
"""Bootstrap samples behind a sentence."""


@dataclass(frozen=True)
class Compared:
    """The best configuration of a block and the next one."""

    best: Configuration
    second: Configuration | None
    tied: str
    """Why no order is allowed; empty where it is."""
    interval: Interval | None


def conclusion(table: Table) -> str:
    """One sentence: who is best at the highest ratio, by how much, and what it costs."""
    columns = table.quality
    if not columns:
        return f"{len(table.findings.done)} trials were measured, none of them for quality."
    column, groups = columns[0], _groups(table, columns[0])
    if not groups:
        return f"No trial has a finite {column.title}."
    if sum(map(len, groups)) == 1:
        return _single(table, column, groups[0][0])
    top = max(group[0].ratio or 0.0 for group in groups)
    groups = [group for group in groups if (group[0].ratio or 0.0) == top]
    if len(groups) > 2:
        groups = [_leading(column, groups)]
    clauses = [_clause(table, column, group) for group in groups]
    dense = _reference(table, groups[0][0]).cell(column)
    opening = f"At {share(top)} pruning, " if any(c.ratio for group in groups for c in group) else ""
    return f"{opening}{'; '.join(clauses)}; the dense model has {dense.text}."


def findings_in_detail(table: Table) -> list[str]:
    """A sentence for every block and every measure of quality."""
    said = []
    for column in table.quality:
        for group in _groups(table, column):
            if len(group) > 1:
                at = f"{share(group[0].ratio)}: " if group[0].ratio is not None else ""
                said.append(f"{at}{_clause(table, column, group)}.")
    return list(dict.fromkeys(said))


def bounds(table: Table) -> str | None:
    """What computes more than the dense model, and so is no contender."""
    beyond = [c for c in table.configurations if not table.saves(c)]
    if not beyond:
        return None
    # Named by what is compared alone, where it holds for all ratios and circumstances.
    others = [RATIO, *table.circumstances]
    saving = {table.name(c, others) for c in table.configurations if table.saves(c)}
    short = [table.name(c, others) for c in beyond]
    names = list(dict.fromkeys(table.name(c) if s in saving else s for c, s in zip(beyond, short, strict=True)))
    verb = "computes" if len(names) == 1 else "compute"
    return f"{_listed(names)} {verb} more than the dense model: a bound to compare with, no contender here."


def compare_best(column: Column, group: list[Configuration]) -> Compared:
    """The group's two best; tied where what repeats or resampling shows allows no order."""
    ordered = sorted(group, key=lambda c: c.mean(column), reverse=column.better == "higher")
    best, second = ordered[0], ordered[1] if len(ordered) > 1 else None
    if second is None:
        return Compared(best, None, "", None)
    interval, error = _interval(column, best, second), _standard_error(column, best, second)
    gap = abs(second.mean(column) - best.mean(column))
    sds = [cell.sd for cell in (best.cell(column), second.cell(column)) if cell.sd is not None]
    tied = ""
    if interval and not interval.certain:
        low, high = (100 * (ratio - 1) for ratio in (interval.ratio_low, interval.ratio_high))
        tied = f"the 95% interval of their difference, {low:+.1f}% to {high:+.1f}%, holds zero"
    elif sds and gap <= sqrt(sum(sd * sd for sd in sds)):
        tied = "they differ by less than seeds do"
    elif error is not None and gap <= 2 * error:
        tied = f"they differ by less than two standard errors ({column.text(2 * error)})"
    elif not sds and interval is None and error is None and gap <= TIE * abs(best.mean(column)):
        tied = f"they differ by less than {share(TIE)}"
    return Compared(best, second, tied, interval)


def _clause(table: Table, column: Column, group: list[Configuration]) -> str:
    shared = [name for name in table.axes if len({_text(name, c) for c in group}) == 1]
    found = compare_best(column, group)
    context = [name for name in shared if name not in (table.compared, RATIO)]
    where = ", ".join(_context(name, found.best) for name in context)
    prefix = f"with {where}, " if where else ""
    name = table.name(found.best, shared)
    value = found.best.cell(column).text
    if found.second is None:
        return f"{prefix}{name} has a {column.title} of {value}"
    other, its = table.name(found.second, shared), found.second.cell(column).text
    if found.tied:
        return f"{prefix}{name} ({value}) and {other} ({its}) tie for the best {column.title}: {found.tied}"
    gap = _gap(column, found)
    best = "lowest" if column.better == "lower" else "highest"
    worse = "below" if column.better == "lower" else "above"
    sure = ""
    if found.interval:
        low, high = sorted(100 * abs(1 - 1 / r) for r in (found.interval.ratio_low, found.interval.ratio_high))
        sure = f" (95% interval {low:.1f}% to {high:.1f}%)"
    return f"{prefix}{name} has the {best} {column.title} ({value}), {gap} {worse} the next, {other}{sure}"


def _single(table: Table, column: Column, one: Configuration) -> str:
    dense = _reference(table, one).cell(column)
    text = f"{setting_text(USE, one.strategy)} at {share(one.ratio)} moves {column.title} from {dense.text} "
    text += f"to {one.cell(column).text}"
    cost = [
        f"{one.cell(known).text} of dense's {what}"
        for key, what in (("cost.flops_ratio", "operations"), ("latency.prefill_ratio", "prefill time"))
        if (known := table.column(key)) and one.mean(known) is not None
    ]
    return f"{text} with {' and '.join(cost)}." if cost else f"{text}."


def _groups(table: Table, column: Column) -> list[list[Configuration]]:
    """Contenders that differ in strategy (or, where that is fixed, in anything) but in no other circumstance."""
    blocks = [[c for c in block if finite(c.mean(column)) is not None] for block in table.blocks()]
    able = [[c for c in block if table.saves(c)] for block in blocks]
    return [block for block in (able if any(able) else blocks) if block]


def _leading(column: Column, groups: list[list[Configuration]]) -> list[Configuration]:
    """The group that holds the best of all, of those in which anything competes."""
    several = [group for group in groups if len(group) > 1] or groups
    means = [[c.mean(column) for c in group] for group in several]
    scores = [min(values) if column.better == "lower" else -max(values) for values in means]
    return several[scores.index(min(scores))]


def _interval(column: Column, best: Configuration, second: Configuration) -> Interval | None:
    if column.name != "perplexity":
        return None
    outcomes = [[trial.outcome(column.label) for trial in c.trials] for c in (best, second)]
    first = outcomes[0][0]
    if any(outcome is None or unpaired(first, outcome) for side in outcomes for outcome in side):
        return None
    means = [Windows.mean([Windows.of(outcome) for outcome in side]) for side in outcomes]
    return paired_interval(*means, samples=SAMPLES)


def _standard_error(column: Column, best: Configuration, second: Configuration) -> float | None:
    """Of the difference of two mean accuracies, from the tasks' own standard errors, taken as independent."""
    if column.name != "mean" or column.style != "accuracy":
        return None
    squares, tasks = 0.0, 0
    for configuration in (best, second):
        values = configuration.first.outcome(column.label)["pruned"]
        errors = [finite(value) for name, value in values.items() if name.endswith("_stderr")]
        if not errors or None in errors:
            return None
        tasks = len(errors)
        squares += sum(error * error for error in errors)
    return sqrt(squares) / tasks


def _gap(column: Column, found: Compared) -> str:
    best, second = found.best.mean(column), found.second.mean(column)
    if column.style == "accuracy":
        return f"{100 * abs(best - second):.1f} points"
    return f"{100 * abs(1 - best / second):.2g}%" if second else number(abs(best - second))


def _reference(table: Table, configuration: Configuration) -> Dense:
    return table.dense[configuration.reference]


def _text(name: str, configuration: Configuration) -> str:
    return json.dumps(configuration.settings.get(name), sort_keys=True, default=str)


def _context(name: str, configuration: Configuration) -> str:
    return f"{name.rpartition('.')[2].replace('_', ' ')} {setting_text(name, configuration.settings.get(name))}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
