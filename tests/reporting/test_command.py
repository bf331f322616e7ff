"""``prunekit report``: the folder of a report."""

import csv
import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from prunekit.compress.cli.main import app
from prunekit.compress.reporting import command
from prunekit.compress.reporting.page import html, markdown
from prunekit.compress.reporting.plots import draw
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import csv_text, latex, table_csv, trials_csv
from prunekit.registry import SpecError
from typer.testing import CliRunner

FILES = {"report.html", "report.md", "table.csv", "table.tex", "trials.csv", "plots"}


@pytest.fixture
def run_folder(tmp_path, run_data, resolved):
    folder = tmp_path / "my.run"
    folder.mkdir()
    data = run_data()
    data["metrics"] = [o for o in data["metrics"] if o["label"] in ("perplexity", "cost")]
    (folder / "results.json").write_text(json.dumps(data))
    (folder / "resolved.yaml").write_text(resolved())
    return folder


def test_a_run_gets_a_report_beside_it(run_folder, tmp_path, capsys):
    done = CliRunner().invoke(app, ["report", str(run_folder)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "my.run-report"
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".png", ".svg"}
    again = CliRunner().invoke(app, ["report", str(run_folder)])
    assert again.exit_code == 2
    command.report(run_folder, overwrite=True)
    before = (folder / "report.html").read_bytes()
    page = before.decode()
    assert "At a requested ratio of 40%, PP changes perplexity from 24.00 to 33.60." in page
    assert "PP removed 40.0% of the decoder&#39;s parameters and used 70.0% of dense&#39;s FLOPs." in page
    assert "skip_layers" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.run", "my.run-report"]


def test_only_reports_are_replaced_and_failures_leave_nothing(run_folder, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"is not a report \(no report.html in it\)"):
        command.report(run_folder, run_folder, overwrite=True)
    monkeypatch.setattr(command, "html", lambda summary, plots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.report(run_folder, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.run"]


@pytest.mark.parametrize("kind", ["write_text", "write_bytes"])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(kind, run_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, kind, full)
    done = CliRunner().invoke(app, ["report", str(run_folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and done.exception.__class__ is SystemExit
    said = " ".join(done.output.split())
    assert "cannot be written: No space left on device; make room there, or name another place with --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["my.run"]


def test_overwriting_is_advised_only_where_it_helps(run_folder, tmp_path):
    (tmp_path / "file").touch()
    for taken in ("file", "my.run"):
        with pytest.raises(SpecError, match=r"is not a report .*not replaced, even with --overwrite; choose"):
            command.report(run_folder, tmp_path / taken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="or replace it with --overwrite"):
        command.report(run_folder, tmp_path / "empty")


def test_an_unfinished_study_says_how_far_it_is(make_study, tmp_path, monkeypatch, capsys):
    waiting = ({"prune.use": "flap", "prune.ratio": 0.9, "seed": 0}, "waiting", None, None, None)
    failed = (waiting[0], "failed", None, None, "no room")
    source = make_study(["pp"], extra=[waiting, failed])
    monkeypatch.setattr(command, "read", lambda _: source)
    monkeypatch.setattr(command, "draw", lambda summary: [])
    command.report(tmp_path / "study.sqlite", tmp_path / "out")
    said = "2 of 4 trials done, 1 failed, 1 waiting."
    assert said in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert said in page[page.index("</h1>") :][:200]


@pytest.mark.parametrize("wrong", ["nowhere", "."])
def test_the_command_exits_with_2(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["report", wrong, "--out", "out"]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_markdown_and_latex_hold_the_same_cells(make_study):
    failed = ({"prune.use": "flap", "prune.ratio": 0.9, "seed": 0}, "failed", None, None, "no room\nfor 90%")
    table = summarise(make_study(["pp", "flap"], extra=[failed]))
    text, tex = markdown(table, []), latex(table)
    assert "| **33.60** " in text and "& \\textbf{33.60} &" in tex
    assert "| dense " in text and "dense &  & 0.0\\% & 24.00 & 61.0\\% & 100.0\\%" in tex
    assert "- FLAP (90%, seed = 0): no room for 90%" in text
    assert "\\toprule" in tex and tex.count("\\midrule") == 3 and "\\bottomrule" in tex
    assert all(line.count("&") == 1 + len(table.metrics) for line in tex.splitlines() if line.endswith("\\\\"))


HOSTILE = "<script>alert(1)</script> $\\frac{1}{$ [x](y) **b** `c`"


def test_a_strangers_text_is_text_in_every_file(make_study):
    source = make_study(["pp", "flap"])
    trials = [
        replace(t, settings={**t.settings, "prune.use": HOSTILE[:-1] + t.settings["prune.use"]}) for t in source.trials
    ]
    table = summarise(replace(source, title=HOSTILE, trials=tuple(trials), axes={}))
    plots = draw(table)  # a dollar sign does not start mathematics
    assert any("$\\frac{1}{$" in plot.svg for plot in plots)
    page, text, tex = html(table, plots), markdown(table, plots), latex(table)
    assert "<script>alert" not in page + text
    assert text.startswith("# &lt;script>alert(1)&lt;/script> $\\\\frac{1}{$ \\[x\\](y) \\*\\*b\\*\\* \\`c\\`\n")
    assert "\\$\\textbackslash{}frac\\{1\\}\\{\\$" in tex and "\\textless{}script" in tex


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_and_no_title_of_a_csv_is_a_formula(start):
    frame = pd.DataFrame([[f"{start}cmd", -1.5]], columns=[f"{start}axis", "value"], dtype=object)
    head, row = list(csv.reader(io.StringIO(csv_text(frame), newline="")))
    assert head == [f"'{start}axis".replace("\r", " "), "value"] and row == [f"'{start}cmd".replace("\r", " "), "-1.5"]


def test_csv_has_every_value_by_trial_and_by_configuration(make_study):
    failed = ({"prune.use": "flap", "prune.ratio": 0.9, "seed": 0}, "failed", None, None, "=1+1")
    source = make_study(["pp", "flap"], seeds=(0, 1), extra=[failed])
    table = summarise(source)
    trials = list(csv.DictReader(io.StringIO(trials_csv(table))))
    assert len(trials) == 9
    assert (trials[0]["prune.use"], trials[0]["seed"], trials[0]["status"]) == ("pp", "0", "done")
    assert float(trials[0]["perplexity.perplexity.dense"]) == pytest.approx(24)
    assert trials[0]["zero_shot.boolq"] == "0.65" and trials[0]["strangers_own.shape"] == "round"
    assert trials[8]["error"] == "'=1+1" and trials[8]["cost.flops"] == ""
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert [row["kind"] for row in rows] == ["dense"] + 4 * ["pruned"]
    assert rows[1]["trials"] == "2" and float(rows[1]["perplexity.perplexity.sd"]) > 0
    values = [float(t["perplexity.perplexity"]) for t in trials[:2]]
    assert float(rows[1]["perplexity.perplexity"]) == pytest.approx(sum(values) / 2)
