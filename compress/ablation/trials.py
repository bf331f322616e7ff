"""The trials of a study as planned and as stored, and the key that identifies a trial."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..files.spec import PipelineSpec
from ..models.origin import READ
from ..output import printing
from ..output.folders import plain, sha256_of
from ..runs.records import RunResult

BEFORE_SHA256 = ", sha256 "

OF_TRAINING = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin")
"""Files of a checkpoint that nothing here loads."""

LONG = 2.0
"""Seconds of reading weights that are worth a line."""


@dataclass(frozen=True)
class Planned:
    """A trial that is to run."""

    number: int
    key: str
    """sha256 of :attr:`pipeline`."""
    settings: dict[str, Any]
    """Values (labels, for an axis of a free name) by axis, in axis order."""
    spec: PipelineSpec
    pipeline: dict[str, Any] = field(repr=False, default_factory=dict)
    """Everything that the trial's numbers depend on: see :func:`identity`."""

    @property
    def label(self) -> str:
        """One line that distinguishes the trial from the others: ``pp 0.4 other seed 1``."""
        return label_of(self.settings)


class StoredTrial(BaseModel):
    """A trial of the plan as the store holds it."""

    model_config = ConfigDict(frozen=True)

    number: int
    key: str
    settings: dict[str, Any]
    status: Literal["waiting", "done", "failed"]
    result: RunResult | None = None
    resolved: str | None = None
    error: str | None = None
    seconds: float | None = None
    pipeline: dict[str, Any] = Field(default_factory=dict)
    """As :attr:`Planned.pipeline`."""

    @property
    def label(self) -> str:
        """As :attr:`Planned.label`."""
        return label_of(self.settings)


def label_of(settings: Mapping[str, Any]) -> str:
    """Values in axis order; numbers whose axis is not obvious are named."""
    parts = []
    for name, value in settings.items():
        alone = isinstance(value, str) or name in ("prune.use", "prune.ratio")
        parts.append(as_text(value) if alone else f"{name.rsplit('.', 1)[-1]} {as_text(value)}")
    return " ".join(parts) or "base"


def as_text(value: Any) -> str:
    """A value of an axis as an ablation file writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def identity(spec: PipelineSpec, folder: Path) -> dict[str, Any]:
    """The resolved pipeline without its output, and without anything that changes when files are moved.

    Text files, plugin files and folders of task files are replaced by the sha256 of their content. A model folder is
    named from ``folder``, the study's, where it lies below it, with a sha256 of the files that are loaded.
    """
    data = spec.model_dump(mode="python", serialize_as_any=True)
    data.pop("output")
    folders = ("tokenizer",) if spec.model.gguf else ("name", "tokenizer")
    data["model"] |= {key: _model_folder(data["model"][key], folder) for key in folders}
    if spec.model.gguf is not None:
        place = Path(str(spec.model.name)).expanduser()
        if (place / spec.model.gguf).is_file():
            data["model"]["name"] = _relative(place, folder)
            data["model"]["gguf"] += f"{BEFORE_SHA256}{content(place / spec.model.gguf)}"
    model = data["model"]
    for section, key in ((model, "gguf"), (model, "tokenizer"), (data, "match"), (data, "architecture")):
        if section[key] is None:  # keys that version 0.1 did not have
            del section[key]
    return plain(_without_paths(data, folder))


def _model_folder(name: str | None, folder: Path) -> str | None:
    """A local model's folder without its place but with its content; another name as it is."""
    if name is None or not Path(name).is_absolute():
        return name
    return f"{_relative(Path(name), folder)}{BEFORE_SHA256}{weights(Path(name))}"


def earlier_identity(planned: Planned) -> dict[str, Any] | None:
    """What :func:`identity` was when only names and sizes of a model folder's files counted; ``None`` elsewhere."""
    name, model = planned.spec.model.name, planned.pipeline["model"]
    if name is None or not Path(name).is_absolute() or planned.spec.model.gguf is not None:
        return None
    named = model["name"].rpartition(BEFORE_SHA256)[0]
    return {**planned.pipeline, "model": {**model, "name": f"{named}{BEFORE_SHA256}{_outline(Path(name))}"}}


def key_of(pipeline: Mapping[str, Any]) -> str:
    """sha256 of the result of :func:`identity`."""
    return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()


def _without_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item, folder) for item in value]
    if isinstance(value, Path):
        return f"sha256 {content(value)}" if value.exists() else _relative(value, folder)
    return value


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else os.fspath(path)


def weights(folder: Path) -> str:
    """sha256 of the files of a model folder that are loaded, names and contents: weights, configuration, tokenizer.

    They are read again only when size or time has changed; what takes long says so.
    """
    began = time.monotonic()
    read = (path for path in folder.glob("*") if path.suffix in READ and path.name not in OF_TRAINING)
    files = sorted(path for path in read if path.is_file())
    found = hashlib.sha256("".join(f"{path.name} {content(path)}\n" for path in files).encode()).hexdigest()
    seconds = time.monotonic() - began
    if seconds > LONG:
        size = sum(path.stat().st_size for path in files) / 1e9
        printing.Bars().say(f"read {size:.1f} GB of {folder} in {seconds:.0f} s, to know trials of other weights")
    return found


def _outline(folder: Path) -> str:
    """sha256 of a model folder's configuration and of its files' names and sizes; weights are not read."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            digest.update(content(path).encode() if path.name == "config.json" else b"")
    return digest.hexdigest()


def content(path: Path) -> str:
    """sha256 of a file, or of the names and contents of all files below a folder.

    A file is read again only when its size or time has changed.
    """
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
        named = (f"{each.relative_to(path).as_posix()} {content(each)}\n" for each in files)
        return hashlib.sha256("".join(named).encode()).hexdigest()
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)
