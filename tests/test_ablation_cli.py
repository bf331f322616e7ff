"""``prunekit ablate``: exit codes, messages, and that an interruption or a failure loses nothing."""

from dataclasses import replace

import pytest
from prunekit.compress.ablation.store import Store
from prunekit.compress.cli import main
from typer.testing import CliRunner

PLUGIN = '''
from pathlib import Path
from typing import Literal
from prunekit.registry import Evaluator, Measurement, hookimpl

class Moody(Evaluator):
    """Does what a file beside it says."""
    name: Literal["moody"] = "moody"
    def evaluate(self, subject):
        mood = Path(__file__).with_name("mood").read_text().split()
        size = subject.parameters()
        if f"fail-{size}" in mood:
            raise RuntimeError("bad mood")
        if f"stop-{size}" in mood:
            raise KeyboardInterrupt
        return Measurement({"size": size}, {})

@hookimpl
def evaluators(): return [Moody]
'''

STUDY = """\
title: Moods
base: {plugins: [moody.py], prune: {use: random, seed: 3}, evaluate: [moody]}
vary: {prune.ratio: [0.2, 0.4, 0.6]}
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs ``prunekit ablate`` in a folder that holds a study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_BLOCK", raising=False)
    (tmp_path / "moody.py").write_text(PLUGIN)
    (tmp_path / "mood").write_text("")
    (tmp_path / "moods.yaml").write_text(STUDY)
    return lambda *options: CliRunner().invoke(main.app, ["ablate", "moods.yaml", *map(str, options)])


@pytest.fixture
def sizes(command, tmp_path):
    """The size that each trial measures, from a run that went well."""
    result = command("--out", "first.sqlite")
    assert result.exit_code == 0, result.output
    with Store.open(tmp_path / "first.sqlite") as store:
        return [trial.result.metrics[0].pruned["size"] for trial in store.trials]


def refused(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error:") == 1
    text = " ".join(result.stderr.split())
    assert all(word in text for word in words), text


def statuses(path):
    with Store.open(path) as store:
        return [trial.status for trial in store.trials]


def test_a_study_from_start_to_end_and_once_more(command, tmp_path):
    result = command()
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Moods: 3 trials\n")
    assert "60%" in result.stdout
    assert result.stdout.rstrip().endswith("makes pages, tables and plots of them")
    assert statuses(tmp_path / "results" / "moods.sqlite") == ["done"] * 3
    again = command()
    assert again.stdout.startswith("Moods: 3 trials, 3 done, 0 to run\n")
    assert again.stdout.splitlines()[1:] == result.stdout.splitlines()[1:]


def test_failures_are_told_and_retried_when_asked(command, sizes, tmp_path):
    (tmp_path / "mood").write_text(f"fail-{sizes[1]}")
    result = command()
    assert result.exit_code == 1, result.output
    named = "evaluator 'moody' of plugin file moody.py raised RuntimeError: bad mood (moody.py line"
    assert f"trial 2 (0.4) failed: {named}" in result.stderr
    assert "1 of 3 trials failed; --retry runs them again" in result.stdout
    (tmp_path / "mood").write_text("")
    result = command()
    assert result.exit_code == 1
    assert "0 to run, 1 failed before (--retry runs them again)" in result.stdout
    result = command("--retry")
    assert result.exit_code == 0, result.output
    assert statuses(tmp_path / "results" / "moods.sqlite") == ["done"] * 3


def test_all_trials_may_fail(command, tmp_path):
    (tmp_path / "mood").unlink()
    result = command()
    assert result.exit_code == 1
    assert "3 of 3 trials failed" in result.stdout
    assert result.stderr.count("warning: ") == 1
    assert (
        "warning: trials 1 (0.2), 2 (0.4), 3 (0.6) failed: evaluator moody cannot measure: FileNotFoundError"
        in result.stderr
    )
    assert "2/3 trial 2 (0.4): failed (evaluator moody cannot measure: FileNotFoundError" in result.stderr


def test_what_must_fail_here_is_told_before_a_store_is_begun(command, tmp_path):
    refused(command("--set", "vary.model.device=[cpu, gpu]"), "vary.model.device.1: 'gpu' is not a device", "(trials ")
    assert not (tmp_path / "results").exists()
    assert command().exit_code == 0  # the fixed file finds no store of another version


def test_a_part_of_the_trials_is_said_to_be_one(command, sizes, tmp_path):
    (tmp_path / "mood").write_text(f"fail-{sizes[1]}")
    assert "\n2 of 3 trials are done\n" in command().stdout


def test_a_published_value_that_nothing_measures_is_told(command, tmp_path):
    entry = "published: [{where: {}, metric: moody.siez, value: 1, source: a}]\n"
    (tmp_path / "moods.yaml").write_text(STUDY + entry)
    result = command()
    assert result.exit_code == 0, result.output
    assert "warning: published.0.metric: moody has no value siez (did you mean 'size'?" in result.stderr


def test_an_interruption_keeps_what_is_finished_and_says_how_to_go_on(command, sizes, tmp_path):
    (tmp_path / "mood").write_text(f"stop-{sizes[2]}")
    result = command()
    assert result.exit_code == 130
    assert "interrupted; 2 of 3 trials are finished and stored in" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert "nothing was written" not in result.stderr
    (tmp_path / "mood").write_text("")
    assert "3 trials, 2 done, 1 to run" in command().stdout


def test_a_changed_file_stops_until_update_is_said(command, sizes, tmp_path):
    (tmp_path / "moods.yaml").write_text(STUDY.replace("0.6", "0.1"))
    refused(command("--out", "first.sqlite"), "axis prune.ratio: new 0.1; gone 0.6", "2 of its 3 finished", "--update")
    result = command("--out", "first.sqlite", "--update")
    assert result.exit_code == 0, result.output
    assert "3 trials, 2 done, 1 to run" in result.stdout
    refused(command("--out", "first.sqlite", "--set", "prune.seed=4"), "prune.seed: 3 -> 4")


def test_mistakes_stop_it_before_anything_is_made(command, tmp_path):
    refused(command("--set", "vary.prune.rato=[1]"), "there is no field 'prune.rato' (did you mean 'prune.ratio'?")
    refused(command("--engine", "rai"), "--engine: there is no 'rai' (did you mean 'ray'?")
    refused(command("--workers", "2"), "--workers is for --engine ray")
    refused(command("--address", "auto"), "--address is for --engine ray")
    refused(command("--out", tmp_path), "is a folder")
    refused(command("--out", "moods.yaml"), "not a results store")
    refused(command("--plugin", "none.py"), "none.py does not exist")
    assert not (tmp_path / "results").exists()


def test_a_full_disk_stops_it_and_keeps_what_is_stored(command, tmp_path, monkeypatch):
    from prunekit.compress.ablation import store as module

    record = module.Store.record

    def fill(self, key, outcome):
        pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
        if outcome.result.ratio.asked == 0.4:
            self._connection.execute(f"PRAGMA max_page_count = {pages}")
            outcome = replace(outcome, result=outcome.result.model_copy(update={"notes": ["x" * 100_000]}))
        record(self, key, outcome)

    monkeypatch.setattr(module.Store, "record", fill)
    refused(command(), "is full; free some space and run the same command again")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert statuses(tmp_path / "results" / "moods.sqlite") == ["done", "waiting", "waiting"]
    assert "3 trials, 1 done, 2 to run" in command().stdout


def test_other_versions_are_told(command, sizes, monkeypatch):
    monkeypatch.setattr("prunekit.compress.ablation.command.versions", lambda: {"torch": "99.0"})
    assert "begun with other versions: torch" in " ".join(command("--out", "first.sqlite").stderr.split())
