"""``prunekit ablate``: runs what is left of a study and prints its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from ...registry import SpecError, near
from .. import printing
from ..provenance import versions
from .display import Display
from .local import run_local
from .planned import Planned, StoredTrial
from .store import Store
from .study import Study
from .worker import Outcome

ENGINES = ("local", "ray")


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
) -> None:
    """Run the trials of a study that the store ``out`` (else results/FILE.sqlite) has no results of.

    Raises :class:`PrunekitError` for everything that is the user's to mend, and ``typer.Exit`` with code 1 where
    trials have failed. What is finished stays in the store, however the run ends.
    """
    if engine not in ENGINES:
        raise SpecError(f"--engine: there is no {engine!r}{near(engine, ENGINES)}; there are {', '.join(ENGINES)}")
    if engine == "local" and (workers is not None or address is not None):
        raise SpecError(
            f"{'--workers' if address is None else '--address'} is for --engine ray; add that, or leave it out"
        )
    study = Study.load(file, settings, plugins)
    printing.catalog_problems(study.catalog)
    with Store.create_or_resume(out or Path("results") / f"{file.stem}.sqlite", study, update) as store:
        _warn_of_versions(store)
        stored = store.trials
        again = ("waiting", "failed") if retry else ("waiting",)
        todo = {trial.key for trial in stored if trial.status in again}
        waiting = [trial for trial in study.trials if trial.key in todo]
        _begin(study, stored, waiting, retry)
        try:
            _run(study, stored, waiting, store, engine, workers, address)
        except KeyboardInterrupt as stop:
            stop.args = (_interrupted(store, file),)
            raise
        trials = store.trials
    _finish(trials, store.path)


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
            run_local(waiting, record, watch)
        else:
            _ray()(waiting, record, watch, workers=workers, address=address)


def _ray() -> Callable[..., None]:
    from .ray_engine import run_ray

    return run_ray


def _begin(study: Study, stored: Sequence[StoredTrial], waiting: Sequence[Planned], retry: bool) -> None:
    """One line: how many trials there are, and what is known of them already."""
    said = [f"{study.title}: {len(study.trials)} trials"]
    done, failed = (sum(trial.status == status for trial in stored) for status in ("done", "failed"))
    if done or failed:
        said.append(f"{done} done")
        said.append(f"{len(waiting)} to run")
    if failed:
        said.append(f"{failed} failed before" + ("" if retry else " (--retry runs them again)"))
    printing.say(", ".join(said), whole=True)


def _finish(trials: Sequence[StoredTrial], path: Path) -> None:
    """The table, the failures, and where everything is."""
    failed = [trial for trial in trials if trial.status == "failed"]
    _show(path, trials)
    for trial in failed:
        printing.warning(f"trial {trial.number} ({trial.label}) failed: {trial.error}")
    printing.say(f"results: {path}; prunekit report {path} makes pages, tables and plots of them", whole=True)
    if failed:
        printing.say(f"{len(failed)} of {len(trials)} trials failed; --retry runs them again")
        raise typer.Exit(1)


def _show(path: Path, trials: Sequence[StoredTrial]) -> None:
    from ..reporting.aggregate import tabulate
    from ..reporting.findings import axis_title, read
    from ..reporting.protocols import Protocols
    from ..reporting.rows import rows_of

    if not any(trial.status == "done" for trial in trials):
        return
    table = tabulate(read(path))
    head = [*map(axis_title, table.shown_axes), *(column.title for column in table.columns)]
    rows = [
        [*(text for text, _ in row.settings), *(cell.text for cell in row.cells)]
        for row in rows_of(table, table.columns, Protocols())
    ]
    printing.show_table(head, rows, left=max(1, len(table.shown_axes)))
    if table.repeated:
        seeds = ", ".join(map(axis_title, table.repeated))
        printing.say(f"Values are mean ± standard deviation over {seeds}.")


def _interrupted(store: Store, file: Path) -> str:
    statuses = [trial.status for trial in store.trials]
    finished = len(statuses) - statuses.count("waiting")
    return (
        f"interrupted; {finished} of {len(statuses)} trials are finished and stored in {store.path}; "
        "the same command goes on from there"
    )


def _warn_of_versions(store: Store) -> None:
    """Numbers of one table should come from the same code."""
    before, now = store.study["versions"], versions()
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed and any(trial.status == "done" for trial in store.trials):
        printing.warning(f"the store was begun with other versions: {', '.join(changed)}; finished trials keep theirs")
