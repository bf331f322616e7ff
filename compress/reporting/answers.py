"""What each axis of methods changes: its values against the first one, matched trial by trial as in a cross table."""

from __future__ import annotations

from dataclasses import replace

from ...registry import SpecError
from .axes import RATIO, STRATEGY_AXES, axis_title, setting_text
from .pivot import Cross, cross, join
from .ranking import MOST_NAMED
from .summary import Summary


def answers(summary: Summary) -> list[str]:
    """A sentence for each axis of methods but the strategy, on the first metric of quality; and how to see the rest.

    ``compensate, against none: least squares changes perplexity by -2.4% (PP) and -15.0% (magnitude)``.
    """
    strategy = next((name for name in STRATEGY_AXES if name in summary.axes), None)
    others = [name for name in summary.methods if name != strategy and len(summary.study.axes.get(name, ())) > 1]
    if not strategy or not summary.quality:
        return []
    found = []
    try:
        grid = join([summary.study])
        for name in others:
            first = summary.study.axes[name][0]
            question = grid.question(strategy, name, metric=summary.quality[0].key)
            found += _sentences(cross(grid, replace(question, relative={name: first}))[-1], first)
    except SpecError:  # trials that cannot be matched have no cross table
        return []
    if others or RATIO in summary.axes:
        rows, columns = strategy, others[0] if others else RATIO
        by = f" --by {RATIO}" * (others != [] and RATIO in summary.axes)
        source = summary.study.source.name
        found.append(f"As a cross table: prunekit pivot {source} --rows {rows} --columns {columns}{by}.")
    return found


def _sentences(table: Cross, first: object) -> list[str]:
    question, found = table.question, []
    for j, value in enumerate(table.columns):
        cells = [(setting_text(question.rows, row), table.cells[i, j]) for i, row in enumerate(table.rows)]
        known = [(name, cell) for name, cell in cells if cell["trials"]]
        if value == first or not known:
            continue
        changes = [f"{_change(table, cell['value'])} ({name})" for name, cell in known[:MOST_NAMED]]
        changes += [f"{len(known) - MOST_NAMED} more"] * (len(known) > MOST_NAMED)
        listed = " and ".join(filter(None, (", ".join(changes[:-1]), changes[-1])))
        found.append(
            f"{axis_title(question.columns)}, against {setting_text(question.columns, first)}: "
            f"{setting_text(question.columns, value)} changes {question.metric.title} by {listed}."
        )
    return [f"{text[:1].upper()}{text[1:]}" for text in found]


def _change(table: Cross, value: float) -> str:
    """A ratio as a change in percent; a difference as the cross table writes it."""
    if not table.question.ratio:
        return table.question.text(value) + " points" * (table.question.metric.style == "accuracy")
    return f"{100 * (value - 1):+,.1f}%"
