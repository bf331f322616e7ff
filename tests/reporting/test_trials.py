"""What a report is made from: stores, run folders and the demo's folder become one list of trials."""

import json
import sqlite3

import pytest
from prunekit.compress.ablation.store import Store
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.worker import Outcome
from prunekit.compress.files.dotted import flatten
from prunekit.compress.reporting import command
from prunekit.compress.reporting.axes import axis_title, named_text, setting_text
from prunekit.compress.reporting.trials import read
from prunekit.compress.runs.records import RunResult
from prunekit.registry import PrunekitError, SpecError

STUDY = """
title: A study
base: {evaluate: [perplexity, cost]}
vary: {prune.use: [wanda_sp, magnitude], prune.ratio: [0.2, 0.4]}
published:
  - {where: {prune.use: magnitude, prune.ratio: 0.4}, metric: perplexity.perplexity, value: 20.0, source: A paper}
"""


@pytest.fixture
def store(tmp_path, run_data, resolved):
    """A store of four trials: two done, one failed, one waiting."""
    (tmp_path / "study.yaml").write_text(STUDY)
    study = Study.load(tmp_path / "study.yaml")
    path = tmp_path / "study.sqlite"
    with Store.create_or_resume(path, study) as store:
        for planned in study.trials[:2]:
            use, ratio = planned.settings.values()
            store.record(
                planned.key, Outcome(RunResult.model_validate(run_data(use, ratio)), resolved(use, ratio), None, 2.0)
            )
        store.record(study.trials[2].key, Outcome(None, None, "it went wrong", 1.0))
    return path


@pytest.fixture
def run_folder(tmp_path, run_data, resolved):
    def make(name="run", **options):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(run_data(**options)))
        (folder / "resolved.yaml").write_text(resolved())
        return folder

    return make


def test_a_store_is_read_while_it_is_not_finished(store):
    found = read(store)
    assert found.title == "A study" and "vary:" in found.text
    assert [trial.status for trial in found.trials] == ["done", "done", "failed", "waiting"]
    assert found.axes == {"prune.use": ["wanda_sp", "magnitude"], "prune.ratio": [0.2, 0.4]}
    assert found.trials[1].settings == {"prune.use": "wanda_sp", "prune.ratio": 0.4}
    assert found.trials[1].metric("cost").pruned["flops_ratio"] == pytest.approx(0.68)
    assert found.failed[0].error == "it went wrong" and found.waiting == 1
    assert found.published[0].source == "A paper"


def test_a_run_and_the_demo_are_read(run_folder, run_data):
    one = read(run_folder())
    assert [trial.settings for trial in one.trials] == [{"prune.use": "pp", "prune.ratio": 0.4}]
    assert "skip_layers" in one.text
    demo = run_folder("demo")
    runs = [{"pipeline": "pipelines/x.yaml", "situation": s, **run_data("pp", r)} for s in "ab" for r in (0.2, 0.4)]
    (demo / "results.json").write_text(json.dumps({"format": 1, "table": [], "runs": runs}))
    found = read(demo)
    assert found.axes == {"prune.use": ["pp"], "prune.ratio": [0.2, 0.4], "text": ["a", "b"]}
    assert len(found.done) == 4


def test_the_frame_has_a_row_for_each_trial(store):
    frame = read(store).frame
    assert frame["trial", "status"].tolist() == ["done", "done", "failed", "waiting"]
    assert frame["setting", "prune.ratio"].tolist() == [0.2, 0.4, 0.2, 0.4]
    assert frame["pruned", "cost.flops_ratio"].tolist()[:2] == pytest.approx([0.84, 0.68])
    assert frame["dense", "cost.flops_ratio"].tolist()[:2] == [1.0, 1.0]
    assert frame["pruned", "strangers_own.shape"].tolist()[:2] == ["round", "round"]
    assert frame["pruned", "cost.flops"].isna().tolist() == [False, False, True, True]


def written(folder, name, content):
    (folder / name).write_text(content) if isinstance(content, str) else (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "nowhere", r"there is no .*nowhere"),
        (lambda f: f, "not a results folder"),
        (lambda f: written(f, "text.sqlite", "not a database at all"), "is not a study's store"),
        (lambda f: written(f, "results.json", "{").parent, "cannot be read"),
        (lambda f: written(f, "results.json", "[]").parent, "holds no results"),
        (lambda f: written(f, "results.json", '{"format": 99, "metrics": []}').parent, "format 99.*reads 1"),
        (lambda f: written(f, "results.json", '{"format": 1, "runs": []}').parent, "no trial is finished"),
    ],
)
def test_what_is_no_source_is_refused_in_one_message(tmp_path, make, message):
    source = make(tmp_path)
    with pytest.raises(SpecError, match=message) as raised:
        command.report(source, tmp_path / "out")
    assert str(source) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_stores_that_cannot_be_reported_are_refused(store, tmp_path):
    with sqlite3.connect(store) as connection:
        connection.execute(
            "UPDATE trials SET status='failed', data=NULL, error='all of it', checksum=NULL WHERE status='done'"
        )
    with pytest.raises(SpecError, match=r"3 failed, 1 waiting.*the first error: all of it"):
        command.report(store, tmp_path / "out")
    with sqlite3.connect(store) as connection:
        connection.execute("PRAGMA user_version = 77")
    with pytest.raises(PrunekitError, match=r"another version"):
        command.report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "text", "named"),
    [
        ("prune.ratio", 0.4, "40%", "40%"),
        ("prune.use", "wanda_sp", "Wanda-sp", "Wanda-sp"),
        ("prune.use", "somebodys", "somebodys", "somebodys"),
        ("seed", 3, "3", "seed = 3"),
        ("prune.merger", None, "none", "merger = none"),
        ("prune.merger", {"name": "fixed_ratio", "probe": 0.3}, "fixed_ratio probe 0.300",
         "merger = fixed_ratio probe 0.300"),
        ("prune.skip_layers", [0, 1], "0 1", "skip layers = 0 1"),
        ("prune.sequential", True, "yes", "sequential = yes"),
    ],
)  # fmt: skip
def test_settings_as_people_read_them(name, value, text, named):
    assert setting_text(name, value) == text
    assert named_text(name, value) == named


def test_titles_of_axes_and_flat_settings():
    assert [axis_title(n) for n in ("prune.use", "prune.selector.rows", "evaluate.0.window", "text")] == [
        "strategy", "selector rows", "window", "text"
    ]  # fmt: skip
    flat = flatten({"a": {"b": 1}, "evaluate": [{"name": "x", "w": 1}, {"name": "y"}, {"name": "x", "w": 2}], "l": [1]})
    assert flat == {"a.b": 1, "evaluate.x 1.name": "x", "evaluate.x 1.w": 1, "evaluate.y.name": "y",
                    "evaluate.x 2.name": "x", "evaluate.x 2.w": 2, "l": [1]}  # fmt: skip
