"""Reads a pipeline file into plain data, remembering the line of every key, and applies ``--set`` to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...registry import SpecError
from .reader import Place

SMALLEST = "the smallest pipeline file is  prune: {use: pp, ratio: 0.4}"

PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


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
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"there is no {kind} {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{kind} {path} cannot be read: {error}") from None
    lines: dict[Place, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        data = None if node is None else _build(loader, node, (), lines, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
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
    try:
        return yaml.safe_load(text)
    except Exception:  # the loader also raises whatever its conversions raise, such as for dates that do not exist
        raise SpecError(f"--set {setting}: the value {text!r} is not valid YAML; put quotes around text") from None


def parse_place(dotted: str) -> Place:
    """``evaluate.0.window`` -> ``("evaluate", 0, "window")``."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


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


def _build(loader: yaml.SafeLoader, node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if len(place) > 32:
        raise SpecError(f"{path}: nested more than 32 levels deep at {'.'.join(map(str, place[:4]))}...")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN:
        raise SpecError(f"{path} line {lines[place]}: not valid YAML: the tag {node.tag} is not plain data")
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*place, index), lines, path) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, place, path)
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            where = ".".join(map(str, (*place, key)))
            raise SpecError(f"{path} line {line}: {where} is given twice (first on line {seen[key]}); keep one")
        seen[key] = line
    loader.flatten_mapping(node)
    data = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError(f"{path} line {key_node.start_mark.line + 1}: a key must be a word")
        key = _scalar(loader, key_node, place, path)
        lines[(*place, key)] = key_node.start_mark.line + 1
        data[key] = _build(loader, value_node, (*place, key), lines, path)
    return data


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, place: Place, path: Path) -> Any:
    try:
        return loader.construct_object(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # whatever a conversion raises: a date that does not exist, a tag !!int before a word
        where = f"{path} line {node.start_mark.line + 1}: {'.'.join(map(str, place))}"
        raise SpecError(f"{where}: {node.value!r} is not valid YAML ({error}); put quotes around text") from None
