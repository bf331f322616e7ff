"""Reads an ablation file and its base into plain data, remembering where everything was said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...registry import SpecError, near
from ..files.reader import Place
from ..files.spec import DEFAULT_EVALUATORS, PipelineSpec
from ..files.yaml_file import apply_settings, read_yaml

SMALLEST = "the smallest ablation file is  {base: {prune: {use: pp}}, vary: {prune.ratio: [0.2, 0.4]}}"


@dataclass
class Source:
    """An ablation file as plain data, ``--set`` applied."""

    path: Path
    text: str
    data: dict[str, Any]
    lines: dict[Place, int]
    base: dict[str, Any] = field(default_factory=dict)
    base_path: Path | None = None
    changed: list[Place] = field(default_factory=list)
    """Places of the base that ``--set`` has changed."""
    changed_axes: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.resolve().parent

    @property
    def plugins(self) -> list[Path]:
        """The base's plugin files; raises :class:`SpecError` where they are no list of files."""
        listed = self.base.get("plugins") or []
        if not (isinstance(listed, list) and all(isinstance(item, str) for item in listed)):
            where = self.at(("base", "plugins"))
            raise SpecError(f"{self.path}: {where}base.plugins: expected a list of Python files (found {listed!r})")
        return [_absolute(item, self.folder) for item in listed]

    def axes(self) -> dict[Any, Any]:
        """``vary``; empty where it is absent or no mapping."""
        found = self.data.get("vary")
        return found if isinstance(found, dict) else {}

    def entries(self, key: str) -> dict[int, dict[Any, Any]]:
        """The mappings in ``exclude`` or ``trials``, by their places; what is no mapping is left out."""
        found = self.data.get(key)
        items = enumerate(found if isinstance(found, list) else ())
        return {index: item for index, item in items if isinstance(item, dict)}

    def at(self, place: Place) -> str:
        """Where in which file something is said, as a mistake begins."""
        if place[:1] == ("base",) and any(place[1 : 1 + len(changed)] == changed for changed in self.changed):
            return "--set "
        if place[:1] == ("vary",) and place[1:2] and place[1] in self.changed_axes:
            return "--set "
        known = self._line(place)
        if known is None:
            return ""
        inside = f"{self.base_path} " if self.base_path and place[:1] == ("base",) and len(place) > 1 else ""
        return f"{inside}line {known}: "

    def order(self, place: Place) -> tuple[bool, int]:
        """By line; what is in the base's own file comes last."""
        return bool(self.base_path) and place[:1] == ("base",), self._line(place) or 0

    def _line(self, place: Place) -> int | None:
        return next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)


def read_study(path: Path, settings: Iterable[str] = ()) -> Source:
    """The file and its base; raises :class:`SpecError` for files that cannot be read and settings that cannot be made.

    A setting changes the base (``prune.ratio=0.2``), an axis (``vary.prune.ratio=[0.2]``, null for none) or the title.
    """
    data, lines = read_yaml(path, "ablation file", SMALLEST)
    source = Source(path, path.read_text(encoding="utf-8"), data, lines)
    for key in [key for key, value in data.items() if value is None]:
        del data[key]
    base = data.get("base")
    if isinstance(base, str):
        source.base_path = _absolute(base, source.folder)
        try:
            base, below = read_yaml(source.base_path)
        except SpecError as error:
            raise SpecError(f"{path}: {source.at(('base',))}base: {error}") from None
        lines.update({("base", *place): line for place, line in below.items() if place})
        base = _anchored(base, source.base_path.parent)
    elif base is None:
        raise SpecError(
            f"{path}: base: is required: a pipeline or a pipeline file's path, such as base: {{prune: {{use: pp}}}}"
        )
    elif not isinstance(base, Mapping):
        expected = f"base: expected a pipeline, or a pipeline file's path (found {base!r:.60})"
        raise SpecError(f"{path}: {source.at(('base',))}{expected}")
    source.base = dict(base)
    if source.base.get("evaluate") is None:
        source.base["evaluate"] = list(DEFAULT_EVALUATORS)
    for setting in settings:
        _apply(source, setting)
    for section in [key for key, value in source.base.items() if value is None]:
        del source.base[section]
    return source


def _apply(source: Source, setting: str) -> None:
    name, equals, text = setting.partition("=")
    head, _, rest = name.partition(".")
    if head in PipelineSpec.model_fields:
        source.changed += apply_settings(source.base, [setting])
        return
    if not equals or not (name == "title" or (head == "vary" and rest)):
        known = [*PipelineSpec.model_fields, "vary.AXIS", "title"]
        raise SpecError(f"--set {setting}: there is no {name!r}{near(head, known)}; there are {', '.join(known)}")
    try:
        value = yaml.safe_load(text)
    except Exception:  # conversions of the loader raise what they like
        raise SpecError(f"--set {setting}: the value {text!r} is not valid YAML; put quotes around text") from None
    if name == "title":
        source.data["title"] = value
        return
    source.changed_axes.add(rest)
    axes = source.data.setdefault("vary", {})
    if isinstance(axes, dict):
        axes[rest] = value
        if value is None:
            del axes[rest]


def _anchored(value: Any, folder: Path, key: Any = None) -> Any:
    """A base of its own file with its paths made absolute: they start at that file's folder, not at the study's."""
    if isinstance(value, dict):
        found = {inner: _anchored(item, folder, inner) for inner, item in value.items()}
        name = found.get("name")
        if key == "model" and isinstance(name, str) and (folder / name).is_dir():
            found["name"] = str(_absolute(name, folder))
        return found
    if isinstance(value, list):
        return [_anchored(item, folder, key) for item in value]
    return str(_absolute(value, folder)) if key in ("file", "plugins") and isinstance(value, str) else value


def _absolute(path: str | Path, folder: Path) -> Path:
    return (folder / Path(path).expanduser()).resolve()
