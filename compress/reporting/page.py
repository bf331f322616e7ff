"""The report as Markdown, and as report.html: all in one file, which loads nothing from a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ..output.formatting import ERROR, markdown_text, table
from .answers import answers
from .axes import axis_title
from .metrics import Metric, all_metrics
from .protocols import Protocols, notes, summary_facts, versions
from .published import HEAD, STATEMENT, compare_with_published
from .ranking import EXPLANATION, conclusion, ranking_table
from .style import Plot
from .summary import Summary
from .tables import explanation, head, table_rows

PRINTED = 9
"""Maximum number of columns of a table on paper; the first ones matter most."""

LINK = re.compile(r"https?://[^\s<>\"']*[\w/]|arXiv[ :](\d{4}\.\d{4,5})")


def html(summary: Summary, plots: Sequence[Plot]) -> str:
    """report.html."""
    return _render("page.html", summary, plots)


def markdown(summary: Summary, plots: Sequence[Plot]) -> str:
    """report.md."""
    return _render("page.md", summary, plots)


def _render(template: str, summary: Summary, plots: Sequence[Plot]) -> str:
    page = template.endswith("html")
    environment = Environment(
        autoescape=page, finalize=None if page else _as_markdown, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"links": links, "table": _markdown_table}
    study, protocols = summary.study, Protocols()
    main = _table(summary, summary.metrics, protocols)
    every = _table(summary, [m for m in all_metrics(study) if not m.name.endswith(ERROR)], protocols)
    rankings = [(metric.title, *ranking_table(summary, metric)) for metric in summary.quality]
    rows = [*main["dense"], *main["rows"]]
    return environment.from_string(_file(template)).render(
        version=__version__,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        study=study,
        conclusion=conclusion(summary),
        facts=summary_facts(study),
        head=head(summary, summary.metrics),
        cells=[[*row.settings, *(Markup(f"**{c.text}**") if c.best else c.text for c in row.cells)] for row in rows],
        main=main,
        every=every,
        explanation=explanation(summary),
        answers=answers(summary),
        rankings=[ranking for ranking in rankings if ranking[2]],
        ranking_explanation=EXPLANATION,
        published=compare_with_published(summary),
        published_head=HEAD,
        statement=STATEMENT,
        plots=[(plot, Markup(plot.inline)) for plot in plots],
        notes=notes(summary),
        protocols=protocols.all,
        measured=protocols.by_label,
        versions=versions(study),
    )


def _as_markdown(text: Any) -> str:
    """Text as it is; what is marked as safe is Markdown already."""
    return text if isinstance(text, Markup) else markdown_text(str(text))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    lines = [[_as_markdown(cell) for cell in row] for row in (head, *rows)]
    return Markup("\n".join(table(lines[0], lines[1:])))


def links(text: str) -> Markup:
    """Text with its addresses and arXiv numbers as links."""
    parts, end = [], 0
    for found in LINK.finditer(text):
        address = found[0] if found[1] is None else f"https://arxiv.org/abs/{found[1]}"
        parts += [Markup.escape(text[end : found.start()]), Markup('<a href="{}">{}</a>').format(address, found[0])]
        end = found.end()
    return Markup("").join([*parts, Markup.escape(text[end:])])


def _table(summary: Summary, metrics: Sequence[Metric], protocols: Protocols) -> dict[str, Any]:
    rows = table_rows(summary, metrics, protocols)
    return {
        "axes": [(axis_title(name), name) for name in summary.shown_axes],
        "columns": metrics,
        "printed": max(1, PRINTED - len(summary.shown_axes)),
        "dense": [row for row in rows if row.dense],
        "rows": [row for row in rows if not row.dense],
    }


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
