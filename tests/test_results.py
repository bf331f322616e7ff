"""The results folder: whole or not there."""

import errno
from pathlib import Path

import pytest
from prunekit.compress.output.folders import RunFolder
from prunekit.compress.runs.results import Results
from prunekit.registry import SpecError

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
            Results({"metrics": []}, "").write(partial)
    assert not list(tmp_path.iterdir())
