"""The results store of a study: one SQLite file that holds the plan and every finished trial."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ...registry import StoreError
from ..files.moved import without_moved
from ..output.folders import plain
from ..runs.records import Read, parsed
from .changes import explain
from .published import StudyRecord
from .trials import Planned, StoredTrial, key_of
from .worker import Outcome

if TYPE_CHECKING:
    from .study import Study

APPLICATION_ID = 0x70726B31
"""Marks the SQLite files that are ours (PRAGMA application_id)."""

FORMAT = 1
"""Version of the layout (PRAGMA user_version)."""

BUSY_SECONDS = 20.0
"""Seconds that a reader waits for a write to end."""

LAYOUT = """
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (
    key TEXT PRIMARY KEY,
    number INTEGER,
    settings TEXT NOT NULL,
    pipeline TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'waiting',
    data TEXT, resolved TEXT, error TEXT, seconds REAL, finished TEXT
);
"""
"""``number`` is the place in the plan, null for a trial that an earlier version of the file had."""

COLUMNS = ("number", "key", "settings", "status", "data", "resolved", "error", "seconds", "pipeline")


class Store:
    """An open store; a context manager. Every method raises :class:`StoreError` with the place and the remedy."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: filelock.BaseFileLock | None = None):
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def create_or_resume(cls, path: str | Path, study: Study, update: bool = False) -> Store:
        """Open the study's store for writing, created if there is none, and lock it against other writers.

        A store whose trials are not those of ``study`` is refused with an explanation; with ``update``
        it is used all the same: trials that still apply are kept, and the others stay in the file, unused.
        """
        path = Path(path).expanduser().absolute()
        lock = _locked(path)
        store = None
        try:
            if not path.exists():
                _create(path, study)
            store = cls(path, _connect(path), lock)
            store._renew_keys(study)
            store._adopt(study, update)
            with store._writing() as connection:  # so that a failure is found before the first trial runs
                connection.execute(f"PRAGMA user_version = {FORMAT}")
        except BaseException:
            if store is not None:
                store._connection.close()
            lock.release()
            raise
        return store

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store for reading; another process may be writing to it."""
        path = Path(path).expanduser().absolute()
        if not path.is_file():
            raise StoreError(f"there is no results store {path}; prunekit ablate makes one")
        store = cls(path, _connect(path))
        store._connection.execute("PRAGMA query_only = ON")
        return store

    @property
    def study(self) -> StudyRecord:
        """The study that the store was created for, or last updated to."""
        with _errors(self.path):
            rows = self._connection.execute("SELECT name, value FROM study ORDER BY rowid").fetchall()
        return _parsed(StudyRecord, {name: json.loads(value) for name, value in rows}, f"{self.path}: study")

    @property
    def trials(self) -> list[StoredTrial]:
        """All trials of the plan, in its order."""
        with _errors(self.path):
            rows = self._connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM trials WHERE number IS NOT NULL ORDER BY number"
            ).fetchall()
        return [_stored(row, self.path) for row in rows]

    def record(self, key: str, outcome: Outcome) -> None:
        """Store how a trial ended; when this returns, it is on the disk."""
        data = None if outcome.result is None else json.dumps(plain(outcome.result.as_json()), allow_nan=False)
        status = "done" if outcome.error is None else "failed"
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = (status, data, outcome.resolved, outcome.error, outcome.seconds, finished, key)
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE trials SET status=?, data=?, resolved=?, error=?, seconds=?, finished=? WHERE key=?", values
            )
            if changed.rowcount != 1:
                raise KeyError(f"the plan has no trial {key}")

    def close(self) -> None:
        """Close the file and release the lock."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        with _errors(self.path), self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def _renew_keys(self, study: Study) -> None:
        """Give trials of version 0.1 the keys that this version computes for the same pipelines."""
        planned = {key_of(without_moved(trial.pipeline)): trial for trial in study.trials}
        with _errors(self.path):
            rows = self._connection.execute("SELECT key, pipeline FROM trials").fetchall()
        same = ((key, planned.get(key_of(without_moved(json.loads(pipeline))))) for key, pipeline in rows)
        renewed = [(trial.key, json.dumps(trial.pipeline), key) for key, trial in same if trial and trial.key != key]
        if renewed:
            with self._writing() as connection:
                connection.executemany("UPDATE OR IGNORE trials SET key = ?, pipeline = ? WHERE key = ?", renewed)

    def _adopt(self, study: Study, update: bool) -> None:
        stored = self.trials
        known = [(trial.key, trial.settings) for trial in stored]
        asked = [(planned.key, plain(planned.settings)) for planned in study.trials]
        if known != asked and not update:
            raise StoreError(explain(self.path, self.study, stored, study))
        before = self.study
        # Versions are those that the store was begun with; every trial has its own.
        after = study.describe().model_copy(update={"versions": before.versions, "started": before.started})
        if known == asked and after == before:
            return
        with self._writing() as connection:
            _write_plan(connection, after, study.trials)


