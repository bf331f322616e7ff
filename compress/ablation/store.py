"""The results store of a study: one SQLite file that holds the plan and every finished trial."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ...registry import StoreError
from ..files.moved import without_moved
from ..output.folders import plain
from ..output.reading import brief, parse_json
from ..runs.records import parsed
from .changes import explain
from .published import StudyRecord
from .trials import Planned, StoredTrial, earlier_identity, key_of
from .worker import Outcome

if TYPE_CHECKING:
    from .study import Study

APPLICATION_ID = 0x70726B31
"""Marks the SQLite files that are ours (PRAGMA application_id)."""

FORMAT = 2
"""Version of the layout (PRAGMA user_version)."""

READ = (1, 2)
"""Layouts that are read; the first has no checksums, which are added when it is written to."""

LONGEST_QUERY = 20.0
"""Seconds; a file of another program may hold data for which a query never ends."""

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
    data TEXT, resolved TEXT, error TEXT, seconds REAL, finished TEXT, checksum TEXT
);
"""
"""``number`` is the place in the plan, null for a trial that an earlier version of the file had. ``checksum`` is the
sha256 of :data:`SEALED`."""

COLUMNS = ("number", "key", "settings", "status", "data", "resolved", "error", "seconds", "pipeline")

SEALED = ("key", "settings", "pipeline", "status", "data", "resolved", "error", "seconds")
"""What a trial's checksum is of."""

LONGEST_SETTINGS = 10_000
"""Characters of a trial's settings. They name it in tables and plots, which take minutes for a name of megabytes."""

KNOWN = {"study": {"name", "value"}, "trials": {*COLUMNS, "finished", "checksum"}}
"""Columns by table."""


Row = dict[str, Any]
"""What a row holds, by column; of any type, whoever wrote it."""


