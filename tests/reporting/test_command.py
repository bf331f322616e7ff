"""``prunekit report``: the folder of a report."""

import csv
import io
import json

import pytest
from prunekit.compress.cli import app
from prunekit.compress.reporting import command
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.tables import latex, markdown, table_csv, trials_csv
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
    before = (folder / "report.html").read_bytes()
    command.report(run_folder, overwrite=True)
    assert (folder / "report.html").read_bytes() == before
    page = before.decode()
    assert "PP at 40% moves perplexity from 24.00 to 33.60 with 70% of dense&#39;s operations." in page
    assert "skip_layers" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.run", "my.run-report"]


def test_only_reports_are_replaced_and_failures_leave_nothing(run_folder, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"is no report \(no report.html in it\)"):
        command.report(run_folder, run_folder, overwrite=True)
    monkeypatch.setattr(command, "html", lambda table, plots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.report(run_folder, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.run"]


@pytest.mark.parametrize("wrong", ["nowhere", "."])
def test_the_command_exits_with_2(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["report", wrong, "--out", "out"]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_markdown_and_latex_hold_the_same_cells(make_findings):
    failed = ({"prune.use": "flap", "prune.ratio": 0.9, "seed": 0}, "failed", None, None, "no room\nfor 90%")
    table = tabulate(make_findings(["pp", "flap"], extra=[failed]))
    text, tex = markdown(table, []), latex(table)
    assert "| **33.60** " in text and "& \\textbf{33.60} &" in tex
    assert "| dense " in text and "dense &  & 24.00 & 61.0\\% & 100\\%" in tex
    assert "- FLAP, 90%, seed 0: no room for 90%" in text
    assert "\\toprule" in tex and tex.count("\\midrule") == 3 and "\\bottomrule" in tex
    assert all(line.count("&") == 1 + len(table.columns) for line in tex.splitlines() if line.endswith("\\\\"))


def test_csv_has_every_value_by_trial_and_by_configuration(make_findings):
    failed = ({"prune.use": "flap", "prune.ratio": 0.9, "seed": 0}, "failed", None, None, "=1+1")
    findings = make_findings(["pp", "flap"], seeds=(0, 1), extra=[failed])
    table = tabulate(findings)
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
