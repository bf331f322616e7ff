"""The part of the Ray engine that runs on the cluster's machines."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ...registry import PrunekitError
from ..files.spec import PipelineSpec
from .worker import Outcome, Worker, read_trial


class Place(NamedTuple):
    """The name of a worker's machine, and what makes the machine unfit for the study."""

    host: str
    problem: str | None


class RemoteWorker:
    """A :class:`Worker` in a process of its own on a machine of the cluster."""

    def __init__(self, threads: int, gpu: bool):
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or device: auto would find one that Ray has not assigned to it
        torch.set_num_threads(threads)
        self._worker = Worker()

    def start(self, version: str, files: Sequence[Path], trial: str) -> Place:
        """Where the worker is, and what is wrong there: another prunekit, missing files, plugins that fail."""
        return Place(socket.gethostname(), unfitness(version, files, trial))

    def run(self, trial: str) -> Outcome:
        """Run one trial, given as its pipeline file."""
        try:
            spec = read_trial(trial)
        except PrunekitError as mistake:
            return Outcome(None, None, str(mistake), 0.0)
        return self._worker.run(spec)


def unfitness(version: str, files: Sequence[Path], trial: str) -> str | None:
    """Why this machine cannot run a study of prunekit ``version`` that names ``files``; ``None`` if it can."""
    if version != __version__:
        return f"it has prunekit {__version__}, the study is run by {version}; install the same everywhere"
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        return (
            f"it has no {', no '.join(missing)}; put the study's files on storage that all machines see under the "
            "same path, or copy them there"
        )
    try:
        read_trial(trial)
    except PrunekitError as mistake:
        return str(mistake)
    return None


def files_of(spec: PipelineSpec) -> set[Path]:
    """Every file and folder of this machine that a trial reads: plugins, model, texts, tasks."""
    data = spec.model_dump(mode="python", serialize_as_any=True, exclude={"output"})
    del data["model"]["offload_folder"]  # written, like the output
    return set(_files(data))


def _files(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _files(item)
    elif isinstance(value, (str, Path)) and os.path.isabs(value) and os.path.exists(value):
        yield Path(value)
