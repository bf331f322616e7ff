"""Runs trials one after the other; the model is loaded, and the dense model measured, once for all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from ...registry import Catalog, PluginError, PrunekitError
from ..calibration.passes import Progress, no_progress
from ..calibration.shared import SharedStatistics
from ..files.spec import PipelineSpec
from ..files.yaml_plain import plain_data
from ..models.loading import Loaded, load
from ..models.source import ModelSource
from ..output.failures import blamed, described, explained
from ..recovery.in_pipeline import Pipeline
from ..runs.measuring import Known
from ..runs.records import RunResult
from .trials import Planned


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with a ``result`` and the resolved pipeline, or with an ``error``."""

    result: RunResult | None
    resolved: str | None
    error: str | None
    seconds: float


class Watch(Protocol):
    """Follows an engine's trials."""

    def progress(self, items: Iterable[Any], label: str, total: int, /) -> Iterable[Any]:
        """``items``, the steps within the current trial, for engines that run one trial at a time in this process."""
        ...

    def started(self, planned: Planned) -> None: ...

    def finished(self, planned: Planned, outcome: Outcome) -> None: ...


def run_local(
    planned: Sequence[Planned],
    record: Callable[[Planned, Outcome], None],
    watch: Watch,
    journal: Path | None = None,
) -> None:
    """Run trials in this process and ``record`` each as it ends; an error of ``record`` ends the run.

    What allocators measure is written to the file ``journal``, where there is one, and read from it.

    Trials of one model run in a row, and among them those of one calibration text, so that each model is loaded once.
    """
    worker = Worker(journal)
    for trial in in_order(planned):
        watch.started(trial)
        outcome = worker.run(trial.spec, watch.progress)
        record(trial, outcome)
        watch.finished(trial, outcome)


def in_order(planned: Sequence[Planned]) -> list[Planned]:
    """Models in the order of their first trials, then calibrations in theirs, then as planned."""
    first: dict[object, int] = {}
    for trial in planned:
        first.setdefault(trial.spec.model, trial.number)
        first.setdefault((trial.spec.model, trial.spec.calibration), trial.number)

    def place(trial: Planned) -> tuple[int, int, int]:
        model, text = trial.spec.model, trial.spec.calibration
        return first[model], first[model, text], trial.number

    return sorted(planned, key=place)


class Worker:
    """One loaded model, its dense measurements and shared calibration statistics."""

    def __init__(self, journal: Path | None = None) -> None:
        self._source: ModelSource | None = None
        self._loaded: Loaded | None = None
        self._dense: Known = {}
        self._journal = journal
        self._statistics = SharedStatistics(journal=journal)

    def run(self, spec: PipelineSpec, progress: Progress = no_progress) -> Outcome:
        """Run one trial; the model is loaded for the first, and again only for another ``spec.model``.

        Raises only KeyboardInterrupt and SystemExit; every other error becomes :attr:`Outcome.error`: the message of a
        :class:`PrunekitError`, or else kind, message and place.
        """
        began = time.perf_counter()
        result: RunResult | None = None
        resolved: str | None = None
        error: str | None = None
        try:
            results = Pipeline(spec).measure(progress, self._model(spec.model), self._dense, self._statistics)
            result, resolved = results.record, results.resolved
        except PrunekitError as mistake:
            error = str(mistake)
            if isinstance(mistake, PluginError):
                self._source = None  # the plugin may have changed the model
        except Exception as failure:  # whatever it is, it must not stop the other trials
            error = explained(failure) or blamed(failure) or described(failure)
        if error is not None:
            gc.collect()  # the failed trial's tensors, which its traceback held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return Outcome(result, resolved, error, round(time.perf_counter() - began, 3))

    def _model(self, source: ModelSource) -> Loaded:
        if self._loaded is None or source != self._source:
            self._loaded, self._dense, self._statistics = None, {}, SharedStatistics(journal=self._journal)
            gc.collect()  # room for the next one
            self._loaded, self._source = load(source), source
        return self._loaded


def read_trial(text: str) -> PipelineSpec:
    """The trial's spec from its YAML, in a process that has not read the study.

    Trials with the same plugin files share their classes, so that dense measurements are found again.
    """
    data = plain_data(text, "trial")
    return PipelineSpec.of(data, catalog=_catalog(tuple(map(Path, data.get("plugins") or ()))))


@lru_cache(maxsize=8)
def _catalog(files: tuple[Path, ...]) -> Catalog:
    return Catalog.discover(files)
