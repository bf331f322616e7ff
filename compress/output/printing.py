"""What the commands show on a terminal: tables on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from . import stopping
from .formatting import fitting, printable
from .pace import pace
from .reading import brief

if TYPE_CHECKING:
    from ...registry import Catalog

Item = TypeVar("Item")
Row = Sequence[str] | Sequence[str | Text]

PIPED_WIDTH = 100

MINUTE = 60.0
"""Seconds between two lines of progress."""

CELL = 400
"""Characters of a cell; a longer one is cut in its middle."""

WIDEST = 100_000
"""Characters; more than any table has."""


class SafeConsole(Console):
    """Control sequences in its texts, whoever wrote them, are shown and have no effect."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Segments without control characters, except those of rich itself."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


out = SafeConsole(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)
err = SafeConsole(stderr=True)


def error(message: object) -> None:
    """One red message on stderr; long words such as paths are not broken."""
    err.print(f"[red]error:[/red] {escape(fitting(message))}", highlight=False, soft_wrap=True)


def warning(message: object) -> None:
    """A yellow message on stderr."""
    err.print(f"[yellow]warning:[/yellow] {escape(fitting(message))}", highlight=False, soft_wrap=True)


def catalog_problems(catalog: Catalog) -> None:
    """Warnings about plugins that are broken or switched off."""
    for problem in catalog.problems:
        warning(problem)
    for blocked in catalog.blocked:
        warning(f"plugin {blocked} is switched off by PRUNEKIT_BLOCK")


def say(line: str, whole: bool = False) -> None:
    """A line on stdout, as it is; ``whole`` keeps long words such as paths in one piece."""
    out.print(fitting(line), highlight=False, markup=False, soft_wrap=whole)


def write(piece: str) -> None:
    """A piece of a line on stdout, at once."""
    out.file.write(printable(piece))
    out.file.flush()


def show_table(head: Sequence[str], rows: Iterable[Row], left: int = 1, title: str | None = None) -> None:
    """A table whose first ``left`` columns are text and the others numbers."""
    out.print(_table(head, rows, left, title))
    out.print()


def show_wide_table(head: Sequence[str], rows: Sequence[Row], left: int, elsewhere: str) -> None:
    """A table whose words and numbers stay in one piece: as wide as it is in a pipe or a file.

    On a terminal the columns that do not fit are left out from the right, and a line says how many there are and
    where, ``elsewhere``.
    """
    least, count = min(left + 1, len(head)), len(head)
    shown, width = _whole(head, rows, left)
    if out.is_terminal and width > out.width:
        head = [name.replace(" ", "\n") for name in head]
        shown, width = _whole(head, rows, left)
        while width > out.width and count > least:
            count -= 1
            shown, width = _whole(head[:count], [row[:count] for row in rows], left)
    drawn = out.render(shown, out.options.update(width=width))
    out.print(Segments(drawn), end="", crop=False, soft_wrap=True)
    out.print()
    if count < len(head):
        more = len(head) - count
        say(f"{more} more column{'s' * (more > 1)}: {elsewhere}", whole=True)


def narrow() -> bool:
    """Whether a terminal has no room for tables with intervals in them."""
    return out.is_terminal and out.width < 130


def _whole(head: Sequence[str], rows: Iterable[Row], left: int) -> tuple[Table, int]:
    """A table that is never wrapped, and the width that it needs."""
    table = _table(head, rows, left, whole=True)
    return table, Measurement.get(out, out.options.update(width=WIDEST), table).maximum


def _table(head: Sequence[str], rows: Iterable[Row], left: int, title: str | None = None, whole: bool = False) -> Table:
    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for index, name in enumerate(head):
        shown.add_column(
            escape(brief(name, CELL)), justify="left" if index < left else "right", overflow="fold", no_wrap=whole
        )
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, Text) else escape(brief(cell, CELL)) for cell in row))
    return shown


class _Pace(ProgressColumn):
    """Rate and time left of a bar that :meth:`Bars.track` moves, as they were after its last step."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("pace", ""))


class Bars:
    """Progress bars on stderr; if that is not a terminal, one line for each stage and one a minute within it."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Pace())
        self._progress = Progress(*columns, console=err, transient=True, disable=not self.shown)

    @property
    def shown(self) -> bool:
        """Whether bars can be drawn: stderr is a terminal."""
        return err.is_terminal

    def say(self, line: str) -> None:
        """A line in place of a bar."""
        err.print(fitting(line), highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def track(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """``items``, with a bar of ``total`` steps while they are used, its rate and the time left."""
        if not self.shown:
            self.say(label if total <= 1 else f"{label}, {total:,} steps")
        task = self._progress.add_task(escape(label), total=total)
        began = time.monotonic()
        try:
            for done, item in enumerate(self.minutes(items, label, total), start=1):
                stopping.check()
                yield item
                self._progress.update(task, completed=done, pace=pace(done, total, time.monotonic() - began))
        finally:
            self._progress.remove_task(task)

    def minutes(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """``items``; if stderr is not a terminal, with a line each minute, the first as soon as one step is done."""
        began = said = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            long = done == 1 and (now - began) * (total - 1) >= MINUTE
            if not self.shown and done < total and (long or now - said >= MINUTE):
                self.say(f"{label}: {done:,}/{total:,}, {pace(done, total, now - began)}")
                said = now

    def add(self, label: str, total: int, done: int = 0) -> TaskID:
        """A bar that :meth:`update` moves; without effect if no bars are shown."""
        return self._progress.add_task(escape(label), total=total, completed=done)

    def update(self, task: TaskID, label: str, done: int) -> None:
        """Move a bar to ``done`` steps and change its label."""
        self._progress.update(task, description=escape(label), completed=done)


def quiet() -> None:
    """Silence the libraries' own bars and chatter: this program reports what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
