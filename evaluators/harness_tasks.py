"""Finds and loads the tasks of lm-evaluation-harness, from lm-eval itself and from folders. Import it late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from ..registry import DataError, PrunekitError, SpecError, near
from .harness_files import Config, own_tasks, said
from .tasks import FOLDER


def load_tasks(names: Sequence[str], folders: Sequence[Path], fewshot: int | None, seed: int) -> dict[str, dict]:
    """What lm-eval's ``evaluate`` takes, for each name; relative data files are found beside their task's file.

    ``fewshot`` examples stand before each question of tasks that do not fix their number, ``seed`` says which.
    Raises :class:`SpecError` for a name that lm-eval does not know and a task that it cannot use, and
    :class:`DataError` where a task's data cannot be had.
    """
    folders = (FOLDER, *folders)
    own = own_tasks(folders)
    manager = _manager(names, folders, tuple(own))
    loaded = {}
    with _data_beside(own):
        for name in names:
            try:
                loaded[name] = manager.load([name])
            except PrunekitError:
                raise
            except Exception as error:
                raise SpecError(
                    f"zero_shot.tasks: lm-eval cannot load {name!r}: {said(error)}; mend its file"
                ) from error
    for found in loaded.values():
        for task in found["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (fewshot is not None and fixed != 0):
                task.set_config(key="num_fewshot", value=fewshot or 0)
            task.set_fewshot_seed(seed=seed)
    return loaded


def indexed_configs(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Config]:
    """Settings of the tasks behind ``names`` as lm-eval's index has them; no task is loaded, nor its data.

    Raises :class:`SpecError` for a name that lm-eval does not know.
    """
    folders = (FOLDER, *folders)
    index = _manager(names, folders, tuple(own_tasks(folders))).task_index
    found: dict[str, Config] = {}
    asked, seen = list(names), set()
    while asked:
        entry = index.get(asked.pop())
        if entry is None or entry.name in seen:  # a group's member may be more than a name: left to loading
            continue
        seen.add(entry.name)
        if entry.kind.name == "TAG":
            asked += sorted(entry.tags)
        elif entry.kind.name == "GROUP":
            members = entry.cfg.get("task")
            asked += [name for name in members if isinstance(name, str)] if isinstance(members, list) else []
        else:
            found[entry.name] = entry.cfg
    return found


def _manager(names: Sequence[str], folders: tuple[Path, ...], own: tuple[str, ...]) -> TaskManager:
    """An index that knows all names. Reading lm-eval's own takes seconds, so it is left out where nothing needs it."""
    ours = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if set(names) <= {*ours.all_subtasks, *ours.all_tags}:
        return ours
    manager = _everything(folders, own)
    for name in names:
        if name not in manager.all_tasks:
            raise SpecError(
                f"zero_shot.tasks: lm-eval knows no task or group {name!r}{near(name, manager.all_tasks)}; "
                "`lm_eval ls tasks` lists its own, and task_folder adds yours"
            )
    return manager


@lru_cache(maxsize=2)
def _everything(folders: tuple[Path, ...], own: tuple[str, ...]) -> TaskManager:
    """lm-eval's tasks and those of the folders, read again where the folders define other tasks than before."""
    return TaskManager(include_path=[str(folder) for folder in folders])


@contextmanager
def _data_beside(files: Mapping[str, Path]) -> Iterator[None]:
    """Within it tasks that are built look for relative data files beside their own file.

    lm-eval itself looks from the current folder, and hands a task its options only, not where they come from.
    """
    stock = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(dataset_kwargs or {})
        if task.config.task in files:
            folder = files[task.config.task].parent
            options.update(
                {key: _located(options[key], folder) for key in ("data_files", "data_dir") if key in options}
            )
        try:
            stock(task, options, **kwargs)
        except Exception as error:
            name, source = task.config.task, (task.config.dataset_path, task.config.dataset_name)
            source = " ".join(str(part) for part in source if part)
            raise DataError(
                f"zero_shot: the data of task {name} ({source}) cannot be loaded: {said(error)}; without a "
                "network, fetch it once where there is one, or describe a local copy in a task_folder"
            ) from error

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = stock


def _located(files: Any, folder: Path) -> Any:
    """Paths of data files, however nested, from ``folder``; addresses stay as they are."""
    if isinstance(files, Mapping):
        return {key: _located(value, folder) for key, value in files.items()}
    if isinstance(files, (list, tuple)):
        return [_located(value, folder) for value in files]
    if not isinstance(files, str) or "://" in files:
        return files
    return str(folder / Path(files).expanduser())
