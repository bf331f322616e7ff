"""The results folder: whole or not there; results.json read back, and refused where it is damaged or foreign."""

import errno
import json
import math
from pathlib import Path

import pytest
from prunekit.compress.output.folders import RunFolder
from prunekit.compress.runs.records import damage, read_results
from prunekit.compress.runs.results import Results
from prunekit.registry import SpecError

from tests.run_records import run_record

pytestmark = pytest.mark.smoke


def test_overwriting_replaces_only_when_all_is_done(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "results.json").write_text("old")
    (target / "decisions.jsonl").write_text("old")
    with pytest.raises(KeyboardInterrupt), RunFolder(target, overwrite=True).open() as partial:
        (partial / "results.json").write_text("half")
        raise KeyboardInterrupt
    assert (target / "results.json").read_text() == "old"
    with RunFolder(target, overwrite=True).open() as partial:
        (partial / "results.json").write_text("new")
        assert (target / "results.json").read_text() == "old"
    assert (target / "results.json").read_text() == "new"
    assert not (target / "decisions.jsonl").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SpecError, match="No space left on device; make room"):
        with RunFolder(tmp_path / "run").open() as partial:
            Results(run_record(), "").write(partial)
    assert not list(tmp_path.iterdir())


def written(folder: Path, change=lambda data: data) -> Path:
    """A results folder whose results.json has been changed."""
    Results(run_record(), "").write(folder)
    path = folder / "results.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def test_results_are_read_back_as_they_were_written(tmp_path):
    assert read_results(written(tmp_path)) == run_record()
    assert read_results(written(tmp_path, lambda data: {**data, "later": 1})).as_json()["later"] == 1


def test_a_file_of_an_early_version_is_read(tmp_path):
    """Compensation, runtime and plugins came later; their absence is not made up for."""
    found = read_results(written(tmp_path))
    assert (found.compensation, found.runtime, found.calibration) == (None, {}, None)
    assert "compensation" not in found.as_json()


def test_values_that_json_does_not_know_are_texts(tmp_path):
    metric = {"evaluator": "odd", "label": "odd", "dense": {"x": float("inf")}, "pruned": {"x": float("nan"), "n": 1}}
    results = Results(run_record(metrics=[metric]), "")
    assert results.record.metrics[0].pruned == {"x": "nan", "n": 1}
    assert results.metrics["odd.x"]["dense"] == float("inf") and math.isnan(results.metrics["odd.x"]["pruned"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {**data, "format": 2}, r"has format 2, this version of prunekit reads 1; run the pipeline again"),
        (lambda data: [data], r"holds no results \(neither metrics nor runs\)"),
        (lambda data: {**data, "model": {"name": "x"}}, r"is damaged \(model\.parameters: is required, and 2 more\)"),
        (lambda data: {**data, "metrics": 7}, r"is damaged \(metrics: should be a valid list \(found 7\)\)"),
        (lambda data: {**data, "seconds": {"total": "long"}}, r"seconds\.total: .*found 'long'\)\); run the pipeline"),
        (lambda data: {"format": 1, "runs": [data]}, r"is damaged \(runs\.0\.pipeline: is required"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_in_one_sentence(tmp_path, change, message):
    folder = written(tmp_path, change)
    with pytest.raises(SpecError, match=message) as caught:
        read_results(folder)
    assert str(folder / "results.json") in str(caught.value) and "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("dense", "pruned", "rise"), [(50.0, 150.1, "3x"), (50.0, "inf", "infx"), (52.57, 1118, "21.3x")]
)
def test_a_perplexity_that_rose_far_is_a_damaged_model(dense, pruned, rise):
    (said,) = damage("perplexity 2", {"perplexity": dense}, {"perplexity": pruned})
    assert said.startswith(f"perplexity 2 rose {rise}, from {dense:.4g}") and "the model is damaged; cut less" in said


@pytest.mark.parametrize(("dense", "pruned"), [(50.0, 149.0), (None, 9.0), (50.0, None), ("nan", 9.0), (50.0, "nan")])
def test_other_models_are_not_called_damaged(dense, pruned):
    assert damage("perplexity", {"perplexity": dense}, {"perplexity": pruned, "loss": 99.0}) == []
    assert damage("cost", None, {"flops": 3.0}) == []


def test_a_place_that_takes_no_folder_is_named_with_the_reason():
    for target in ("/proc/run", "/proc/deep/run"):
        with pytest.raises(SpecError, match=r"/proc is not a folder that can be written to \(.+\); name another place"):
            RunFolder(Path(target)).check()