def _stored(row: Sequence[Any], path: Path) -> StoredTrial:
    found = dict(zip(COLUMNS, row, strict=True))
    found |= {name: json.loads(found[name]) for name in ("settings", "data", "pipeline") if found[name] is not None}
    found["result"] = found.pop("data")
    return _parsed(StoredTrial, found, f"{path}: trial {found['number']}")


def _parsed(kind: type[Read], data: Any, place: str) -> Read:
    try:
        return parsed(kind, data)
    except ValueError as error:
        raise StoreError(
            f"results store {place} is damaged ({error}); use a copy of the file, or make a new store with --out"
        ) from None


def _write_plan(connection: sqlite3.Connection, study: StudyRecord, trials: Sequence[Planned]) -> None:
    """Write the study and its plan; existing results stay."""
    for name, value in study.model_dump().items():
        connection.execute(
            "INSERT INTO study VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, json.dumps(plain(value))),
        )
    connection.execute("UPDATE trials SET number = NULL")
    for planned in trials:
        connection.execute(
            "INSERT INTO trials (key, number, settings, pipeline) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET number = excluded.number, settings = excluded.settings",
            (planned.key, planned.number, json.dumps(plain(planned.settings)), json.dumps(planned.pipeline)),
        )


def _create(path: Path, study: Study) -> None:
    """Create a store with the plan and no results, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with _errors(path):
            connection = sqlite3.connect(partial, isolation_level=None)
            try:
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                connection.executescript(LAYOUT)
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    _write_plan(connection, study.describe().model_copy(update={"started": started}), study.trials)
            finally:
                connection.close()
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _connect(path: Path) -> sqlite3.Connection:
    """A connection to a file that is a store of this version, or :class:`StoreError`."""
    with _errors(path):
        # "rw" falls back to reading where the file may not be written, and cleans up after a writer that was killed.
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if found != APPLICATION_ID:
                raise StoreError(f"{path} is not a results store of prunekit; name another file with --out")
            if version != FORMAT:
                raise StoreError(
                    f"{path} is a results store of another version of prunekit (layout {version}, this one reads "
                    f"{FORMAT}); use that version for it, or make a new store with --out"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def _locked(path: Path) -> filelock.BaseFileLock:
    """The store's lock, acquired; the operating system releases it when the process ends, however it ends."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        if path.is_dir():
            raise StoreError(f"{path} is a folder; name a file with --out, such as {path}/study.sqlite")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(
            f"results store {path} is in use by another prunekit; wait for it, stop it, or choose another with --out"
        ) from None
    except OSError as error:
        raise StoreError(
            f"results store {path} cannot be written: {error.strerror or error}; choose another place with --out"
        ) from None
    return lock


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns errors of SQLite and the system into one message with the remedy."""
    try:
        yield
    except sqlite3.Error as error:
        message = str(error)
        if "readonly" in message and not path.exists():
            message, remedy = "it was moved or deleted during the run", "put it back, and run the same command again"
        elif "is full" in message or "disk I/O" in message:
            remedy = "free some space and run the same command again; finished trials that were stored are kept"
        elif "locked" in message:
            remedy = "another program has it open; close that and run the same command again"
        elif "not a database" in message or "malformed" in message:
            remedy = "it is not a results store of prunekit; name another file with --out"
        else:
            remedy = "make file and folder writable, or choose another place with --out"
        raise StoreError(f"results store {path}: {message}; {remedy}") from None
    except OSError as error:
        raise StoreError(
            f"results store {path} cannot be written: {error.strerror or error}; choose another place with --out"
        ) from None
