"""Reads a pipeline file into plain data, remembering the line of every key, and applies ``--set`` to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output.reading import brief, read_text
from .reader import Place
from .yaml_plain import plain_data

SMALLEST = "the smallest pipeline file is  prune: {use: pp, ratio: 0.4}"


@dataclass
class YamlFile:
    """A YAML file as plain data, with the line of every place in it."""

    path: Path
    text: str
    data: dict[str, Any]
    lines: dict[Place, int]

    @property
    def is_study(self) -> bool:
        """Whether it is an ablation file, not a pipeline file."""
        return "prune" not in self.data and any(key in self.data for key in ("base", "vary", "trials"))

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.resolve().parent

    def line(self, place: Place) -> int | None:
        """The line of a place, else of the nearest place around it."""
        return next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)


def read_yaml(path: str | Path | YamlFile, kind: str = "pipeline file", smallest: str = SMALLEST) -> YamlFile:
    """A YAML file, read unless it is already; raises :class:`SpecError`.

    Only plain data is built, and a key given twice is refused where YAML itself would silently keep the last.
    """
    if isinstance(path, YamlFile):
        return path
    path = Path(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise SpecError(f"there is no {kind} {path}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{kind} {path} cannot be read: {error}") from None
    lines: dict[Place, int] = {}
    data = plain_data(text, str(path), lines)
    if data is None:
        raise SpecError(f"{kind} {path} is empty; {smallest}")
    if not isinstance(data, dict):
        raise SpecError(f"{kind} {path} must be a mapping of sections, found {data!r:.60}; {smallest}")
    return YamlFile(path, text, data, lines)


def apply_settings(data: dict[str, Any], settings: Iterable[str]) -> list[Place]:
    """Change ``data`` by settings such as ``prune.ratio=0.2``, values read as YAML; returns the changed places.

    Numbers in the path are list places; a component given by its bare name becomes a mapping when one of
    its options is set. Raises :class:`SpecError`.
    """
    places = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", path):
            raise SpecError(f"--set {setting}: write a path, an equals sign and a value, such as prune.ratio=0.2")
        place = parse_place(path)
        set_at(data, place, yaml_value(setting, text), f"--set {setting}")
        places.append(place)
    return places


def yaml_value(setting: str, text: str) -> Any:
    """The value of a ``--set`` option; raises :class:`SpecError`."""
    return plain_data(text, f"--set {brief(setting)}")


def parse_place(dotted: str) -> Place:
    """``evaluate.0.window`` -> ``("evaluate", 0, "window")``."""
    return tuple(
        int(part) if part.isascii() and part.isdigit() and len(part) < 10 else part for part in dotted.split(".")
    )


def set_at(data: dict[str, Any], place: Place, value: Any, label: str) -> None:
    """Set a value of nested mappings and lists, at the keys and indices of ``place``.

    Raises :class:`SpecError`, with a message that begins with ``label``, where there is no such place.
    """
    at: Any = data
    for depth, part in enumerate(place):
        here = ".".join(map(str, place[:depth])) or "the file"
        last = depth == len(place) - 1
        if isinstance(at, list):
            if not isinstance(part, int) or part > len(at):
                raise SpecError(f"{label}: {here} is a list of {len(at)}, there is no place {part!r}")
            if part == len(at):
                at.append({})
        elif isinstance(at, dict):
            if at.get(part) is None:
                at[part] = [] if not last and isinstance(place[depth + 1], int) else {}
        else:
            raise SpecError(f"{label}: {here} is {at!r}, which has no {part!r}")
        if last:
            at[part] = value
        elif isinstance(at[part], str):
            at[part] = {"use" if place[: depth + 1] == ("prune",) else "name": at[part]}
        at = at[part]
