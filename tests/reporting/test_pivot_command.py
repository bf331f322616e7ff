"""``prunekit pivot``: stores read, axes understood, tables printed, a folder whole or not at all."""

import csv
import errno
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prunekit.compress.ablation.store import Store
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.worker import Outcome
from prunekit.compress.cli.main import app
from prunekit.compress.reporting.pivot import cross, join
from prunekit.compress.reporting.pivot_tables import notes, protocol
from prunekit.compress.runs.records import RunResult
from prunekit.registry import SpecError
from typer.testing import CliRunner

STUDY = """\
title: Made
base: {evaluate: [perplexity]}
vary:
  prune.use: [pp, flap]
  prune.ratio: [0.2, 0.4]
  text:
    far: {calibration.bundled: docstrings-calibration}
    near: {calibration.bundled: reference-calibration}
  history:
    "yes, all": {}
  seed: [0, 1]
"""


@pytest.fixture
def store(tmp_path, run_data, resolved):
    """A store of the study, one trial of it failed; ``finished`` says whether any ran."""

    def make(name="small", finished=True, harm=1.0):
        path = tmp_path / f"{name}.yaml"
        path.write_text(STUDY)
        study = Study.load(path)
        with Store.create_or_resume(path.with_suffix(".sqlite"), study) as made:
            for planned in study.trials if finished else ():
                use, ratio, seed = (planned.settings[key] for key in ("prune.use", "prune.ratio", "seed"))
                data = run_data(use, ratio, seed, harm=harm * (1.2 if use == "flap" else 1.0))
                data["metrics"] = [found for found in data["metrics"] if found["label"] in ("perplexity", "prr")]
                done = Outcome(RunResult.model_validate(data), resolved(use, ratio), None, 1.0)
                last = planned.number == len(study.trials)
                made.record(planned.key, Outcome(None, None, "no room", 1.0) if last else done)
        return path.with_suffix(".sqlite")

    return make


