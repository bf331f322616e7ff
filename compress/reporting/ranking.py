"""Ranks the configurations that compete, with the intervals of their differences from the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..output.formatting import share
from .axes import RATIO, USE, called, equation, key, named_text
from .metrics import COSTS, Metric, costs, unequal
from .statistics import INCLUDES_ZERO, Difference, difference
from .summary import ABOVE_DENSE, Configuration, Summary

MOST_RIVALS = 2
"""Maximum number of rivals whose unequal costs a sentence lists; of more it states the range."""

MOST_NAMED = 4
"""Maximum number of configurations that a sentence names; the others are counted."""

EXPLANATION = (
    "Each configuration is compared with the best one of the same ratio and conditions, by the windows, seeds or "
    "questions that both share. The 95% intervals are not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Ranked:
    """One configuration in a ranking."""

    configuration: Configuration
    conclusion: str
    difference: Difference | None = None
    """From the best; None for the best, and for what is not ranked."""


@dataclass(frozen=True)
class Block:
    """The ranking of the configurations that compete, by one metric."""

    metric: Metric
    ranked: list[Ranked]
    """Those with a value for every planned seed, the best first; where there are none, all with a value."""
    unranked: list[Ranked]
    unmeasured: list[str]
    """Methods of which no trial is finished."""
    complete: bool

    @property
    def best(self) -> Configuration:
        return self.ranked[0].configuration

    @property
    def ties(self) -> list[Configuration]:
        """Everything not significantly worse than the best."""
        return [row.configuration for row in self.ranked if row.difference and row.difference.doubt]


@lru_cache(maxsize=64)
def rankings(summary: Summary, metric: Metric) -> list[Block]:
    """A ranking of every block that has values."""
    saving = any(summary.saves(c) for c in summary.configurations if summary.mean(c, metric) is not None)
    found = []
    for block in summary.blocks():
        able = [c for c in block if summary.saves(c)] if saving else block
        whole = [c for c in able if summary.cell(c, metric).complete]
        valued = [c for c in able if summary.mean(c, metric) is not None]
        ranked = sorted(whole or valued, key=lambda c: metric.sign * (summary.mean(c, metric) or 0.0))
        if not ranked:
            continue
        rows = [_compared(summary, metric, ranked[0], c) for c in ranked]
        if not whole:
            rows = [Ranked(c, "incomplete, none is called best") for c in ranked]
        left = [Ranked(c, f"{_seeds(summary, metric, c)}, not ranked") for c in able if c not in ranked]
        left += [Ranked(c, "not cheaper than dense, not ranked") for c in block if c not in able]
        found.append(Block(metric, rows, left, _unmeasured(summary, block), bool(whole)))
    return found


def _compared(summary: Summary, metric: Metric, best: Configuration, other: Configuration) -> Ranked:
    if other is best:
        return Ranked(best, "best")
    found = difference(metric, summary.sample(best, metric), summary.sample(other, metric))
    why = found.caution or found.doubt.removeprefix(INCLUDES_ZERO)  # the table shows the interval
    text = f"{'not ' if found.doubt else ''}significantly worse{f': {why}' if why else ''}"
    return Ranked(other, f"{text}; at unequal cost" if unequal_costs(summary, best, [other]) else text, found)


def unequal_costs(summary: Summary, best: Configuration, others: Sequence[Configuration]) -> list[Metric]:
    """The shares of cost in which any of the others differs from the best by more than :data:`UNEQUAL`."""
    shares = [metric for metric in costs(summary.metric).values() if metric.exact]
    return [m for m in shares if any(unequal(summary.mean(best, m), summary.mean(c, m)) for c in others)]


@lru_cache(maxsize=16)
def marked(summary: Summary) -> frozenset[tuple[int, str]]:
    """Number of the configuration and key of the metric: the best of every block, and all that tie with it.

    Nothing is marked where everything ties. Times are not marked: they vary from run to run.
    """
    metrics = [metric for metric in summary.metrics if metric.better and not metric.timed]
    blocks = [block for metric in metrics for block in rankings(summary, metric)]
    return frozenset(
        (c.number, block.metric.key)
        for block in blocks if block.complete and len(block.ties) < len(block.ranked) - 1
        for c in (block.best, *block.ties)
    )  # fmt: skip


def ranking_table(summary: Summary, metric: Metric) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the rankings of all blocks in which anything competes."""
    paid = list(costs(summary.metric).values())
    where = [name for name in summary.shown_axes if name == RATIO or name in summary.conditions]
    own = [name for name in summary.shown_axes if name not in where]
    head = ["at", "configuration", metric.title, "behind the best", "95% interval", "conclusion"]
    head += [cost.title for cost in paid]
    rows = []
    for block in rankings(summary, metric):
        if len(block.ranked) + len(block.unranked) + len(block.unmeasured) < 2:
            continue
        known = block.best.settings
        here = ", ".join(named_text(n, known[n]) if n == RATIO else equation(n, known[n]) for n in where if n in known)
        for row in (*block.ranked, *block.unranked):
            found, c = row.difference, row.configuration
            value, *amounts = [summary.cell(c, shown).text for shown in (metric, *paid)]
            gap, intervals = (found.gap_text, found.intervals_text(" (")) if found else ("", "")
            rows.append([here or "-", summary.name(c, own), value, gap, intervals, row.conclusion, *amounts])
        rows += [[here or "-", name, "", "", "", "not measured", *("" for _ in paid)] for name in block.unmeasured]
    return head, rows


