"""What a study found, in sentences computed from its numbers, whoever wins."""

from __future__ import annotations

from collections.abc import Sequence

from ..output.formatting import number, share
from .aggregate import RATIO, USE, Table
from .baseline import baseline
from .columns import Column
from .configurations import Cell, Configuration, key
from .contest import Compared, Contest, compare_best, contests, leading, ordered
from .findings import finite, setting_text

SHOWN = 4
"""Most configurations that a sentence names as tied; the others are counted."""

SAME_SIZE = 0.01
"""Shares of kept parameters closer than this are called the same size."""


def conclusion(table: Table) -> str:
    """One sentence: who is best at the highest ratio, by how much, and what it costs."""
    columns = table.quality
    if not columns:
        return f"{len(table.findings.done)} trials were measured, none of them for quality."
    column, found = columns[0], contests(table, columns[0])
    if not found:
        return f"No trial has a finite {column.title}."
    if sum(len(one.contenders) for one in found) == 1:
        return _single(table, column, found[0])
    top = max(_ratio(one) for one in found)
    found = [one for one in found if _ratio(one) == top]
    if len(found) > 2:
        found = [leading(column, found)]
    dense = [_dense(table, one.contenders[0], column) for one in found]
    differ = len(set(dense)) > 1
    clauses = [
        _clause(table, column, one) + (f", where the dense model has {its}" if differ else "")
        for one, its in zip(found, dense, strict=True)
    ]
    opening = f"At {share(top)} pruning, " if any(c.ratio for one in found for c in one.contenders) else ""
    return f"{opening}{'; '.join(clauses)}" + ("." if differ else f"; the dense model has {dense[0]}.")


def findings_in_detail(table: Table) -> list[str]:
    """A sentence for every contest and every measure of quality."""
    said = []
    for column in table.quality:
        for one in contests(table, column):
            if len(one.contenders) > 1 or one.left_out or one.unmeasured:
                ratio = one.contenders[0].ratio
                at = f"{share(ratio)}: " if ratio is not None else ""
                said.append(f"{at}{_clause(table, column, one)}{_sizes(table, column, one)}.")
    return list(dict.fromkeys(said))


def bounds(table: Table) -> str | None:
    """What computes more than the dense model, and so is no contender."""
    beyond = [c for c in table.configurations if not table.saves(c)]
    if not beyond:
        return None
    # Named by the strategy alone where that holds for all of it, or by the method for all ratios and circumstances.
    shorter = [[name for name in table.axes if name != table.compared]] if table.compared else []
    shorter.append([RATIO, *table.circumstances])
    names = list(dict.fromkeys(_shortest(table, c, shorter) for c in beyond))
    verb = "computes" if len(names) == 1 else "compute"
    return f"{_listed(names)} {verb} more than the dense model: a bound to compare with, no contender here."


def _shortest(table: Table, configuration: Configuration, without: Sequence[Sequence[str]]) -> str:
    """The configuration's name without the first axes that leave one that nothing bears which saves."""
    for axes in without:
        name = table.name(configuration, axes)
        if name not in {table.name(c, axes) for c in table.configurations if table.saves(c)}:
            return name
    return table.name(configuration)


def _clause(table: Table, column: Column, one: Contest) -> str:
    shared, where = _shared(table, one)
    prefix = f"with {where}, " if where else ""
    said = _order(table, column, one, shared) if one.complete else _no_order(table, column, one, shared)
    return prefix + said + _left_out(table, column, one, shared)


def _order(table: Table, column: Column, one: Contest, shared: list[str]) -> str:
    """Who is best, or who ties for it."""
    found = compare_best(column, one.contenders)
    name, value = table.name(found.best, shared), found.best.cell(column).text
    if found.second is None:
        return f"{name} has a {column.title} of {value}"
    if found.ties:
        tied = [found.best, *(tie.configuration for tie in found.ties)]
        names = [f"{table.name(c, shared)} ({c.cell(column).text})" for c in tied]
        text = f"{_several(names)} tie for the best {column.title}: {found.tied}"
        return text + _reference(table, column, one, found, shared)
    best = "lowest" if column.better == "lower" else "highest"
    worse = "below" if column.better == "lower" else "above"
    intervals = ", ".join(f"{sure.text} over {sure.source}" for sure in found.evidence)
    sure = "; ".join(filter(None, [f"95% interval {intervals}" if intervals else "", found.caution]))
    gap, other = _gap(column, found.best, found.second), table.name(found.second, shared)
    text = f"{name} has the {best} {column.title} ({value}), {gap} {worse} the next, {other}"
    return (f"{text} ({sure})" if sure else text) + _reference(table, column, one, found, shared)


