"""A report's tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..output.formatting import table as markdown_table
from .aggregate import RATIO, Table
from .columns import Column, all_columns
from .facts import facts
from .figures import safe_name
from .findings import axis_title, finite
from .plots import Plot
from .protocols import Protocols
from .published import STATEMENT, beside
from .rows import Row, rows_of
from .verdict import bounds, conclusion, findings_in_detail

PUBLISHED_HEAD = ("of", "measure", "published", "ours", "difference", "source")

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def head(table: Table, columns: Sequence[Column]) -> list[str]:
    """Titles of the axes, then of the columns."""
    return [*map(axis_title, table.shown_axes), *(column.title for column in columns)]


def explanation(table: Table) -> list[str]:
    """How to read the main table, in sentences."""
    relative = [column.title for column in table.columns if column.relative or column.of_dense]
    said = [f"Relative to the dense model of the same run: {', '.join(relative)}."] if relative else []
    if table.repeated:
        repeated = ", ".join(map(axis_title, table.repeated))
        said.append(f"Values are mean ± standard deviation (n - 1) over repetitions ({repeated}).")
    if table.best:
        shared = " and ".join(map(axis_title, [RATIO, *table.circumstances]))
        part = any(len(c.trials) < c.planned for c in table.configurations)
        whole = " and has a value for every planned repetition" if part else ""
        said.append(f"Bold: the best mean at the same {shared}, among what computes less than the dense model{whole}.")
    return said


@dataclass(frozen=True)
class Crossing:
    """Where a study is shown that no plot of quality shows."""

    said: str
    command: str


def crossing(table: Table, plots: Sequence[Plot]) -> Crossing | None:
    """The command that crosses two axes of a study of one ratio of whose quality nothing is drawn."""
    axes = [name for name in (*table.methods, *table.circumstances) if name != RATIO]
    drawn = any(plot.name.startswith(safe_name(column.key)) for plot in plots for column in table.quality)
    if drawn or not table.quality or len(axes) < 2 or len({c.ratio for c in table.configurations}) > 1:
        return None
    names = [shlex.quote(part) for part in (table.findings.source.name, *axes[:2])]
    command = "prunekit pivot {} --rows {} --columns {}".format(*names)
    return Crossing(
        "There is one ratio only, so quality is not drawn. As a cross table, with --out also drawn:", command
    )


def markdown(table: Table, plots: Sequence[Plot]) -> str:
    """report.md."""
    findings, protocols = table.findings, Protocols()
    rows = rows_of(table, table.columns, protocols)
    lines = [f"# {findings.title}", "", conclusion(table), ""]
    detail = findings_in_detail(table)
    lines += [*(f"- {said}" for said in (*detail, *filter(None, [bounds(table)])) if len(detail) > 1), ""]
    cells = [[text for text, _ in row.settings] + [_bold(cell.text, cell.best) for cell in row.cells] for row in rows]
    lines += [*markdown_table(head(table, table.columns), cells), "", *explanation(table), ""]
    cross = crossing(table, plots)
    lines += [f"{cross.said} `{cross.command}`", ""] if cross else []
    published = beside(table)
    if published:
        cells = [(b.where, b.metric, b.theirs, b.ours, b.difference, b.source) for b in published]
        lines += ["## Beside published values", "", *markdown_table(PUBLISHED_HEAD, cells), "", STATEMENT, ""]
    if findings.failed or findings.waiting:
        lines += ["## Not measured", ""]
        lines += [f"- {trial.label}: {_line(trial.error)}" for trial in findings.failed]
        lines += [f"- waiting: {findings.waiting} of {len(findings.trials)} trials"] if findings.waiting else []
        lines.append("")
    for plot in plots:
        lines += [f"## {plot.title}", "", f"![{plot.title}](plots/{plot.name}.png)", "", plot.caption, ""]
    lines += ["## How it was measured", "", *(f"- **{name}**: {text}" for name, text in facts(findings))]
    for label, protocol in protocols.by_label.items():
        lines.append(f"- **{label}**: " + "; ".join(f"{name}: {value}" for name, value in protocol.items()))
    lines += ["", "table.csv and table.tex hold the table above, trials.csv every trial with every value.", ""]
    return "\n".join(_single_blank(lines))


def table_csv(table: Table) -> str:
    """One row for each configuration: trials finished and planned, mean and standard deviation of every value."""
    columns = all_columns(table.findings)
    axes = list(dict.fromkeys(name for c in table.configurations for name in c.settings))
    names = [name for column in columns for name in (column.key, f"{column.key}.sd")]
    lines = [["kind", *axes, "trials", "planned", *names]]
    for reference in table.dense:
        cells = [reference.cell(column) for column in columns]
        settings = [reference.settings.get(axis) for axis in axes]
        lines.append(["dense", *settings, "", "", *(value for cell in cells for value in (cell.mean, None))])
    for configuration in table.configurations:
        cells = [configuration.cell(column) for column in columns]
        settings = [configuration.settings.get(axis) for axis in axes]
        values = [value for cell in cells for value in (cell.mean, cell.sd)]
        lines.append(["pruned", *settings, len(configuration.trials), configuration.planned, *values])
    return csv_text(lines)


def trials_csv(table: Table) -> str:
    """One row for each trial, failed and waiting ones too: settings, state, and every value pruned and dense."""
    findings = table.findings
    columns = all_columns(findings)
    axes = list(dict.fromkeys(name for trial in findings.trials for name in trial.settings))
    names = [name for column in columns for name in (column.key, f"{column.key}.dense")]
    lines = [["trial", *axes, "status", "error", "seconds", *names]]
    for trial in findings.trials:
        values = [value for column in columns for value in (column.value(trial), column.dense(trial))]
        settings = [trial.settings.get(axis) for axis in axes]
        lines.append([trial.number, *settings, trial.status, trial.error, trial.seconds, *values])
    return csv_text(lines)


def latex(table: Table) -> str:
    """The main table for a paper; needs the booktabs package."""
    rows = rows_of(table, table.columns, Protocols())
    axes = len(table.shown_axes)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_tex(table.findings.title)}. {_tex(' '.join(explanation(table)))}}}",
        f"\\begin{{tabular}}{{{'l' * axes}{'r' * len(table.columns)}}}",
        "\\toprule",
        " & ".join(map(_tex, head(table, table.columns))) + " \\\\",
        "\\midrule",
    ]
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (row.starts_block or (before.dense and not row.dense)):
            lines.append("\\midrule")
        lines.append(_latex_row(row))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _latex_row(row: Row) -> str:
    cells = [_tex(text) for text, _ in row.settings]
    cells += [f"\\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text) for cell in row.cells]
    return " & ".join(cells) + " \\\\"


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _line(text: str | None) -> str:
    return " ".join((text or "failed without a message").split())


def _single_blank(lines: Sequence[str]) -> list[str]:
    """The lines with runs of empty ones made one."""
    return [line for before, line in zip(["", *lines], lines, strict=False) if line or before]


def csv_text(lines: list[list[Any]]) -> str:
    """Lines as CSV; texts that a spreadsheet would take for formulas are quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow([_plain(value) for value in line])
    return text.getvalue()


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        # A spreadsheet would take these for formulas.
        return f"'{value}" if value[:1] in ("=", "+", "-", "@") and finite(value) is None else value
    return value