def conclusion(summary: Summary) -> list[str]:
    """Sentences: the best by the first quality metric and what it costs, then the best by the others."""
    if not summary.quality:
        return [f"{len(summary.study.done)} trials were measured, none of them for quality."]
    first, *others = summary.quality
    blocks = rankings(summary, first)
    if not blocks:
        return [f"No trial has a finite {first.title}."]
    top = max(block.best.ratio or 0.0 for block in blocks)
    clauses = [clause for block in _at(summary, blocks, top) for clause in _clauses(summary, block, True)]
    clauses[0] = f"at a requested ratio of {share(top)}, {clauses[0]}" if top else clauses[0]
    more = [block for metric in others for block in _at(summary, rankings(summary, metric), top)]
    clauses += [clause for block in more for clause in _clauses(summary, block, False)]
    return [f"{clause[:1].upper()}{clause[1:]}." for clause in clauses]


def _at(summary: Summary, blocks: Sequence[Block], ratio: float) -> list[Block]:
    """The blocks of a ratio; of more than two only the one with the best value of all."""

    def order(block: Block) -> tuple[bool, bool, float]:
        value = summary.mean(block.best, block.metric) or 0.0
        return not block.complete, len(block.ranked) < 2, block.metric.sign * value

    found = [block for block in blocks if (block.best.ratio or 0.0) == ratio]
    return found if len(found) <= 2 else [min(found, key=order)]