def _reference(table: Table, column: Column, one: Contest, found: Compared, shared: list[str]) -> str:
    """How far the best is from what does not compensate, where compensation is compared and that is not yet named."""
    other = baseline(column, one.contenders)
    ties = [tie.configuration for tie in found.ties]
    named = [found.best, *(ties[: SHOWN - 1] or [found.second])]
    if other is None or any(other is one for one in named):
        return ""
    name = f"{table.name(other, shared)} ({other.cell(column).text}), which does not compensate"
    if any(other is tie for tie in ties):
        return f"; one of them is {name}"
    worse = "below" if column.better == "lower" else "above"
    return f"; the {'first' if ties else 'best'} is {_gap(column, found.best, other)} {worse} {name}"


def _no_order(table: Table, column: Column, one: Contest, shared: list[str]) -> str:
    cells = [(table.name(c, shared), c.cell(column)) for c in ordered(column, one.contenders)]
    names = [f"{name} ({column.text(cell.mean)} from {_seeds(column, cell)})" for name, cell in cells]
    return f"nothing has a {column.title} for all its seeds, so none is called best: {_several(names)}"


def _left_out(table: Table, column: Column, one: Contest, shared: list[str]) -> str:
    """Who is no contender for want of values, and that."""
    said = ""
    lacking = [(table.name(c, shared), _seeds(column, c.cell(column))) for c in one.left_out]
    if len(lacking) == 1:
        said += f"; {' has '.join(lacking[0])} and is left out"
    elif lacking:
        said += f"; {_several([f'{name} ({what})' for name, what in lacking])} are left out"
    if one.unmeasured:
        said += f"; {_several(one.unmeasured)} {'is' if len(one.unmeasured) == 1 else 'are'} not measured"
    return said


def _seeds(column: Column, cell: Cell) -> str:
    """How many of its seeds have a value."""
    return f"{len(cell.numbers)} of {cell.seeds} seeds" if cell.numbers else f"no finite {column.title}"


def _sizes(table: Table, column: Column, one: Contest) -> str:
    """How many parameters the named ones keep, where that differs: a ratio asked is not what each one cuts."""
    known = table.column("cost.parameters_ratio")
    if not known or not one.complete or len(one.contenders) < 2:
        return ""
    found = compare_best(column, one.contenders)
    named = [found.best, *([tie.configuration for tie in found.ties][: SHOWN - 1] or [found.second])]
    kept = [c.mean(known) for c in named]
    if any(finite(value) is None for value in kept) or max(kept) - min(kept) <= SAME_SIZE:
        return ""
    shared, _ = _shared(table, one)
    first, *others = (f"{table.name(c, shared)}{{}} {100 * v:.1f}%" for c, v in zip(named, kept, strict=True))
    rest = ", ".join(text.format("") for text in others)
    return f"; {first.format(' keeps')} of the parameters, {rest}"


def _single(table: Table, column: Column, one: Contest) -> str:
    only = one.contenders[0]
    text = f"{setting_text(USE, only.strategy)} at {share(only.ratio)} moves {column.title} from "
    text += f"{_dense(table, only, column)} to {only.cell(column).text}"
    cost = [
        f"{only.cell(known).text} of dense's {what}"
        for name, what in (("cost.flops_ratio", "operations"), ("latency.prefill_ratio", "prefill time"))
        if (known := table.column(name)) and only.mean(known) is not None
    ]
    text += f" with {' and '.join(cost)}" if cost else ""
    return f"{text}{_left_out(table, column, one, _shared(table, one)[0])}."


def _shared(table: Table, one: Contest) -> tuple[list[str], str]:
    """The axes in which all agree, and those that are circumstances in words."""
    every = [*one.contenders, *one.left_out]
    shared = [name for name in table.axes if len({key(c.settings.get(name)) for c in every}) == 1]
    if one.unmeasured:
        shared = [name for name in shared if name not in table.methods]
    context = [name for name in shared if name not in (table.compared, RATIO)]
    return shared, ", ".join(_context(name, every[0]) for name in context)


def _gap(column: Column, first: Configuration, other: Configuration) -> str:
    best, second = first.mean(column), other.mean(column)
    if column.style == "accuracy":
        return f"{100 * abs(best - second):.1f} points"
    return f"{100 * abs(1 - best / second):.2g}%" if second else number(abs(best - second))


def _ratio(one: Contest) -> float:
    return one.contenders[0].ratio or 0.0


def _dense(table: Table, configuration: Configuration, column: Column) -> str:
    return table.dense[configuration.reference].cell(column).text


def _context(name: str, configuration: Configuration) -> str:
    return f"{name.rpartition('.')[2].replace('_', ' ')} {setting_text(name, configuration.settings.get(name))}"


def _several(names: list[str]) -> str:
    """All of a few names, else the first ones and how many there are more."""
    more = len(names) - SHOWN
    return _listed(names if more <= 0 else [*names[:SHOWN], f"{more} other{'' if more == 1 else 's'}"])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
