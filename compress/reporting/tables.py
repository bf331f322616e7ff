"""The main table as rows of text, and a report's tables as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..output.formatting import number
from .axes import RATIO, USE, axis_title, finite, setting_text
from .metrics import Metric, all_metrics, evaluators_of
from .protocols import Protocol, Protocols
from .ranking import marked
from .statistics import standard_error
from .summary import Configuration, Summary
from .trials import RELATIVE

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
    **dict.fromkeys("\n\r\t", " "),
})  # fmt: skip


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would evaluate."""


@dataclass(frozen=True)
class Shown:
    """One number in a table."""

    text: str
    sort: float | None
    best: bool
    protocol: Protocol | None
    about: str
    """The configuration, the metric, and the values behind the number."""


@dataclass(frozen=True)
class Row:
    """One line: settings, then numbers."""

    settings: list[str]
    cells: list[Shown]
    dense: bool = False
    starts_block: bool = False

    @property
    def texts(self) -> list[str]:
        return [*self.settings, *(cell.text for cell in self.cells)]


def head(summary: Summary, metrics: Sequence[Metric]) -> list[str]:
    """Titles of the axes, then of the metrics."""
    return [*map(axis_title, summary.shown_axes), *(metric.title for metric in metrics)]


def table_rows(summary: Summary, metrics: Sequence[Metric], protocols: Protocols) -> list[Row]:
    """Dense models first, then the configurations in order."""
    rows, last = [], None
    for index, dense in enumerate(summary.dense):
        name = summary.dense_name(index)
        cells = []
        for metric in metrics:
            cell = summary.dense_cell(index, metric)
            about = f"{name}, {metric.title}: {cell.text}"
            cells.append(Shown(cell.text, cell.mean, False, protocols.of(metric.label, dense.trials), about))
        texts = [setting_text(a, dense.settings[a]) if a in dense.settings else "" for a in summary.shown_axes]
        free = texts.index("") if "" in texts else 0
        texts[free] = f"dense, {texts[free]}".removesuffix(", ")
        rows.append(Row(texts, cells, dense=True))
    for c in summary.configurations:
        cells = []
        for metric in metrics:
            cell, best = summary.cell(c, metric), (c.number, metric.key) in marked(summary)
            about = f"{summary.name(c)}, {metric.title}: {cell.text}{_about(summary, c, metric)}"
            cells.append(Shown(cell.text, cell.mean, best, protocols.of(metric.label, c.trials), about))
        texts = [setting_text(a, c.settings[a]) if a in c.settings else "-" for a in summary.shown_axes]
        rows.append(Row(texts, cells, starts_block=last not in (None, (c.reference, c.ratio))))
        last = (c.reference, c.ratio)
    return rows


def _about(summary: Summary, c: Configuration, metric: Metric) -> str:
    """The values of the seeds, what the metric means, and the extent of repetitions where an evaluator reports it."""
    parts = []
    if summary.cell(c, metric).sd is not None:
        values = summary.sample(c, metric).finite
        parts.append(f", mean ± standard deviation of {len(values)} seeds ({', '.join(map(number, values))})")
    parts += [f"; {metric.meaning}"] if metric.meaning else []
    found = c.first.metric(metric.label) if len(c.trials) == 1 else None
    ends = [finite(found.pruned.get(f"{metric.name}_{end}")) if found else None for end in ("min", "max", "stderr")]
    low, high, error = (None if end is None else metric.text(end) for end in ends)
    parts += [f"; from {low} to {high} over the repetitions"] if low and high else []
    parts += [f"; standard error {error}"] if error else []
    return "".join(parts)


