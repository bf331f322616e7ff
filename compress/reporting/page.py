"""report.html: one file with everything in it, which asks nothing of any network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ... import __version__
from .aggregate import Table
from .columns import Column, all_columns
from .facts import facts, identities, versions
from .figures import Plot
from .findings import axis_title
from .protocols import Protocols
from .published import STATEMENT, beside
from .rows import rows_of
from .tables import PUBLISHED_HEAD, explanation
from .verdict import bounds, conclusion, findings_in_detail

LINK = re.compile(r"https?://[^\s<>\"']*[\w/]|arXiv[ :](\d{4}\.\d{4,5})")


def html(table: Table, plots: Sequence[Plot]) -> str:
    """The page; the same findings give the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"links": links, "keep": keep}
    findings, protocols = table.findings, Protocols()
    main = _table(table, table.columns, protocols)
    every = _table(table, all_columns(findings), protocols)
    return environment.from_string(_file("page.html")).render(
        version=__version__,
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        title=findings.title,
        source=findings.source.name,
        conclusion=conclusion(table),
        detail=findings_in_detail(table),
        bounds=bounds(table),
        facts=facts(findings),
        main=main,
        every=every,
        explanation=explanation(table),
        published=beside(table),
        published_head=PUBLISHED_HEAD,
        statement=STATEMENT,
        plots=[(plot, Markup(plot.inline)) for plot in plots],
        failed=findings.failed,
        waiting=findings.waiting,
        notes=_notes(table),
        protocols=protocols.all,
        measured=protocols.by_label,
        text=findings.text,
        versions=versions(findings),
        identities=identities(findings),
        single=len(findings.trials) == 1,
    )


def links(text: str) -> Markup:
    """Text with its addresses and arXiv numbers as links."""
    parts, end = [], 0
    for found in LINK.finditer(text):
        address = found[0] if found[1] is None else f"https://arxiv.org/abs/{found[1]}"
        parts += [Markup.escape(text[end : found.start()]), Markup('<a href="{}">{}</a>').format(address, found[0])]
        end = found.end()
    return Markup("").join([*parts, Markup.escape(text[end:])])


def keep(text: str) -> Markup:
    """Text whose hyphenated names are not broken."""
    return Markup(re.sub(r"\w+-\w+", r'<span class="keep">\g<0></span>', str(Markup.escape(text))))


def _table(table: Table, columns: Sequence[Column], protocols: Protocols) -> dict[str, Any]:
    rows = rows_of(table, columns, protocols)
    return {
        "axes": [(axis_title(name), name) for name in table.shown_axes],
        "columns": columns,
        "dense": [row for row in rows if row.dense],
        "rows": [row for row in rows if not row.dense],
    }


def _notes(table: Table) -> list[tuple[str, str]]:
    """Every note with the configurations that it is about."""
    found: dict[str, dict[str, None]] = {}
    for configuration in table.configurations:
        for trial in configuration.trials:
            for note in trial.data.get("notes") or ():
                found.setdefault(note, {})[table.name(configuration)] = None
    everyone = len(table.configurations)
    return [
        (note, "all configurations" if len(names) == everyone > 1 else "; ".join(names))
        for note, names in found.items()
    ]


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
