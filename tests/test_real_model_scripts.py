"""The scripts of docs/results/real-model run at toy size on the bundled model."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prunekit.compress import calibration_batches
from prunekit.compress.bundled import MODEL, TEXTS
from prunekit.registry import SiteCovariance
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.scripts import run_script

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results" / "real-model"
TEXT = TEXTS["docstrings-calibration"]
TOY = ("--model", "bundled", "--sequences", "2", "--length", "32", "--threads", "1")


def script(name: str, *arguments: str) -> SimpleNamespace:
    return run_script(FOLDER / name, *arguments, *TOY)


def tables(done: SimpleNamespace) -> list[list[list[str]]]:
    """The rows of every table, heads included, rules left out."""
    assert done.returncode == 0, done.stderr
    blocks = re.findall(r"(?:^\|.*\n)+", done.stdout, flags=re.MULTILINE)
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [[row for number, row in enumerate(rows) if number != 1] for rows in split]


def test_where_the_energy_is_and_what_its_cut_costs():
    toy = ("--rows", "1", "--much", "0.05", "--times", "3")
    (head, *shares), (_, *costs), (_, *at_once) = tables(script("massive.py", str(TEXT), *toy))
    assert head == ["layer", "first token", "massive tokens per sequence", "their share", "top channel", "which"]
    assert [row[0] for row in shares] == [str(layer) for layer in range(8)]
    tried = [row[0] for row in shares if float(row[4]) > 0.05]
    assert tried == [row[0] for row in costs] and tried
    scores = ["PPsp", "PPsp without massive tokens", "Wanda-sp", "Wanda-sp without massive tokens"]
    assert [row[0] for row in at_once] == scores
    assert all(float(row[1]) > 0 for row in at_once)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    ids = calibration_batches(tokenizer, TEXT.read_text(encoding="utf-8"), 3, 32)[0]["input_ids"][:2]
    down, seen = model.model.layers[1].mlp.down_proj, []
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        energy = torch.einsum("btc,oc->btc", seen[0].square(), down.weight.square())
    tokens = energy.sum(2)
    massive = tokens > 3 * tokens.median()
    expected = [tokens[:, 0].sum(), massive.sum() / 2 * tokens.sum(), tokens[massive].sum(), energy.sum((0, 1)).max()]
    found = [float(cell) for cell in shares[1][1:5]]
    assert found == pytest.approx([float(value / tokens.sum()) for value in expected], abs=6e-4)
    assert int(shares[1][5]) == int(energy.sum((0, 1)).argmax())


def test_cuts_of_single_sites_and_of_all(tmp_path):
    plot = tmp_path / "sites.svg"
    done = script("sites.py", str(TEXT), "--rows", "1", "--greedy", "--plot", str(plot))
    attention, mlp, (_, *all_cut) = tables(done)
    assert attention[0][1:] == [f"{dropped} of 5" for dropped in range(1, 6)]
    assert mlp[0][1:] == [f"{dropped} of 512" for dropped in (102, 205, 307, 410, 512)]
    assert float(mlp[1][5]) > 0.5 > float(mlp[1][1])  # the first MLP: all of it, and a fifth
    assert [row[0] for row in all_cut] == ["uniform", "sensitivity", "greedy"]
    assert {row[1] for row in all_cut} == {"40.0%"}
    assert float(all_cut[1][2]) <= min(float(all_cut[0][2]), float(all_cut[2][2])) + 0.01  # what it minimises
    assert "Attention: share" in plot.read_text(encoding="utf-8")


def test_least_squares_by_tokens_ridge_and_kind():
    measure = ("--measure", str(TEXTS["reference-evaluation"]), "--windows", "3")
    done = script("slopes.py", str(TEXT), *measure, "--skip", "0", "--more", "4", "--ridges", "0.1", "1e7")
    (head, *rows), (parts, values) = tables(done)
    assert head == ["tokens", "per MLP channel", "none", "mean", "ridge 0.1", "ridge 1e+07", "default ridge"]
    assert [row[:2] for row in rows] == [["64", "0.1"], ["128", "0.2"]]
    for _, _, none, mean, fitted, damped, _ in rows:
        assert mean == damped != none  # so large a ridge leaves no slope
        assert fitted not in (none, mean)
    assert parts == ["tokens", "held out", "attention alone", "mlp alone"]
    assert values[0] == "128" and rows[1][2] not in values[2:]


def test_least_squares_in_one_kind_leaves_the_other_alone(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    in_four = importlib.import_module("slopes").LeastSquaresIn(channels=4, ridge=0.1)
    assert in_four.mean(torch.ones(4), None).tolist() == [1] * 4
    assert in_four.mean(torch.ones(5), None).tolist() == [0] * 5
    assert in_four.prepare(SiteCovariance(torch.eye(4), 99, torch.tensor([0, 1]), True)) is not None
    assert in_four.prepare(SiteCovariance(torch.eye(5), 99, torch.tensor([0, 1]), True)) is None


def test_massive_tokens_limited_and_apart():
    measure = ("--measure", str(TEXTS["reference-evaluation"]), "--windows", "2")
    ((head, *rows),) = tables(script("robust.py", str(TEXT), *measure, "--skip", "0", "--times", "1", "1e9"))
    assert head == ["massive tokens", "score", "PPsp, least squares from them"]
    own, _, tight, loose = rows
    assert [row[0] for row in rows] == ["PPsp", "apart", "limited to 1", "limited to 1e+09"]
    assert own[1:] == loose[1:]  # such a limit changes nothing
    assert own[1] != tight[1] and own[2] != tight[2]


def test_how_tokens_are_limited(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    robust = importlib.import_module("robust")
    x = torch.ones(1, 5, 1)
    x[0, 0] = 20  # 400 times the median's square
    assert robust.limited(x, 9).flatten().tolist() == [3, 1, 1, 1, 1]
    assert robust.apart(x).flatten().tolist() == [2, 1, 1, 1, 1]  # 2 squared is the sum of the others' squares


def test_a_study_is_drawn_worst_rows_last(tmp_path):
    trials = tmp_path / "trials.csv"
    head = "strategy,text,prune.ratio,status,perplexity.perplexity,perplexity.perplexity.dense\n"
    rows = ["b,x,0.4,done,90,30", "b,y,0.4,done,200,30", "a,x,0.4,done,95,30", "a,y,0.4,done,99,30", "a,x,0.2,failed,,"]
    trials.write_text(head + "\n".join(rows), encoding="utf-8")
    plot = tmp_path / "plot.svg"
    assert run_script(FOLDER / "dots.py", str(trials), str(plot)).returncode == 0
    drawn = re.findall(r">([^<>]+)</text>", plot.read_text(encoding="utf-8"))
    assert drawn.index("a") < drawn.index("b") and "40% cut" in drawn and "20% cut" not in drawn


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        (("sites.py", str(TEXT), str(TEXT), str(TEXT)), "2 sequences cannot be shared equally by 3 texts"),
        (("massive.py", "no-such-text.txt"), "no-such-text.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, stated):
    done = script(*arguments)
    assert done.returncode == 2
    assert stated in done.stderr and "Traceback" not in done.stderr
