"""The fields of a pipeline that a study can vary, with near matches for names that are none."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import BaseModel

from ...registry import Catalog
from ..files.reader import kind_of, role_of, visible
from ..files.spec import PipelineSpec

NOT_VARIED = {
    "output": "says where results go, which changes no number",
    "plugins": "is the same for all trials; list every plugin file in base",
}

DEEPEST = 5
"""Levels of components within components that are looked at."""


def field_names(catalog: Catalog) -> frozenset[str]:
    """Every dotted field of a pipeline file, options of all installed components included, without list places."""
    fields = (name for name in PipelineSpec.model_fields if name not in NOT_VARIED)
    return frozenset(found for name in fields for found in _below(PipelineSpec, name, name, catalog, DEEPEST))


def problem_with(field: object, known: frozenset[str]) -> str | None:
    """Why a name is no field that can be varied, with the nearest one that is; ``None`` where it is one."""
    if not isinstance(field, str):
        return f"a field is a dotted name such as prune.ratio (found {field!r})"
    first = field.split(".")[0]
    if first in NOT_VARIED:
        return f"cannot be varied: {first} {NOT_VARIED[first]}"
    if _plain(field) in known:
        return None
    return f"there is no field {field!r}{_near(field, known)}"


def _plain(field: str) -> str:
    """``evaluate.0.window`` -> ``evaluate.window``."""
    return ".".join(part for part in field.split(".") if not part.isdigit())


def _near(field: str, known: frozenset[str]) -> str:
    asked = _plain(field)
    found = get_close_matches(asked, sorted(known), n=1, cutoff=0.75)
    if not found:  # right, or nearly, but for the sections before it
        last = asked.rsplit(".", 1)[-1]
        ends: dict[str, list[str]] = {}
        for name in sorted(known, key=lambda name: (name.count("."), name != f"prune.{last}", name)):
            ends.setdefault(name.rsplit(".", 1)[-1], []).append(name)
        found = [ends[end][0] for end in get_close_matches(last, list(ends), n=1)]
    if not found:
        return "; prunekit show NAME lists the options of a component"
    name = found[0].replace("evaluate.", "evaluate.0.", 1)
    return f" (did you mean {name!r}?)"


def _below(cls: type[BaseModel], key: str, name: str, catalog: Catalog, depth: int) -> Iterator[str]:
    """A field's own name and those of everything in it."""
    yield name
    inner = kind_of(cls.model_fields[key].annotation)[0]
    if inner is None or depth == 0:
        return
    role = role_of(inner)
    classes = [inner] if role is None else [entry.component for entry in catalog.of_role(role)]
    if role is not None:
        yield f"{name}.{'use' if role == 'strategies' else 'name'}"
    for found in classes:
        for option in visible(found):
            yield from _below(found, option, f"{name}.{option}", catalog, depth - 1)
