"""What ``prunekit list`` and ``prunekit show`` print of the installed components."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from ...registry import ROLES, Catalog, Chooser, Component, Entry, SpecError, near
from ..files.reader import kind_of, role_in, visible
from ..output import printing

SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def show_list(catalog: Catalog, role: str | None = None) -> None:
    """Print the components of one role or of all; raises :class:`SpecError` for an unknown role."""
    if role is not None and role not in ROLES:
        raise SpecError(f"there is no role {role!r}{near(role, ROLES)}; there are {', '.join(ROLES)}")
    for each in [role] if role else ROLES:
        entries = catalog.of_role(each)
        rows = [(entry.name, _line(entry.component), entry.provider) for entry in entries]
        printing.show_table((each, "", "provided by"), rows, left=3)


def _line(component: type[Component]) -> str:
    """What a component does, in one line."""
    return f"{'Chooser: ' * issubclass(component, Chooser)}{component.summary()}".replace("``", "")


def show_component(catalog: Catalog, name: str) -> None:
    """Print all components called ``name``.

    Raises :class:`SpecError` if there is none, :class:`PluginError` if several plugins provide it.
    """
    for role in ROLES:
        if name in catalog.names(role):
            catalog.get(role, name)  # raises PluginError if several plugins provide it
    found = [entry for role in ROLES for entry in catalog.of_role(role) if entry.name == name]
    if not found:
        every = sorted({entry.name for entry in catalog.entries})
        raise SpecError(f"nothing is called {name!r}{near(name, every)}; prunekit list names everything")
    for entry in found:
        _show(entry)


def _show(entry: Entry) -> None:
    component = entry.component
    chooser = issubclass(component, Chooser)
    title = "Chooser (a scorer that orders units jointly)" if chooser else ROLES[entry.role].__name__
    printing.out.print(f"[bold]{entry.name}[/bold]  {title}, from {entry.provider}", highlight=False)
    _say(component.summary(), 2)
    if entry.import_line:
        _say(f"In Python: {entry.import_line}", 2)
    if component.paper:
        _say(f"Paper: {component.paper}", 2)
    for key in visible(component):
        info = component.model_fields[key]
        written = type_name(info) + default_text(info)
        if entry.role == "strategies" and key == "ratio" and info.default is None:
            written = "float, required (unless the allocator takes none)"
        printing.out.print(f"\n  [bold]{key}[/bold]: {escape(written)}", highlight=False)
        _say(about(info), 6)
    printing.out.print()


def _say(text: str, indent: int) -> None:
    if text:
        printing.out.print(Padding(Text(text), (0, 0, 0, indent)))


def about(info: FieldInfo) -> str:
    """An option's description, its range, and the command that lists its choices."""
    role = role_in(info.annotation)
    choices = None if role is None else f"choices: prunekit list {role}"
    return "; ".join(part for part in (info.description, bounds(info), choices) if part)


def bounds(info: FieldInfo) -> str:
    """The range of an option, such as ``>= 0 and < 1``; empty for an option without one."""
    found = [f"{sign} {getattr(limit, key)}" for limit in info.metadata for key, sign in SIGNS if hasattr(limit, key)]
    return " and ".join(found)


def type_name(info: FieldInfo) -> str:
    """An option's type as text: a role's title, the choices of a literal, ``int``."""
    cls, optional, _ = kind_of(info.annotation)
    if cls is not None:
        return cls.__name__ + (" | null" if optional else "")
    annotation: Any = info.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(typing|pathlib|collections\.abc|builtins)\.", "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 | null", text)
    return text.replace("NoneType", "null").replace("None", "null")


def default_text(info: FieldInfo) -> str:
    """An option's default as a pipeline file would write it."""
    if info.is_required():
        return ", required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, Component):
        options = {key: getattr(value, key) for key in visible(type(value)) if key in value.model_fields_set}
        value = {"name": value.name, **options} if options else value.name
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    elif isinstance(value, tuple):
        value = [each.model_dump(mode="json") if isinstance(each, BaseModel) else each for each in value]
    if isinstance(value, str) and "\n" in value:
        return f", default {json.dumps(value)}"
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return ", default " + written.removesuffix("\n").removesuffix("...").strip()
