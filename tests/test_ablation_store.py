"""The results store: durable at once, resumed, refused with an explanation, and whole whatever goes wrong."""

import json
import os
import sqlite3
from pathlib import Path

import pytest
from prunekit.compress.ablation.store import Store
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.trials import earlier_identity, key_of
from prunekit.compress.ablation.worker import Outcome
from prunekit.registry import StoreError

from tests.run_records import run_record

STUDY = """\
title: Seeds
base: {prune: {use: pp}, calibration: {sequences: 4}}
vary: {prune.ratio: [0.2, 0.4], seed: [0, 1]}
published: [{where: {prune.ratio: 0.2}, metric: perplexity.loss, value: 1.5, source: here}]
"""


@pytest.fixture
def study(tmp_path):
    """The study of a file with this text."""

    def of(text: str = STUDY) -> Study:
        path = tmp_path / "seeds.yaml"
        path.write_text(text)
        return Study.load(path)

    return of


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "made" / "store.sqlite"


def outcome(value=1.0, error=None) -> Outcome:
    measured = {"evaluator": "perplexity", "label": "perplexity", "pruned": {"loss": value}}
    return Outcome(None if error else run_record(metrics=[measured]), "resolved", error, 2.5)


def refusal(call, *args, **options) -> str:
    with pytest.raises(StoreError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.fixture
def half(path, study):
    """A store with one trial done and one failed."""
    planned = study().trials
    with Store.create_or_resume(path, study()) as store:
        store.record(planned[0].key, outcome())
        store.record(planned[2].key, outcome(error="it broke"))
    return path


def statuses(path: Path) -> list[str]:
    with Store.open(path) as store:
        return [trial.status for trial in store.trials]


def test_a_finished_trial_is_on_the_disk_before_record_returns(path, study):
    planned = study().trials
    with Store.create_or_resume(path, study()) as store:
        assert statuses(path) == ["waiting"] * 4
        for index, trial in enumerate(planned[:2]):
            store.record(trial.key, outcome(float(index)))
            with Store.open(path) as reader:  # while the writer has it open
                found = reader.trials[index]
            assert (found.status, found.seconds, found.resolved, found.error) == ("done", 2.5, "resolved", None)
            assert (found.number, found.key, found.settings) == (trial.number, trial.key, trial.settings)
            assert found.result == outcome(float(index)).result
    assert statuses(path) == ["done", "done", "waiting", "waiting"]


def test_what_a_store_says_about_its_study(half, study):
    with Store.open(half) as store:
        said = store.study
    assert (said.title, said.axes) == ("Seeds", {"prune.ratio": [0.2, 0.4], "seed": [0, 1]})
    assert said.text == STUDY
    assert said.published[0].value == 1.5
    assert {"torch", "prunekit"} <= set(said.versions)
    assert said.base["calibration"] == {"sequences": 4}
    assert said.started.startswith("20")


def test_nan_and_infinity_survive(path, study):
    key = study().trials[0].key
    with Store.create_or_resume(path, study()) as store:
        measured = {"evaluator": "odd", "label": "odd", "pruned": {"a": float("nan")}, "details": {"b": [float("inf")]}}
        store.record(key, Outcome(run_record(metrics=[measured]), None, None, 1.0))
        (metric,) = store.trials[0].result.metrics
        assert (metric.pruned, metric.details) == ({"a": "nan"}, {"b": ["inf"]})


def test_the_same_study_goes_on_and_a_failed_trial_may_be_done_again(half, study):
    with Store.create_or_resume(half, study()) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
        assert store.trials[2].error == "it broke"
        store.record(store.trials[2].key, outcome())
    assert statuses(half) == ["done", "waiting", "done", "waiting"]


def test_a_change_that_changes_no_trial_is_taken_over(half, study):
    text = STUDY.replace("title: Seeds", "title: Better # a comment").replace("1.5", "1.6")
    with Store.create_or_resume(half, study(text)) as store:
        assert store.study.title == "Better"
        assert store.study.text == text
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "[0.2, 0.4]",
            "[0.2, 0.3]",
            ["axis prune.ratio: new 0.3; gone 0.4", "1 of its 2 finished", "3 of 4 would run"],
        ),
        ("sequences: 4", "sequences: 5", ["calibration.sequences: 4 -> 5 (in 4 trials)", "0 of its 2 finished"]),
        (", seed: [0, 1]", "", ["axis seed: gone", "2 of its 2 finished trials still apply, 0 of 2 would run"]),
        ("seed: [0, 1]", "seed: [0, 1], prune.skip_layers: [[0]]", ["axis prune.skip_layers: new, with [0]"]),
        ("[0, 1]", "[1, 0]", ["axis seed: another order", "2 of its 2 finished trials still apply"]),
        ("\npublished", "\nexclude: [{prune.ratio: 0.4, seed: 1}]\npublished", ["other trials of the same axes"]),
    ],
)
def test_a_changed_file_is_explained_and_nothing_is_touched(half, study, old, new, words):
    assert old in STUDY
    before = half.read_bytes()
    found = refusal(Store.create_or_resume, half, study(STUDY.replace(old, new)))
    assert all(word in found for word in [str(half), "seeds.yaml", "--update", "--out", *words]), found
    assert half.read_bytes() == before