def _clauses(summary: Summary, block: Block, costs: bool) -> list[str]:
    """Which configuration of a block is best, or which tie; then what the best costs, and what is not ranked."""
    metric, best, ties = block.metric, block.best, block.ties
    where = [equation(n, best.settings[n]) for n in summary.conditions if n in best.settings]
    every = [row.configuration for row in (*block.ranked, *block.unranked)]
    varying = [n for n in summary.shown_axes if len({key(c.settings.get(n)) for c in every}) > 1]
    own = varying or [n for n in summary.shown_axes if n in (USE, *summary.methods)]
    rivals = ties

    def named(configuration: Configuration, of: Metric | None = metric) -> str:
        return summary.name(configuration, own, *([summary.cell(configuration, of).text] if of else []))

    text = f"where {' and '.join(where)}, " if where else ""
    dense = summary.dense_cell(best.reference, metric).text
    if not block.complete:
        text += f"no configuration has a {metric.title} for all its seeds, so none is called best"
    elif len(block.ranked) == 1:
        text += f"{named(best, None)} changes {metric.title} from {dense} to {summary.cell(best, metric).text}"
    elif ties:
        text += f"{_several([named(c) for c in (best, *ties)])} tie for the best {metric.title} (dense {dense})"
    else:
        extreme, side = ("lowest", "below") if metric.better == "lower" else ("highest", "above")
        text += f"{named(best)} has the {extreme} {metric.title} (dense {dense})"
        second = block.ranked[1]
        rivals = [second.configuration]
        if found := second.difference:
            interval = found.intervals_text(" over ")
            certain = "; ".join(filter(None, [interval and f"95% interval {interval}", found.caution]))
            text += f", {found.gap_text} {side} {named(second.configuration)}{certain and f' ({certain})'}"
    equal, unlike = _costs(summary, best, rivals if block.complete else [], lambda c: named(c, None))
    text += f", at unequal cost: {'; '.join(unlike)}" if unlike else ""
    left = [f"{named(row.configuration, None)} ({_seeds(summary, metric, row.configuration)})"
            for row in block.unranked if summary.saves(row.configuration)]  # fmt: skip
    left += [f"{name} (not measured)" for name in block.unmeasured]
    text += f"; not ranked: {_several(left)}" if left else ""
    return [text, *([f"{named(best, None)} {equal}"] if costs and equal and block.complete else [])]


def _costs(
    summary: Summary, best: Configuration, rivals: Sequence[Configuration], named: Callable[[Configuration], str]
) -> tuple[str, list[str]]:
    """What a configuration costs as much as its rivals or what none compares; and each cost that is unequal."""
    equal, unlike, differ = [], [], unequal_costs(summary, best, rivals)
    for name, metric in costs(summary.metric).items():
        words, mean = COSTS[name], summary.mean(best, metric)
        if mean is None:
            continue
        text = words.format(summary.cell(best, metric).text)
        if metric in differ and len(rivals) > MOST_RIVALS:
            known = [mean, *(value for c in rivals if (value := summary.mean(c, metric)) is not None)]
            unlike.append(f"they {words.format(f'{metric.text(min(known))} to {metric.text(max(known))}')}")
        elif metric in differ:
            others = " and ".join(f"{named(c)} {summary.cell(c, metric).text}" for c in rivals)
            unlike.append(f"{named(best)} {text}, {others}")
        else:
            equal.append(text + ", so it saved no time" * (metric.timed and mean >= 1))
    return " and ".join(filter(None, (", ".join(equal[:-1]), *equal[-1:]))), unlike


def _seeds(summary: Summary, metric: Metric, configuration: Configuration) -> str:
    cell = summary.cell(configuration, metric)
    return f"{cell.count} of {cell.planned} seeds" if cell.count else f"no finite {metric.title}"


def _unmeasured(summary: Summary, block: Sequence[Configuration]) -> list[str]:
    """Methods planned under the block's conditions of which no trial is finished; those above dense are not missed."""
    where = [name for name in summary.axes if name not in summary.methods]

    def at(settings: Mapping[str, object], axes: Sequence[str]) -> str:
        return key([settings.get(name) for name in axes])

    names, measured = [], {at(c.settings, summary.methods) for c in block}
    for trial in summary.study.trials:
        values = {n: v for n in summary.methods if (v := trial.settings.get(n)) is not None}
        missing = trial.status != "done" and values and at(trial.settings, summary.methods) not in measured
        if (
            missing
            and at(trial.settings, where) == at(block[0].settings, where)
            and not {*ABOVE_DENSE} & {v for v in values.values() if isinstance(v, str)}
        ):
            names.append(called([named_text(name, value) for name, value in values.items()]))
    return list(dict.fromkeys(names))


def _several(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    *shown, last = [*names[:MOST_NAMED], *more]
    return f"{', '.join(shown)} and {last}" if shown else last