def explanation(summary: Summary) -> list[str]:
    """How to read the main table's values, what they do not say, and its marks."""
    evaluators, lines = evaluators_of(summary.study), []
    relative = [m.title for m in summary.metrics if m.relative or (evaluators[m.label], m.name) in RELATIVE]
    parts = [f"{', '.join(relative)}: relative to the dense model of the same run"] if relative else []
    seeds = ", ".join(map(axis_title, summary.repeated))
    parts += [f"values are mean ± standard deviation (n - 1) over {seeds}"] if seeds else []
    lines += [f"{'; '.join(parts)}."] if parts else []
    for metric in summary.metrics:
        errors = [standard_error(metric, c.first) for c in summary.configurations]
        if known := [error for error in errors if error is not None]:
            apart = ", which ± over seeds does not contain" if summary.repeated else ""
            lines.append(f"The standard error of {metric.title} is up to {100 * max(known):.1f} points{apart}.")
    probing = dict.fromkeys(setting_text(USE, c.strategy) for c in summary.configurations if _probes(c))
    if probing and summary.metric("cost.parameters_ratio"):
        lines.append(f"Parameters of {' and '.join(probing)} are those that a batch uses; all weights stay in memory.")
    if marked(summary):
        same = " and ".join(map(axis_title, [RATIO, *summary.conditions]))
        lines.append(
            f"Bold: the best mean at the same {same}, and all that are not significantly worse; nothing where all tie. "
            "Only what computes less than the dense model and has a value for every planned repetition is marked; "
            "times and PRR are not, as they vary from run to run."
        )
    return lines


def _probes(c: Configuration) -> bool:
    """Whether it chooses for every batch: the cost evaluator counted operations of a probe."""
    return any(found.evaluator == "cost" and (finite(found.pruned.get("probe")) or 0) > 0 for found in c.first.metrics)


def table_csv(summary: Summary) -> str:
    """One row for each configuration: trials finished and planned, mean and standard deviation of every value."""
    metrics = all_metrics(summary.study)
    rows = []
    for index, dense in enumerate(summary.dense):
        values = {metric.key: summary.dense_cell(index, metric).mean for metric in metrics}
        rows.append({"kind": "dense", **dense.settings, **values})
    for c in summary.configurations:
        row = {"kind": "pruned", **c.settings, "trials": len(c.trials), "planned": c.planned}
        for metric in metrics:
            cell = summary.cell(c, metric)
            row |= {metric.key: cell.mean, f"{metric.key}.sd": cell.sd}
        rows.append(row)
    axes = dict.fromkeys(name for c in summary.configurations for name in c.settings)
    names = [name for metric in metrics for name in (metric.key, f"{metric.key}.sd")]
    return csv_text(pd.DataFrame(rows, columns=["kind", *axes, "trials", "planned", *names], dtype=object))


def trials_csv(summary: Summary) -> str:
    """One row for each trial: settings, state, error, seconds, and every value of the pruned and the dense model."""
    frame = summary.study.frame
    trial, settings = frame["trial"], frame["setting"] if "setting" in frame else pd.DataFrame(index=frame.index)
    columns = {"trial": trial["trial"], **settings, **{name: trial[name] for name in ("status", "error", "seconds")}}
    for metric in all_metrics(summary.study):
        columns |= {metric.key: frame["pruned", metric.key], f"{metric.key}.dense": frame["dense", metric.key]}
    return csv_text(pd.DataFrame(columns))


def csv_text(frame: pd.DataFrame) -> str:
    """A table as CSV; texts that a spreadsheet would evaluate as formulas are quoted."""
    rows = [[_quoted(value) for value in row] for row in (tuple(frame.columns), *frame.itertuples(index=False))]
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=object).to_csv(index=False, lineterminator="\n")


def _quoted(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(FORMULA) else "") + value.replace("\r", " ")


def latex(summary: Summary) -> str:
    """The main table for a paper; needs the booktabs package."""
    rows = table_rows(summary, summary.metrics, Protocols())
    titles, axes = [title.translate(LATEX) for title in head(summary, summary.metrics)], len(summary.shown_axes)
    body = []
    for before, row in zip([None, *rows], rows, strict=False):
        cells = [text.translate(LATEX) for text in row.texts]
        for index, cell in enumerate(row.cells, axes):
            cells[index] = f"\\textbf{{{cells[index]}}}" if cell.best else cells[index]
        if before and (row.starts_block or (before.dense and not row.dense)):
            cells[0] = f"\\midrule\n{cells[0]}"
        body.append(cells)
    title = summary.study.title + "." * (not summary.study.title.endswith((".", "?", "!")))
    caption = f"{title} {' '.join(explanation(summary))}".translate(LATEX)
    text = pd.DataFrame(body).to_latex(
        header=titles, index=False, escape=False, caption=caption, column_format="l" * axes + "r" * len(summary.metrics)
    )
    centred = text.replace("\\begin{table}", "\\begin{table}\n\\centering", 1)
    return f"% needs \\usepackage{{booktabs}}\n{centred}"