def test_update_keeps_what_applies_and_the_rest_for_the_way_back(half, study):
    changed = study(STUDY.replace("[0.2, 0.4]", "[0.4, 0.6]").replace("{prune.ratio: 0.2}", "{}"))
    with Store.create_or_resume(half, changed, update=True) as store:
        assert [trial.settings["prune.ratio"] for trial in store.trials] == [0.4, 0.4, 0.6, 0.6]
        assert [trial.status for trial in store.trials] == ["failed", "waiting", "waiting", "waiting"]
        assert store.study.axes["prune.ratio"] == [0.4, 0.6]
    with Store.create_or_resume(half, study(), update=True) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
        assert store.trials[0].result == outcome().result


def as_layout_1(connection):
    connection.execute("ALTER TABLE trials DROP COLUMN checksum")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()


def changed(store, query, *values, layout=2):
    connection = sqlite3.connect(store)
    connection.execute(query, values)
    connection.commit()
    if layout == 1:
        as_layout_1(connection)
    connection.close()


def test_a_store_of_version_0_1_goes_on(half, study):
    """Its pipelines have options that have moved since, at their defaults; its keys are made of them."""
    connection = sqlite3.connect(half)
    for key, text in connection.execute("SELECT key, pipeline FROM trials").fetchall():
        pipeline = json.loads(text)
        pipeline["prune"] |= {"rescale": "exact", "probe_mask": "selected", "pad_handling": "exclude"}
        values = (key_of(pipeline), json.dumps(pipeline), key)
        connection.execute("UPDATE trials SET key = ?, pipeline = ? WHERE key = ?", values)
    as_layout_1(connection)
    connection.close()
    with Store.create_or_resume(half, study()) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
        store.record(study().trials[1].key, outcome())
    assert statuses(half) == ["done", "done", "failed", "waiting"]


def test_a_changed_text_file_is_a_change(tmp_path, path, study):
    text = STUDY.replace("sequences: 4", "file: words.txt")
    (tmp_path / "words.txt").write_text("some words")
    Store.create_or_resume(path, study(text)).close()
    (tmp_path / "words.txt").write_text("other words now")
    assert "calibration.file: content" in refusal(Store.create_or_resume, path, study(text))


# Files that are not a store, or not one of this version, or that cannot be written.


def test_a_store_of_another_version(half, study):
    connection = sqlite3.connect(half)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    for open_it in (lambda: Store.open(half), lambda: Store.create_or_resume(half, study(), True)):
        assert "another version of prunekit (layout 7, this one reads 1 and 2)" in refusal(open_it)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("data", json.dumps({**run_record().as_json(), "metrics": [{}]}), "result.metrics.0.evaluator: is required"),
        ("data", "{", "Expecting property name"),
        ("data", "[" * 100_000, "it is nested more than 64 levels"),
        ("data", b"\xff\xff", "it holds bytes that were not written"),
        ("data", None, "its status and its result do not belong together"),
        ("status", "finished", "status: should be 'waiting', 'done' or 'failed'"),
        ("seconds", "long", "seconds: should be a valid number"),
        ("settings", "1", "settings: should be a valid dictionary"),
        ("settings", json.dumps({"prune.use": "x" * 20_000}), "its settings have 20,017 characters"),
        ("pipeline", "{}", "its pipeline is not the one that was planned"),
        ("key", "abc", "its pipeline is not the one that was planned"),
    ],
)
def test_a_damaged_trial_counts_as_not_run(half, study, column, value, words):
    changed(half, f"UPDATE trials SET {column} = ? WHERE number = 1", value, layout=1)
    with Store.open(half) as store:
        assert [trial.status for trial in store.trials if trial.number == 1] in ([], ["waiting"])
        (said,) = store.damaged
    assert f"{half}: trial 1 is damaged ({words}" in said and "counts as not run" in said and len(said) < 500
    with Store.create_or_resume(half, study()) as store:
        assert words in store.damaged[0]
        assert [trial.status for trial in store.trials] == ["waiting", "waiting", "failed", "waiting"]
        store.record(study().trials[0].key, outcome())
    with Store.open(half) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
        assert store.damaged == []


