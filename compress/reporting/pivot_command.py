"""``prunekit pivot``: cross tables on the terminal, and their folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from ...registry import SpecError
from ..output import printing
from ..output.folders import RunFolder
from .findings import read
from .pivot import Cross, crossed
from .pivot_axes import Grid, joined
from .pivot_records import Place, Question
from .pivot_text import (
    head,
    heading,
    markdown,
    measure,
    notes,
    pivot_csv,
    protocol,
    row_names,
    spread_text,
    value_text,
)

PAGE = "pivot.md"
ELSEWHERE = "--out DIR writes them all"

GAP = 3
"""Characters between two columns."""


def pivot(
    stores: Sequence[Path],
    rows: str,
    columns: str,
    by: str | None = None,
    metric: str | None = None,
    relative: str = "dense",
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Print the cross tables of one store or several; with ``out`` write them and their heat maps there too.

    Raises :class:`SpecError` or :class:`StoreError` for a source without finished trials, for what is no axis, value
    or metric of it, and where the folder exists or cannot be written; nothing is left of it then.
    """
    folder = RunFolder(Path(out), overwrite, what="cross table", marker=PAGE) if out else None
    if folder:
        folder.check()
    grid = joined([read(store) for store in stores])
    question = asked(grid, rows, columns, by, metric, relative)
    tables = crossed(grid, question)
    printing.say(measure(question))
    for cross in tables:
        show(cross)
    for line in protocol(question, tables):
        printing.say(line)
    if folder:
        write(grid, question, tables, folder)
        printing.say(f"cross table: {folder.target / PAGE}", whole=True)


def asked(grid: Grid, rows: str, columns: str, by: str | None, metric: str | None, relative: str) -> Question:
    """The command's options, understood; raises :class:`SpecError` for what the trials do not have."""
    given = {"--rows": rows, "--columns": columns, **({} if by is None else {"--by": by})}
    axes = {option: grid.axis(name, option) for option, name in given.items()}
    for option, axis in axes.items():
        others = [other for other in axes if other != option and axes[other] == axis]
        if others:
            raise SpecError(f"{option} and {others[0]} are the same axis, {axis}; each needs one of its own")
    reference = grid.relative(relative)
    return Question(axes["--rows"], axes["--columns"], grid.metric(metric, reference), reference, axes.get("--by"))


def show(cross: Cross) -> None:
    """One table on the terminal, without the spreads where that is too narrow for them, and its notes below."""
    names, titles = row_names(cross), head(cross)
    rows = [[_lines(cross, (i, j)) for j in range(len(cross.columns))] for i in range(len(names))]
    widths = [max(len(line) for row in rows for line in (titles[j + 1], *row[j])) for j in range(len(cross.columns))]
    whole = sum(widths) + GAP * len(widths) + max(map(len, (titles[0], *names)))
    narrow = printing.out.is_terminal and whole > printing.out.width
    cells = [
        [_cell(lines[:1] + lines[-1:] if narrow and len(lines) > 2 else lines, (i, j) in cross.marks.best)
         for j, lines in enumerate(row)]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    printing.say(f"\n{heading(cross)}")
    printing.show_wide_table(titles, [[name, *row] for name, row in zip(names, cells, strict=True)], 1, ELSEWHERE)
    if narrow:
        printing.say(f"Too narrow for least and largest: {ELSEWHERE}.")
    for note in notes(cross):
        printing.say(note)


def _lines(cross: Cross, place: Place) -> list[str]:
    """Value, least to largest, number of trials, each in a line of its own."""
    spread = spread_text(cross, place).replace(", n ", "\nn ")
    return [value_text(cross, place), *spread.splitlines()]


def _cell(lines: Sequence[str], best: bool) -> Text:
    text = Text(lines[0], style="bold" if best else "")
    return text.append("".join(f"\n{line}" for line in lines[1:]), style="not bold dim")


def write(grid: Grid, question: Question, tables: Sequence[Cross], folder: RunFolder) -> None:
    """Write pivot.md, pivot.csv and the heat maps."""
    from .plot_pivot import pivot_plots

    plots = pivot_plots(question, tables)
    texts = {
        PAGE: markdown(grid, question, tables, [(plot.name, plot.title) for plot in plots]),
        "pivot.csv": pivot_csv(question, tables),
        **{f"plots/{plot.name}.svg": plot.svg for plot in plots},
    }
    try:
        with folder.open() as partial:
            (partial / "plots").mkdir()
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8", newline="\n")
            for plot in plots:
                (partial / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    except OSError as error:
        raise SpecError(
            f"cross table {folder.target} cannot be written: {error.strerror or error}; make room there, or name "
            "another place with --out (nothing was left behind)"
        ) from None
