"""Reads a study's store, a run's folder or the demo's folder into one frame of trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ...registry import SpecError
from ..ablation.published import Published
from ..ablation.store import Store
from ..files.dotted import resolved_text
from ..output import printing
from ..output.reading import brief, opened
from ..runs.records import REMEDY, ComparedRun, Comparison, EvaluatorResult, RunResult, read_results
from .axes import RATIO, USE, called, named_text, setting_text

SQLITE = b"SQLite format 3\0"

RELATIVE = {
    ("cost", "flops_ratio"), ("cost", "decoder_flops_ratio"), ("cost", "floor_ratio"),
    ("cost", "parameters_ratio"),
    ("latency", "prefill_ratio"), ("latency", "decode_ratio"),
}  # fmt: skip
"""Evaluator and value, of values that the evaluator measures relative to the dense model."""

CUT, PARAMETERS = "cut", "prunable_parameters"
"""Label and name of a trial's achieved cut."""


@dataclass(frozen=True)
class Trial:
    """One pruned model and its measurements."""

    number: int
    settings: dict[str, Any]
    """Value or label by axis."""
    status: str = "done"
    """``done``, ``failed`` or ``waiting``."""
    result: RunResult | None = None
    """The results of a trial that is done."""
    resolved: str | None = None
    error: str | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        """All settings: ``PP (40%, seed = 0)``."""
        return called([named_text(name, value) for name, value in self.settings.items()] or ["the run"])

    @property
    def metrics(self) -> list[EvaluatorResult]:
        """One result for each evaluator that ran."""
        return self.result.metrics if self.result else []

    def metric(self, label: str) -> EvaluatorResult | None:
        """The result of the evaluator with this label, if it ran."""
        return next((found for found in self.metrics if found.label == label), None)


@dataclass(frozen=True)
class Study:
    """All trials of a report's source."""

    title: str
    source: Path
    trials: tuple[Trial, ...]
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """The values of each axis, in order."""
    published: tuple[Published, ...] = ()
    text: str | None = None
    """The study's file, or the run's resolved pipeline."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.result]

    @property
    def results(self) -> list[RunResult]:
        """The results of all finished trials."""
        return [trial.result for trial in self.trials if trial.result]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "failed"]

    @property
    def waiting(self) -> int:
        return sum(trial.status == "waiting" for trial in self.trials)

    @property
    def progress(self) -> str:
        """``2 of 4 trials done, 1 failed, 1 waiting``."""
        parts = [f"{len(self.done)} of {len(self.trials)} trials done"]
        counts = {"failed": len(self.failed), "waiting": self.waiting}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(parts)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row for each trial, in order, as measured.

        Columns have two levels: ``trial`` (trial, status, error, seconds), ``setting`` (axis), and ``pruned`` and
        ``dense`` (label.value). A value relative to the dense model is 1 there.
        """
        facts, pruned, dense = [], [], []
        for trial in self.trials:
            facts.append(
                {"trial": trial.number, "status": trial.status, "error": trial.error, "seconds": trial.seconds}
            )
            ratio = trial.result.ratio if trial.result else None
            cut: dict[str, Any] = {f"{CUT}.{PARAMETERS}": ratio.parameters_cut} if ratio else {}
            uncut: dict[str, Any] = dict.fromkeys(cut, 0.0)
            pruned.append(cut | {f"{m.label}.{name}": value for m in trial.metrics for name, value in m.pruned.items()})
            dense.append(uncut | {
                f"{m.label}.{name}": (m.dense or {}).get(name, 1.0 if (m.evaluator, name) in RELATIVE else None)
                for m in trial.metrics for name in m.pruned
            })  # fmt: skip
        parts = {"trial": facts, "setting": [trial.settings for trial in self.trials], "pruned": pruned, "dense": dense}
        return pd.concat({name: pd.DataFrame(rows, dtype=object) for name, rows in parts.items()}, axis=1)


def read(source: Path) -> Study:
    """The trials of a store or folder; raises :class:`SpecError` if it is neither, or no trial is finished."""
    source = Path(source).expanduser()
    if source.is_dir():
        study = _folder(source)
    elif source.is_file():
        study = _store(source)
    else:
        raise SpecError(f"there is no {source}; {REMEDY}")
    if not study.done:
        first = f"; the first error: {study.failed[0].error}" if study.failed else ""
        raise SpecError(f"{source}: no trial is finished ({study.progress}), so there is nothing to report{first}")
    return study


def _folder(folder: Path) -> Study:
    found = read_results(folder)
    runs = found.runs if isinstance(found, Comparison) else [found]
    trials = []
    for number, run in enumerate(runs, 1):
        settings: dict[str, Any] = {USE: run.strategy, RATIO: run.ratio.asked}
        path = folder / "resolved.yaml"
        if isinstance(run, ComparedRun):
            settings["text"], path = run.situation, _within(folder, run.pipeline)
        text = resolved_text(path)
        trials.append(Trial(number, settings, "done", run, text, None, run.seconds.total))
    if isinstance(found, Comparison):
        names = trials[0].settings if trials else {}
        axes = {name: list(dict.fromkeys(trial.settings[name] for trial in trials)) for name in names}
        return Study("Strategies compared", folder, tuple(trials), axes)
    title = f"{setting_text(USE, found.strategy)} on {found.model.name}"
    return Study(title, folder, tuple(trials), text=trials[0].resolved)


def _within(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SpecError(f"{folder / 'results.json'} names {brief(name)}, which is outside of the folder; {REMEDY}")
    return path


def _store(path: Path) -> Study:
    try:
        with opened(path) as file:
            begin = file.read(len(SQLITE))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    if begin != SQLITE:
        raise SpecError(f"{path} is not a study's store; {REMEDY}")
    with Store.open(path) as store:
        study, stored = store.study, store.trials
    for sentence in store.damaged:
        printing.warning(sentence)
    trials = tuple(Trial(t.number, t.settings, t.status, t.result, t.resolved, t.error, t.seconds) for t in stored)
    title = study.title or path.stem
    return Study(title, path, trials, study.axes, study.published, study.text, study.versions)
