"""``prunekit ablate``: runs the trials of a study that have no result yet, and prints its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from ...registry import SpecError, near
from ..files.yaml_file import YamlFile
from ..output import printing
from ..output.formatting import ranges
from ..runs.checking import announce
from ..runs.preflight import unseen
from ..runs.provenance import versions
from .display import Display
from .mistakes import preflight
from .published import unmeasured
from .store import Store
from .study import Study
from .trials import Planned, StoredTrial
from .worker import Outcome, run_local

ENGINES = ("local", "ray")

MOST_LABELS = 3
"""Trials with the same error that are listed with their settings; more are listed by number."""

ShowTrials = Callable[[Path, Sequence[StoredTrial]], None]
"""Prints the finished trials of a store as a table."""


def ablate(
    file: Path,
    settings: Iterable[str] = (),
    plugins: Iterable[Path] = (),
    out: Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    update: bool = False,
    retry: bool = False,
    *,
    show: ShowTrials,
) -> None:
    """Run the trials of a study that the store ``out`` (else results/FILE.sqlite) has no results of.

    Raises :class:`PrunekitError` for everything that the user can fix, and ``typer.Exit`` with code 1 if trials have
    failed. Finished trials stay in the store, however the run ends.
    """
    if engine not in ENGINES:
        raise SpecError(f"--engine: there is no {engine!r}{near(engine, ENGINES)}; there are {', '.join(ENGINES)}")
    if engine == "local" and (workers is not None or address is not None):
        raise SpecError(
            f"{'--workers' if address is None else '--address'} is for --engine ray; add that, or leave it out"
        )
    study = Study.load(file, settings, plugins)
    printing.catalog_problems(study.catalog)
    path = out or Path("results") / f"{file.stem}.sqlite"
    # Before a store is begun: fixing the file afterwards would make it differ from the store's.
    study.refuse(preflight(study.trials, _due(study, path, retry), here=engine == "local"))
    announce(trial.spec for trial in study.trials)
    with Store.create_or_resume(path, study, update) as store:
        run_waiting(store, study, retry, engine, workers, address)
        trials = store.trials
    _finish(trials, store.path, study, show)


def run_waiting(
    store: Store,
    study: Study,
    retry: bool,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Run the trials that the store has no results of; an interruption says what is stored, and goes on."""
    for sentence in (*store.damaged, *store.notes):
        printing.warning(sentence)
    _warn_of_versions(store)
    stored = store.trials
    todo = {trial.key for trial in stored if trial.status in _to_run(retry)}
    waiting = [trial for trial in study.trials if trial.key in todo]
    _begin(study, stored, waiting, retry)
    try:
        _run(study, stored, waiting, store, engine, workers, address)
    except KeyboardInterrupt as stop:
        stop.args = (_interrupted(store),)
        raise
    if all(trial.status == "done" for trial in store.trials):
        store.journal.unlink(missing_ok=True)


def validate(file: YamlFile, settings: Iterable[str] = (), plugins: Iterable[Path] = ()) -> None:
    """Print the trials that an ablation file plans; raises :class:`SpecError` with all its mistakes."""
    study = Study.load(file, settings, plugins)
    printing.catalog_problems(study.catalog)
    study.refuse(preflight(study.trials, {trial.key for trial in study.trials}, here=True))
    printing.say(f"{file.path}: valid ablation, {_trials(len(study.trials))}", whole=True)
    for trial in study.trials:
        printing.say(f"{trial.number:>4}  {trial.label}", whole=True)
    announce(trial.spec for trial in study.trials)
    printing.say(unseen(trial.spec for trial in study.trials), whole=True)


def _to_run(retry: bool) -> tuple[str, ...]:
    return ("waiting", "failed") if retry else ("waiting",)


def _due(study: Study, path: Path, retry: bool) -> set[str]:
    """Keys of the trials that would run, whether there is a store yet or not."""
    due = {trial.key for trial in study.trials}
    if not path.is_file():
        return due
    with Store.open(path) as store:
        return due - {trial.key for trial in store.trials if trial.status not in _to_run(retry)}


def _run(
    study: Study,
    stored: Sequence[StoredTrial],
    waiting: Sequence[Planned],
    store: Store,
    engine: str,
    workers: int | None,
    address: str | None,
) -> None:
    def record(planned: Planned, outcome: Outcome) -> None:
        store.record(planned.key, outcome)

    if not waiting:
        return
    with Display(study.trials, stored, waiting) as watch:
        if engine == "local":
            run_local(waiting, record, watch, store.journal)
        else:
            from .ray_engine import run_ray

            run_ray(waiting, record, watch, workers=workers, address=address)


def _begin(study: Study, stored: Sequence[StoredTrial], waiting: Sequence[Planned], retry: bool) -> None:
    """One line: how many trials there are, and how many are done."""
    parts = [f"{study.title}: {_trials(len(study.trials))}"]
    done, failed = (sum(trial.status == status for trial in stored) for status in ("done", "failed"))
    if done or failed:
        parts.append(f"{done} done")
        parts.append(f"{len(waiting)} to run")
    if failed:
        parts.append(f"{failed} failed before" + ("" if retry else " (--retry runs them again)"))
    printing.say(", ".join(parts), whole=True)


def _finish(trials: Sequence[StoredTrial], path: Path, study: Study, show: ShowTrials) -> None:
    """The table, the failures, and where everything is."""
    failed = [trial for trial in trials if trial.status == "failed"]
    if any(trial.status == "done" for trial in trials):
        show(path, trials)
    for message in unmeasured(study.published, trials):
        printing.warning(message)
    for error, alike in _by_error(failed).items():
        printing.warning(f"{_named(alike)} failed: {error}")
    printing.say(f"results: {path}; prunekit report {path} makes pages, tables and plots of them", whole=True)
    if failed:
        printing.say(f"{len(failed)} of {_trials(len(trials))} failed; --retry runs them again")
        raise typer.Exit(1)


def _by_error(failed: Iterable[StoredTrial]) -> dict[str | None, list[StoredTrial]]:
    found: dict[str | None, list[StoredTrial]] = {}
    for trial in failed:
        found.setdefault(trial.error, []).append(trial)
    return found


def _named(trials: Sequence[StoredTrial]) -> str:
    """``trial 2 (pp 0.4)``; of many only the numbers."""
    if len(trials) > MOST_LABELS:
        return f"trials {ranges(trial.number for trial in trials)}"
    names = ", ".join(f"{trial.number} ({trial.label})" for trial in trials)
    return f"trial{'s' * (len(trials) > 1)} {names}"


def part(count: int, total: int) -> str:
    return f"{count} of {_trials(total)} {'is' if count == 1 else 'are'}"


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def _interrupted(store: Store) -> str:
    statuses = [trial.status for trial in store.trials]
    finished = len(statuses) - statuses.count("waiting")
    return (
        f"interrupted; {part(finished, len(statuses))} finished and stored in {store.path}; "
        "the same command goes on from there"
    )


def _warn_of_versions(store: Store) -> None:
    """Numbers of one table should come from the same code."""
    before, now = store.study.versions, versions()
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed and any(trial.status == "done" for trial in store.trials):
        printing.warning(f"the store was begun with other versions: {', '.join(changed)}; finished trials keep theirs")