@pytest.mark.parametrize("column", ["data", "settings", "resolved", "error", "status", "pipeline"])
def test_a_changed_character_is_noticed(half, study, column):
    number = 3 if column == "error" else 1
    changed(
        half, f"UPDATE trials SET {column} = replace(replace({column}, '2', '9'), 'e', 'E') WHERE number = {number}"
    )
    with Store.open(half) as store:
        assert store.trials and "is damaged" in store.damaged[0]
    with Store.create_or_resume(half, study()) as store:
        assert [trial.status for trial in store.trials][number - 1] == "waiting"


def test_a_store_without_checksums_is_read_and_gets_them(half, study):
    changed(half, "UPDATE trials SET seconds = 7.5 WHERE number = 1", layout=1)
    with Store.open(half) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
        assert store.damaged == []
    with Store.create_or_resume(half, study()) as store:
        assert store.trials[0].seconds == 7.5
    changed(half, "UPDATE trials SET seconds = 8.5 WHERE number = 1")
    with Store.open(half) as store:
        assert store.trials[0].status == "waiting" and "its checksum differs" in store.damaged[0]


def test_a_damaged_study_is_one_sentence(half):
    changed(half, "UPDATE study SET value = 1 WHERE name = 'axes'")
    with Store.open(half) as store:
        found = refusal(lambda: store.study)
    assert f"{half}: study is damaged (axes: should be a valid dictionary" in found and "--out" in found


@pytest.mark.parametrize(
    "layout",
    [
        "DROP TABLE trials; CREATE VIEW trials AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
        "SELECT n AS number, n AS key, '{}' AS settings, '{}' AS pipeline, 'done' AS status, '{}' AS data, "
        "NULL AS resolved, NULL AS error, 1.0 AS seconds, '' AS finished, NULL AS checksum FROM r",
        "ALTER TABLE trials RENAME data TO d; ALTER TABLE trials ADD COLUMN data TEXT AS (hex(zeroblob(9999999)))",
        "CREATE TRIGGER t AFTER UPDATE ON trials BEGIN DELETE FROM trials; END",
        "CREATE TABLE more (x)",
        "DROP TABLE study",
    ],
)
def test_a_store_that_another_program_laid_out(half, study, layout):
    connection = sqlite3.connect(half)
    connection.executescript(layout)
    connection.close()
    for open_it in (lambda: Store.open(half), lambda: Store.create_or_resume(half, study(), True)):
        assert "is not laid out as prunekit does" in refusal(open_it)


def test_a_query_that_does_not_end(half, monkeypatch):
    monkeypatch.setattr("prunekit.compress.ablation.store.LONGEST_QUERY", 0.01)
    with Store.open(half) as store:
        endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"
        assert "reading takes more than 0 s" in refusal(store._rows, endless)


@pytest.mark.parametrize("kind", ["text", "sqlite", "empty", "folder", "none"])
def test_what_is_no_store(tmp_path, study, kind):
    file = tmp_path / "file.sqlite"
    if kind == "folder":
        file.mkdir()
    elif kind == "sqlite":
        connection = sqlite3.connect(file)
        connection.execute("CREATE TABLE notes (a)")
        connection.close()
    elif kind != "none":
        file.write_text("just some text, and not a database\n" * 30 if kind == "text" else "")
    before = None if kind in ("folder", "none") else file.read_bytes()
    words = "there is no results store" if kind in ("folder", "none") else "is not a results store"
    assert words in refusal(Store.open, file)
    if kind != "none":
        expected = "is a folder; name a file with --out" if kind == "folder" else words
        assert expected in refusal(Store.create_or_resume, file, study())
        assert before is None or file.read_bytes() == before


def test_a_store_that_another_process_writes(half, study):
    with Store.create_or_resume(half, study()):
        assert "is in use by another prunekit" in refusal(Store.create_or_resume, half, study())
        assert statuses(half)[0] == "done"
    Store.create_or_resume(half, study()).close()


