"""``prunekit report``: writes the folder of a report, all of it or nothing."""

from __future__ import annotations

from pathlib import Path

from ...registry import SpecError
from ..output import printing
from ..output.folders import RunFolder
from .page import html, markdown
from .plots import draw
from .ranking import conclusion
from .style import Plot
from .summary import summarise
from .tables import latex, table_csv, trials_csv
from .trials import read

PAGE = "report.html"


def report(source: Path, out: Path | None = None, overwrite: bool = False) -> None:
    """Write the report of a store or a results folder to ``out``, by default NAME-report next to it.

    Raises :class:`SpecError` or :class:`StoreError` for a source without results, a folder that exists, and a report
    that cannot be written; no part of it is left.
    """
    source = Path(source).expanduser().resolve()
    default = source.with_name(f"{source.name if source.is_dir() else source.stem}-report")
    folder = RunFolder(Path(out) if out else default, overwrite, what="report", marker=PAGE)
    study = read(source)
    folder.check()
    summary = summarise(study)
    plots = draw(summary)
    files = {
        PAGE: html(summary, plots),
        "report.md": markdown(summary, plots),
        "table.csv": table_csv(summary),
        "trials.csv": trials_csv(summary),
        "table.tex": latex(summary),
    }
    write(folder, files, plots)
    unfinished = [f"{study.progress}."] if study.failed or study.waiting else []
    for sentence in [*unfinished, *conclusion(summary)]:
        printing.say(sentence)
    printing.say(f"report: {folder.target / PAGE}", whole=True)


def write(folder: RunFolder, files: dict[str, str], plots: list[Plot]) -> None:
    """Write texts, and plots as SVG and PNG; raises :class:`SpecError` if the disk does not take them."""
    try:
        with folder.open() as partial:
            (partial / "plots").mkdir()
            for name, text in {**files, **{f"plots/{plot.name}.svg": plot.svg for plot in plots}}.items():
                (partial / name).write_text(text, encoding="utf-8", newline="\n")
            for plot in plots:
                (partial / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    except OSError as error:
        raise SpecError(
            f"{folder.what} {folder.target} cannot be written: {error.strerror or error}; make room there, or name "
            "another place with --out (nothing was left behind)"
        ) from None
