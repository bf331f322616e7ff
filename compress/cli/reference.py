"""The YAML reference: a page with every key of pipeline and ablation files, made from the classes that read them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ...registry import ROLES, Catalog, Component, Strategy, TextSource
from ..ablation.published import Published
from ..ablation.study import StudyFile
from ..files.reader import kind_of, role_in, role_of, visible
from ..files.spec import DEFAULT_EVALUATORS, PipelineSpec
from ..output.records import Of
from .listing import bounds, default_text, type_name
from .schema import MEANING_OF, NO_OPTION

HEAD = """\
# YAML reference

Every key of pipeline files and [ablation files](#ablation-file): its type, its default and its meaning.
[Pipeline files](pipeline-files.md) and [ablations](ablations.md) explain them with examples. This page is what
`prunekit schema --markdown --built-in` prints; without `--built-in` it also has what installed plugins bring. As JSON
Schemas, [for editors](pipeline-files.md#in-an-editor): [pipeline files](schema/pipeline.schema.json),
[ablation files](schema/ablation.schema.json).

A component is written as its name (`scorer: wanda_sp`), or with options (`merger: {name: fixed_ratio, probe: 0.3}`).
Without a name the options change the strategy's own component (`selector: {rows: 0.1}`). In the section `prune` the key
`use` names the strategy.
"""
WORDS = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`", "Path": "path"}
WORDS |= {"mapping": "mapping", "Any": "any value"}
Row = tuple[str, str, str, str]
"""Key, type, default and meaning."""


def reference(catalog: Catalog) -> str:
    """The page as Markdown, with the components of a catalog."""
    lines = [HEAD, *section("Pipeline file", PipelineSpec), *section("Ablation file", StudyFile)]
    for cls, title in SECTIONS.items():
        lines += section(f"`{title}`", cls)
    for role in (role for role in ROLES if role not in NO_OPTION):
        lines += components(role, [entry.component for entry in catalog.of_role(role)])
    return "\n".join(lines[:-1]) + "\n"


def sections(cls: type[BaseModel]) -> dict[type[BaseModel], str]:
    """The mappings that are not components among a class's fields, each with its key."""
    kinds = {kind_of(info.annotation)[0]: key for key, info in cls.model_fields.items()}
    return {kind: key for kind, key in kinds.items() if kind and role_of(kind) is None}


SECTIONS = sections(PipelineSpec) | sections(Strategy) | {TextSource: "text", Published: "published"}
"""A class whose keys have a section of the page, and its title."""


def section(title: str, cls: type[BaseModel]) -> list[str]:
    """Title, first sentence and table of a class."""
    return [f"## {title}", "", summary(cls), "", *table(rows(cls)), ""]


def components(role: str, classes: Sequence[type[Component]]) -> list[str]:
    """The components of a role, a section each; of strategies, the options that all have come first, in one table."""
    lines = [f"## {titled(role)}", "", summary(ROLES[role]), ""]
    base = {row[0]: row for row in rows(Strategy)} if role == "strategies" else {}
    if base:
        choices = " or ".join(f"`{name}`" for name in get_args(Of))
        lines += [*table([*base.values(), ("of", choices, "`units`", MEANING_OF)]), ""]
    for cls in classes:
        lines += [f"### `{cls.model_fields['name'].default}`", "", summary(cls), ""]
        found = rows(cls)
        defaults = [f"`{row[0]}: {row[2].strip('`')}`" for row in found if row[0] in base and row[2] != base[row[0]][2]]
        lines += [f"Its own defaults: {', '.join(defaults)}.", ""] if defaults else []
        own = [row for row in found if row[0] not in base]
        lines += [*table(own), ""] if own else []
    return lines


def rows(cls: type[BaseModel]) -> list[Row]:
    """The options of a class."""
    fields = {key: cls.model_fields[key] for key in visible(cls)}
    return [(key, kind(info), default(cls, key, info), meaning(info)) for key, info in fields.items()]


def table(found: Sequence[Row]) -> list[str]:
    """A table of options."""
    lines = [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in found]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *lines]


def kind(info: FieldInfo) -> str:
    """The type of an option in words, with a link to the section that describes it."""
    cls, optional, many = kind_of(info.annotation)
    role = role_in(info.annotation)
    if cls is not None and (role or cls in SECTIONS):
        title = titled(role) if role else SECTIONS[cls]
        link = f"[{cls.__name__ if role else title}](#{title.lower().replace(' ', '-')})"
        return "list of " * many + link + " or `null`" * optional
    parts = re.sub(r"(list of tuple|dict)\[.*\]", "mapping", type_name(info)).split(" | ")
    return " or ".join(word(part) for part in parts)


def word(name: str) -> str:
    """The name of a type in words; a value that may be chosen stays as it is."""
    if name.startswith("list of "):
        return f"list of {word(name.removeprefix('list of '))}s"
    return WORDS.get(name, f"`{name}`")


def default(cls: type[BaseModel], key: str, info: FieldInfo) -> str:
    """The default of an option, as a file would write it."""
    if (cls, key) == (PipelineSpec, "evaluate"):
        return f"`[{', '.join(DEFAULT_EVALUATORS)}]`"
    if issubclass(cls, Strategy) and key == "ratio" and info.default is None:
        return "required, unless the allocator takes none"
    if info.is_required():
        return "required" if cls is not Strategy else "each strategy's own"
    written = default_text(info).removeprefix(", default ")
    return "its defaults" if written == "{}" and kind_of(info.annotation)[0] else f"`{written}`"


def meaning(info: FieldInfo) -> str:
    """What an option does, and its range."""
    role = role_in(info.annotation)
    about = prose(info.description or "") or (summary(ROLES[role]).rstrip(".") if role else "")
    limits = bounds(info).replace(str(2**63), "2^63")
    return "; ".join(part for part in (about, limits) if part).replace("|", "\\|")


def summary(cls: type) -> str:
    """The first paragraph of a docstring."""
    return prose(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0])


def prose(text: str) -> str:
    """Text of a docstring as Markdown, in one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def titled(role: str) -> str:
    """A role as a title."""
    return role.replace("_", " ").capitalize()
