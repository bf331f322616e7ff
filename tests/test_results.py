"""The results folder: whole or not there."""

import pytest
from prunekit.compress.results import RunFolder


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
