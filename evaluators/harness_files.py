"""What task files of lm-evaluation-harness say, read without lm-eval, whose import and index take seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..registry import SpecError
from .tasks import FOLDER

Config = Mapping[str, Any]
"""A task's settings as its file and those that it includes give them; functions are None."""


class _Plain(yaml.SafeLoader):
    """Reads task files without running the functions that they name."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def own_tasks(folders: Sequence[Path]) -> dict[str, Path]:
    """The tasks that the folders define, and the file of each; raises SpecError for a file that is no YAML."""
    found = {}
    for path in [path for folder in folders for path in sorted(folder.rglob("*.yaml"))]:
        data = _read(path)
        if isinstance(data, Mapping) and isinstance(data.get("task"), str) and "group" not in data:
            found[data["task"]] = path
    return found


def own_configs(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Config] | None:
    """Settings of the tasks behind ``names``, where the bundled tasks and ``folders`` have all of them, else None.

    A name is a task or a tag; what a group holds may lie elsewhere, so that it is None. Raises SpecError for a file
    that is no YAML or includes one that cannot be read.
    """
    asked, found = set(names), set()
    configs: dict[str, Config] = {}
    for task, path in own_tasks((FOLDER, *folders)).items():
        try:
            config = _with_included(path)
        except SpecError:
            if task in asked:
                raise
            continue
        tags = config.get("tag") or ()
        mine = asked & {task, *((tags,) if isinstance(tags, str) else tags)}
        if mine:
            configs[task] = config
            found |= mine
    return configs if found == asked else None


def metrics_of(config: Config) -> list[str] | None:
    """Names of the metrics that a task has; None where its file does not tell."""
    listed = config.get("metric_list")
    if config.keys() & {"class", "process_results"} or config.get("output_type") == "generate_until" or not listed:
        return None
    names = [metric.get("metric") if isinstance(metric, Mapping) else None for metric in listed]
    # A function's name is known only once it is loaded; lm-eval's index has its file's path in its place.
    return names if all(isinstance(name, str) and "/" not in name and "\\" not in name for name in names) else None


def said(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_bytes(), Loader=_Plain)
    except yaml.YAMLError as error:
        raise SpecError(f"zero_shot.task_folder: {path} is not valid YAML: {said(error)}") from None


def _with_included(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's settings over those of the files that it includes, the last of them first."""
    if path in above:
        raise SpecError(f"zero_shot.task_folder: {path} includes itself, by way of {above[-1]}; mend its include")
    try:
        data = _read(path)
    except OSError as error:
        raise SpecError(
            f"zero_shot.task_folder: {above[-1]} includes {path}, which cannot be read ({said(error)}); put it there, "
            "or mend include"
        ) from None
    own = dict(data) if isinstance(data, Mapping) else {}
    merged: dict[str, Any] = {}
    included = own.pop("include", None) or ()
    for name in (included,) if isinstance(included, str) else included:
        merged |= _with_included(path.parent / name, (*above, path))
    return merged | own
