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
from .findings import Findings, axis_title
from .notes import notes
from .protocols import Protocols
from .published import STATEMENT, beside
from .rows import rows_of
from .tables import PUBLISHED_HEAD, crossing, explanation
from .verdict import bounds, conclusion, findings_in_detail

PRINTED = 9
"""Most columns of a table that fit a printed page; the first ones are the telling ones."""

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
        progress=progress(findings),
        conclusion=conclusion(table),
        detail=findings_in_detail(table),
        bounds=bounds(table),
        crossing=crossing(table, plots),
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
        notes=notes(table),
        protocols=protocols.all,
        measured=protocols.by_label,
        text=findings.text,
        versions=versions(findings),
        identities=identities(findings),
        single=len(findings.trials) == 1,
    )


def progress(findings: Findings) -> list[str]:
    """How far a study is, in a sentence; nothing where all of it is measured."""
    done, planned = len(findings.done), len(findings.trials)
    if done == planned:
        return []
    missing = [f"{len(findings.failed)} failed"] if findings.failed else []
    missing += [f"{findings.waiting} {'is' if findings.waiting == 1 else 'are'} waiting"] if findings.waiting else []
    return [f"{done} of {planned} trials {'is' if done == 1 else 'are'} done{''.join(f', {m}' for m in missing)}."]


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
        "printed": max(1, PRINTED - len(table.shown_axes)),
        "dense": [row for row in rows if row.dense],
        "rows": [row for row in rows if not row.dense],
    }


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
