"""``prunekit report``: the folder of a report, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ...registry import SpecError
from ..output import printing
from ..output.folders import RunFolder
from .aggregate import Table, tabulate
from .findings import read
from .page import html, progress
from .plots import draw
from .tables import latex, markdown, table_csv, trials_csv
from .verdict import conclusion

PAGE = "report.html"


def report(source: Path, out: Path | None = None, overwrite: bool = False) -> None:
    """Write the report of a store or a results folder, beside it as NAME-report unless ``out`` says where.

    Raises :class:`SpecError` or :class:`StoreError` for a source that holds no results, for a folder that exists, and
    where the report cannot be written; nothing is left of it then.
    """
    source = Path(source).expanduser()
    folder = RunFolder(Path(out) if out else default_folder(source), overwrite, what="report", marker=PAGE)
    findings = read(source)
    folder.check()
    table = tabulate(findings)
    try:
        with folder.open() as partial:
            write(table, partial)
    except OSError as error:
        raise SpecError(
            f"report {folder.target} cannot be written: {error.strerror or error}; make room there, or name another "
            "place with --out (nothing was left behind)"
        ) from None
    for sentence in progress(findings):
        printing.say(sentence)
    printing.say(conclusion(table))
    printing.say(f"report: {folder.target / PAGE}", whole=True)


def default_folder(source: Path) -> Path:
    """study.sqlite -> study-report, beside it; a folder by its whole name."""
    source = source.resolve()
    return source.with_name(f"{source.name if source.is_dir() else source.stem}-report")


def write(table: Table, folder: Path) -> None:
    """Write the page, the tables and the plots into a folder."""
    plots = draw(table)
    files = {
        PAGE: html(table, plots),
        "report.md": markdown(table, plots),
        "table.csv": table_csv(table),
        "trials.csv": trials_csv(table),
        "table.tex": latex(table),
        **{f"plots/{plot.name}.svg": plot.svg for plot in plots},
    }
    (folder / "plots").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for plot in plots:
        (folder / "plots" / f"{plot.name}.png").write_bytes(plot.png)