def test_a_store_that_another_program_has_locked(half, study, monkeypatch):
    monkeypatch.setattr("prunekit.compress.ablation.store.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(half, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert "another program has it open" in refusal(Store.create_or_resume, half, study())
    other.close()
    Store.create_or_resume(half, study()).close()  # and our own lock was let go


def test_a_full_disk_loses_nothing_that_was_stored(half, study):
    planned = study().trials
    with Store.create_or_resume(half, study()) as store:
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        large = Outcome(run_record(notes=["x" * 400_000]), None, None, 1.0)
        found = refusal(store.record, planned[1].key, large)
        assert "is full; free some space and run the same command again" in found
        assert [trial.status for trial in store.trials] == ["done", "waiting", "failed", "waiting"]
    with Store.create_or_resume(half, study()) as store:
        store.record(planned[1].key, large)
    assert statuses(half)[:2] == ["done", "done"]


def test_places_that_cannot_be_written(tmp_path, study):
    (tmp_path / "file").write_text("")
    found = refusal(Store.create_or_resume, tmp_path / "file" / "store.sqlite", study())
    assert "cannot be written" in found
    assert "choose another place with --out" in found


def test_a_store_that_may_only_be_read(half, study, monkeypatch):
    connect = sqlite3.connect
    read_only = lambda place, **options: connect(place.replace("mode=rw", "mode=ro"), **options)  # noqa: E731
    monkeypatch.setattr(sqlite3, "connect", read_only)
    found = refusal(Store.create_or_resume, half, study())
    assert "readonly" in found
    assert "make file and folder writable" in found


def test_a_store_appears_whole_or_not_at_all(path, study, monkeypatch):
    monkeypatch.setattr(
        "prunekit.compress.ablation.store._write_plan",
        lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full")),
    )
    assert "free some space" in refusal(Store.create_or_resume, path, study())
    assert [found.name for found in path.parent.iterdir()] == [".store.sqlite.lock"]


def test_a_write_that_was_cut_off_is_taken_back(half, study):
    """A copy taken between two writes of a transaction looks as after a crash: the journal next to it has the state."""
    writer = sqlite3.connect(half, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE trials SET status = 'failed', data = ?", (json.dumps(list(range(20_000))),))
    cut_off = half.with_name("cut-off.sqlite")
    cut_off.write_bytes(half.read_bytes())
    journal = half.with_name(half.name + "-journal")
    cut_off.with_name(cut_off.name + "-journal").write_bytes(journal.read_bytes())
    writer.execute("ROLLBACK")
    writer.close()
    assert statuses(cut_off) == ["done", "waiting", "failed", "waiting"]


def test_a_store_that_is_deleted_while_it_is_written(path, study):
    planned = study().trials
    with Store.create_or_resume(path, study()) as store:
        store.record(planned[0].key, outcome())
        path.unlink()
        assert "moved or deleted during the run" in refusal(store.record, planned[1].key, outcome())


# A model folder that is trained in between


LOCAL = "base: {model: {name: model}, prune: {use: magnitude}}\nvary: {prune.ratio: [0.2, 0.4]}\n"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights 1")
    return folder


def test_trials_of_other_weights_are_other_trials(path, study, model):
    first = study(LOCAL)
    with Store.create_or_resume(path, first) as store:
        store.record(first.trials[0].key, outcome())
    times = (model / "model.safetensors").stat()
    (model / "README.md").write_text("says nothing of numbers")
    (model / "optimizer.pt").write_bytes(b"is loaded by a trainer alone")
    with Store.create_or_resume(path, study(LOCAL)) as store:
        assert [trial.status for trial in store.trials] == ["done", "waiting"]
    (model / "model.safetensors").write_bytes(b"weights 2")  # of the same size
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    assert "0 of its 1 finished trials still apply" in refusal(Store.create_or_resume, path, study(LOCAL))


def test_a_store_whose_keys_have_only_the_sizes_is_kept_with_a_note(path, study, model):
    planned = study(LOCAL).trials
    with Store.create_or_resume(path, study(LOCAL)) as store:
        store.record(planned[0].key, outcome())
    for trial in planned:
        old = earlier_identity(trial)
        assert old["model"]["name"] != trial.pipeline["model"]["name"]
        query = "UPDATE trials SET key=?, pipeline=?, checksum=NULL WHERE key=?"
        changed(path, query, key_of(old), json.dumps(old), trial.key)
    with Store.create_or_resume(path, study(LOCAL)) as store:
        assert [trial.key for trial in store.trials] == [trial.key for trial in planned]
        assert [trial.status for trial in store.trials] == ["done", "waiting"]
        assert "did not read the models' weights" in store.notes[0]
    with Store.create_or_resume(path, study(LOCAL)) as store:
        assert store.notes == []