class Store:
    """An open store; a context manager. Every method raises :class:`StoreError` with the place and the remedy."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: filelock.BaseFileLock | None = None):
        self.path = path
        self.damaged: list[str] = []
        """A sentence for every trial that was found damaged; such a trial counts as not run."""
        self.notes: list[str] = []
        """Sentences on what could not be checked."""
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
            store._renew_layout()
            store._drop_damaged()
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
    def journal(self) -> Path:
        """The file of what allocators have measured in trials that are not done yet."""
        return self.path.with_name(f".{self.path.name}.measured")

    @property
    def study(self) -> StudyRecord:
        """The study that the store was created for, or last updated to."""
        rows = self._rows("SELECT name, value FROM study ORDER BY rowid")
        try:
            return parsed(StudyRecord, {name: parse_json(_text(value)) for name, value in rows})
        except ValueError as error:
            raise StoreError(
                f"results store {self.path}: study is damaged ({error}); use a copy of the file, or make a new store "
                "with --out"
            ) from None

    @property
    def trials(self) -> list[StoredTrial]:
        """All trials of the plan, in its order; :attr:`damaged` says which of them are damaged."""
        read = [_stored(row) for row in self._trial_rows("number IS NOT NULL ORDER BY number")]
        self.damaged = self.damaged or [
            f"results store {self.path}: trial {row['number']} is damaged ({reason}), so it counts as not run; "
            "prunekit ablate runs it again"
            for row, _, reason in read
            if reason
        ]
        return [trial for _, trial, _ in read if trial is not None]

    def _rows(self, query: str) -> list[Any]:
        """All rows of a query, which may take :data:`LONGEST_QUERY`."""
        until = time.monotonic() + LONGEST_QUERY
        with _errors(self.path):
            self._connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
            try:
                return self._connection.execute(query).fetchall()
            finally:
                self._connection.set_progress_handler(None, 0)

    def _trial_rows(self, where: str) -> list[Row]:
        """Rows of trials by column, ``rowid`` included; a store without checksums has null there."""
        checksum = "checksum" if _layout(self._connection) > 1 else "NULL"
        columns = ("rowid", *COLUMNS, "finished", "checksum")
        rows = self._rows(f"SELECT rowid, {', '.join(COLUMNS)}, finished, {checksum} FROM trials WHERE {where}")
        return [dict(zip(columns, row, strict=True)) for row in rows]

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
            _seal(connection, [key])

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

    def _renew_layout(self) -> None:
        """Give a store of the first layout its checksums; what its trials hold cannot be checked any more."""
        if _layout(self._connection) > 1:
            return
        with self._writing() as connection:
            connection.execute("ALTER TABLE trials ADD COLUMN checksum TEXT")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            _seal(connection, [row["key"] for row in self._trial_rows("1") if _stored(row)[2] is None])

    def _drop_damaged(self) -> None:
        """Forget what is damaged, so that the plan has it anew as trials that have not run."""
        _ = self.trials  # says which are damaged
        lost = [(row["rowid"],) for row in self._trial_rows("1") if _stored(row)[2] is not None]
        if lost:
            with self._writing() as connection:
                connection.executemany("DELETE FROM trials WHERE rowid = ?", lost)

    def _renew_keys(self, study: Study) -> None:
        """Give trials of version 0.1 the keys that this version computes for the same pipelines.

        Their keys have the sizes of a local model's files, not their contents: what they hold is kept, with a note.
        """
        planned = {key_of(without_moved(trial.pipeline)): trial for trial in study.trials}
        earlier = {key_of(without_moved(old)): trial for trial in study.trials if (old := earlier_identity(trial))}
        rows = [(row["key"], json.loads(row["pipeline"])) for row in self._trial_rows("1")]
        keys = [(key, key_of(without_moved(pipeline))) for key, pipeline in rows]
        same = [(key, planned.get(read) or earlier.get(read)) for key, read in keys]
        if any(read in earlier for _, read in keys):
            self.notes.append(
                f"results store {self.path}: its trials are of a version that did not read the models' weights; "
                "they are kept, since the files' names and sizes are the same. If the model was trained in between, "
                "begin another store with --out"
            )
        renewed = [(trial.key, json.dumps(trial.pipeline), key) for key, trial in same if trial and trial.key != key]
        if renewed:
            with self._writing() as connection:
                connection.executemany("UPDATE OR IGNORE trials SET key = ?, pipeline = ? WHERE key = ?", renewed)
                _seal(connection, [key for key, _, _ in renewed])

    def _adopt(self, study: Study, update: bool) -> None:
        stored = self.trials
        known = [(trial.key, trial.settings) for trial in stored]
        asked = [(planned.key, plain(planned.settings)) for planned in study.trials]
        # Trials that were dropped as damaged are planned anew; the others must be those that are asked for.
        there = [each for each in asked if each in known] if self.damaged else asked
        if known != there and not update:
            raise StoreError(explain(self.path, self.study, stored, study))
        before = self.study
        # Versions are those that the store was begun with; every trial has its own.
        after = study.describe().model_copy(update={"versions": before.versions, "started": before.started})
        if known == asked and after == before:
            return
        with self._writing() as connection:
            _write_plan(connection, after, study.trials)


def _stored(row: Row) -> tuple[Row, StoredTrial | None, str | None]:
    """The row, its trial (none if its plan is damaged, one that has not run if its result is), and what is damaged."""
    plan: dict[str, Any] | None = None
    try:
        plan = {"number": row["number"] or 0, "key": row["key"]}  # no number: of an earlier version of the file
        plan |= {name: parse_json(_text(row[name])) for name in ("settings", "pipeline")}
        if len(row["settings"]) > LONGEST_SETTINGS:
            plan = None
            raise ValueError(f"its settings have {len(row['settings']):,} characters")
        if key_of(plan["pipeline"]) != row["key"]:
            plan = None
            raise ValueError("its pipeline is not the one that was planned")
        if row["checksum"] is not None and row["checksum"] != _checksum([row[name] for name in SEALED]):
            raise ValueError("its checksum differs")
        data = None if row["data"] is None else parse_json(_text(row["data"]))
        found = {**plan, "result": data, **{name: row[name] for name in ("status", "resolved", "error", "seconds")}}
        trial = parsed(StoredTrial, found)
        if (trial.status == "done") != (trial.result is not None):
            raise ValueError("its status and its result do not belong together")
        return row, trial, None
    except ValueError as error:
        reason = brief(error)
    try:
        waiting = None if plan is None else parsed(StoredTrial, {**plan, "status": "waiting"})
    except ValueError:
        waiting = None
    return row, waiting, reason


def _text(value: Any) -> str:
    """JSON as it was written, in ASCII; raises ``ValueError`` for anything else."""
    if not isinstance(value, str) or not value.isascii():
        raise ValueError("it holds bytes that were not written")
    return value


def _checksum(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()


def _seal(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    """Write the checksums of trials as they are."""
    for key in keys:
        row = connection.execute(f"SELECT {', '.join(SEALED)} FROM trials WHERE key = ?", (key,)).fetchone()
        if row is not None:
            connection.execute("UPDATE trials SET checksum = ? WHERE key = ?", (_checksum(row), key))


def _layout(connection: sqlite3.Connection) -> int:
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return found


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
    _seal(connection, [planned.key for planned in trials])


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
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.text_factory = lambda data: data.decode(errors="replace")
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            version = _layout(connection)
            if found != APPLICATION_ID:
                raise StoreError(f"{path} is not a results store of prunekit; name another file with --out")
            if version not in READ:
                raise StoreError(
                    f"{path} is a results store of another version of prunekit (layout {version}, this one reads "
                    f"{READ[0]} and {READ[1]}); use that version for it, or make a new store with --out"
                )
            _check_layout(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_layout(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse views, triggers and computed columns, whose reading may never end."""
    parts = connection.execute("SELECT type, name FROM sqlite_master").fetchall()
    tables = {name for kind, name in parts if kind == "table"}
    other = [name for kind, name in parts if kind != "table" and not (kind == "index" and name.startswith("sqlite_"))]
    columns = {name: connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in KNOWN}
    strange = [row[1] for name, rows in columns.items() for row in rows if row[1] not in KNOWN[name] or row[6]]
    if tables != set(KNOWN) or other or strange:
        named = brief(", ".join(map(str, [*sorted(tables ^ set(KNOWN)), *other, *strange])))
        raise StoreError(
            f"results store {path} is not laid out as prunekit does ({named}); another program made or changed it, so "
            "use a copy that prunekit wrote, or make a new store with --out"
        )


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
        elif "not a database" in message:
            remedy = "it is not a results store of prunekit; name another file with --out"
        elif "malformed" in message or "corrupt" in message:
            remedy = "the file is damaged; use a copy of it, or make a new store with --out"
        elif "interrupted" in message:
            message, remedy = f"reading takes more than {LONGEST_QUERY:.0f} s", "use a copy that prunekit wrote"
        else:
            remedy = "make file and folder writable, or choose another place with --out"
        raise StoreError(f"results store {path}: {brief(message)}; {remedy}") from None
    except OSError as error:
        raise StoreError(
            f"results store {path} cannot be written: {error.strerror or error}; choose another place with --out"
        ) from None
