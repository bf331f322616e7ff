"""The engine that runs a study in this process, one trial after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .display import Watch
from .trials import Planned
from .worker import Outcome, Worker


def run_local(
    planned: Sequence[Planned],
    record: Callable[[Planned, Outcome], None],
    watch: Watch,
) -> None:
    """Run trials and ``record`` each as it ends; what ``record`` raises ends the run.

    Trials of one model run in a row, and among them those of one calibration text, so that the model is
    loaded once and no text is read twice; else they run as planned.
    """
    worker = Worker()
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