def command(*arguments, rows="strategy", columns="ratio"):
    done = CliRunner().invoke(app, ["pivot", *map(str, arguments), "--rows", rows, "--columns", columns])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_the_tables_are_printed_and_written(store, tmp_path):
    source, out = store(), tmp_path / "made" / "cross"
    code, said = command(source, "--by", "text", "--out", out)
    assert code == 0, said
    assert said.startswith("perplexity, ratio to dense text far strategy \\ ratio 20% 40%")
    assert "text near" in said and "Over all of text" in said and "1 failed" in said
    assert "geometric mean of the ratio to the dense model in the same trial" in said and "window: 128" in said
    names = {"pivot", "pivot-text-far", "pivot-text-near"}
    assert {path.name for path in out.iterdir()} == {"pivot.md", "pivot.csv", "plots"}
    assert {path.name for path in (out / "plots").iterdir()} == {f"{n}.{end}" for n in names for end in ("svg", "png")}
    rows = list(csv.DictReader((out / "pivot.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["text"] for row in rows] == 4 * ["far"] + 4 * ["near"] + 4 * ["all"]
    last = rows[-1]
    assert (last["prune.use"], last["prune.ratio"], last["trials"], last["planned"], last["failed"]) == (
        "flap", "0.4", "3", "4", "1"
    )  # fmt: skip
    assert rows[0]["mark"] == "best" and float(rows[0]["least"]) <= float(rows[0]["value"]) <= float(rows[0]["largest"])
    page = (out / "pivot.md").read_text(encoding="utf-8")
    assert (
        page.count("![") == 3
        and "| **1.20" in page
        and "n 3, 1 failed, 40.0% removed)" in page
        and "## How it was measured" in page
    )


def test_an_existing_folder_is_replaced_only_when_asked(store, tmp_path):
    source, out = store(), tmp_path / "out"
    assert command(source, "--out", out)[0] == 0
    code, said = command(source, "--out", out)
    assert code == 2 and "exists; choose another with --out, or replace it with --overwrite" in said
    assert command(source, "--out", out, "--overwrite")[0] == 0
    svg = (out / "plots" / "pivot.svg").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert (
        len(ids) == len(set(ids))
        and ">FLAP<" in svg
        and "n 3, 1 failed" in svg
        and "40.0% removed" in svg
        and "ratio to dense" in svg
    )


def test_several_stores_get_an_axis(store):
    small, large = store(), store("large", harm=1.5)
    code, said = command(small, large, rows="store")
    assert code == 0 and "store \\ ratio 20% 40%" in said and "small" in said and "large" in said
    code, said = command(small, large)
    assert "Averaged over store (small, large); text (far, near); history (yes, all); seed (0, 1)" in said
    assert "over 4 groups (store x text, each the mean over seed)" in said
    code, said = command(small, small)
    assert code == 2 and "stores are distinguished by their files' names, which must differ: small, small" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--by", "txt"),
            ("--by: there is no axis 'txt' (did you mean 'text'?", "the axes are prune.use, prune.ratio"),
        ),
        (("--by", "prune.use"), ("--rows and --by are the same axis, prune.use",)),
        (("--metric", "perplexity.perplexty"), ("nothing measured 'perplexity.perplexty' (did you mean 'perplexity.",)),
        (("--metric", "prr.prr"), ("prr.prr has no value for the dense model; name a reference with --relative",)),
        (("--relative", "text=fa"), ("--relative: text has no value 'fa' (did you mean 'far'?); it has far, near",)),
        (("--relative", "text"), ("'text' is neither dense nor AXIS=VALUE",)),
        (("--relative", "txt=far"), ("--relative: there is no axis 'txt' (did you mean 'text'?",)),
        (("--relative", "text=far,text=near"), ("--relative: text is named twice",)),
        (("--relative", "prune.use=flap,ratio=40%,text=near,seed=1"), ("(1 planned, none is finished)",)),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(arguments, words, store, tmp_path):
    code, said = command(store(), *arguments, "--out", tmp_path / "out")
    assert code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_an_empty_store_says_so(store, tmp_path):
    code, said = command(store(finished=False))
    assert code == 2 and "no trial is finished (0 of 16 trials done, 16 waiting)" in said
    code, said = command(tmp_path / "nowhere.sqlite")
    assert code == 2 and "there is no" in said


def test_a_full_disk_leaves_nothing(store, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = store()
    monkeypatch.setattr(Path, "write_bytes", full)
    code, said = command(source, "--out", tmp_path / "deep" / "out")
    assert code == 2 and "cannot be written: No space left on device; make room there" in said
    assert not (tmp_path / "deep").exists()


def test_references_are_named_as_files_and_reports_spell_them(make_study):
    source = make_study(["pp", "flap"], seeds=(0, 1))
    trials = tuple(replace(t, settings={**t.settings, "of": "a, b", "rows": [1, 2]}) for t in source.trials)
    grid = join([replace(source, trials=trials)])
    asked = "strategy=PP,prune.ratio=40%,seed=1,of=a, b,rows=[1, 2]"
    found = {"prune.use": "pp", "prune.ratio": 0.4, "seed": 1, "of": "a, b", "rows": [1, 2]}
    assert grid.relative(asked) == found and grid.relative("dense") == {}
    assert grid.relative("strategy=flap,ratio=0.20") == {"prune.use": "flap", "prune.ratio": 0.2}
    with pytest.raises(SpecError, match="no such combination was planned"):
        join([replace(source, trials=source.trials[:6])]).relative("strategy=flap,ratio=0.4")


def test_studies_that_vary_different_fields_are_matched_by_their_pipelines(make_study):
    first = replace(make_study(["pp"], [0.4]), source=Path("a.sqlite"))
    second = make_study(["pp"], [0.4])
    trials = tuple(replace(t, settings={**t.settings, "evaluate.perplexity.window": 128}) for t in second.trials)
    grid = join([first, replace(second, source=Path("b.sqlite"), trials=trials)])
    assert [trial.settings for trial in grid.study.trials] == [
        {"store": name, "prune.use": "pp", "prune.ratio": 0.4, "seed": 0, "evaluate.perplexity.window": 128}
        for name in ("a", "b")
    ]
    assert grid.conditions == ("store", "evaluate.perplexity.window")
    with pytest.raises(SpecError, match="must differ: a, a"):
        join([first, first])
    with pytest.raises(SpecError, match="has its own axis 'store'"):
        join([first, replace(second, axes={"store": ["x"]})])


def test_trials_that_cannot_be_distinguished_or_compared_are_named(make_study):
    source = make_study(["pp", "flap"], [0.4])
    grid = join([replace(source, trials=(*source.trials, replace(source.trials[0], number=9)))])
    with pytest.raises(SpecError, match="trials 1 and 9 have the same settings"):
        cross(grid, grid.question("strategy", "ratio"))
    outside = replace(source.trials[0], number=9, settings={"seed": 5}, resolved=None)
    source.trials[1].metric("perplexity").protocol["window"] = 64
    grid = join([replace(source, trials=(*source.trials, outside))])
    question = grid.question("strategy", "ratio", relative="strategy=pp")
    tables = cross(grid, question)
    different = "Measured differently from the reference, which does not compare: window 64 against 128."
    assert different in protocol(question, tables)
    assert "; trials without a value of both axes: 1." in notes(tables[0])[0]
