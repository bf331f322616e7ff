"""``prunekit compare``: what two runs differ in, and how sure the difference of their perplexities is."""

import json

import pytest
from prunekit.compress.cli.main import app
from prunekit.compress.output import printing
from prunekit.compress.reporting.compare import (
    compare,
    differences,
    intervals,
    origins,
    results,
    settings,
    unequal_costs,
)
from prunekit.compress.runs.records import EvaluatorResult, RunResult
from prunekit.registry import SpecError
from typer.testing import CliRunner


@pytest.fixture
def folder(tmp_path, run_data, resolved):
    def make(name, strategy="pp", change=None, **options):
        path = tmp_path / name
        path.mkdir()
        data = run_data(strategy, **options)
        if change:
            change(data)
        (path / "results.json").write_text(json.dumps(data))
        (path / "resolved.yaml").write_text(resolved(strategy))
        return path

    return make


@pytest.fixture
def shown(monkeypatch):
    """What is printed, on a terminal wide enough."""
    monkeypatch.setattr(printing, "out", printing.Console(width=200, record=True))
    return lambda: printing.out.export_text()


def test_two_runs_side_by_side(folder, shown):
    compare(folder("a"), folder("b", "wanda_sp"), samples=500, seed=3)
    text = shown()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "prune.use pp wanda_sp" in lines
    assert "model, machine and versions are the same" in lines
    assert "perplexity 24.00 33.60 34.75 x 1.03" in lines
    assert "prr - 369.2 336.0 x 0.91" in lines
    said = "perplexity: B - A = +1.152, at unequal cost (A used 70.0% of dense's FLOPs, B 68.0%), 95% interval +"
    assert said in " ".join(text.split()) and "which excludes 0" in text
    assert "30 windows, 500 samples, seed 3" in " ".join(text.split())


@pytest.mark.parametrize(
    ("b", "words"), [(0.159, ""), (0.2, ", at unequal cost (A removed 15.0% of the decoder's parameters, B 20.0%)")]
)
def test_cuts_that_differ_by_more_than_a_point_are_named(run_data, b, words):
    made = [run_data(), run_data()]
    for data, removed in zip(made, (0.15, b), strict=True):
        data["ratio"]["prunable_parameters_cut"] = removed
    assert unequal_costs(*map(RunResult.model_validate, made)) == words


def test_a_damaged_model_is_named(folder, shown, monkeypatch):
    said = []
    monkeypatch.setattr(printing, "warning", said.append)

    def damage(data):
        data["metrics"][0]["pruned"]["perplexity"] = 1118.0

    compare(folder("a"), folder("b", change=damage), samples=200)
    assert said == [
        "B: perplexity rose 46.6x, from 24.00 to 1,118: the model is damaged; cut less, or recover it "
        "(prunekit recover)"
    ]


def test_runs_that_are_the_same_say_so(folder, shown):
    compare(folder("a"), folder("b"), samples=200)
    text = shown()
    assert "settings are the same" in text and "which includes 0: the difference is not significant" in text


def other_ids(data):
    data["metrics"][0]["protocol"]["ids_sha256"] = "b" * 64


def other_model(data):
    data["model"]["fingerprint"] = "0" * 64


def no_windows(data):
    data["metrics"][0]["details"] = {}


def no_perplexity(data):
    del data["metrics"][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_ids, "the windows differ"),
        (other_model, "the dense models differ"),
        (no_windows, "no losses of single windows"),
        (no_perplexity, "share no perplexity"),
    ],
)
def test_what_cannot_be_paired_gets_no_interval(folder, shown, change, why):
    compare(folder("a"), folder("b", "flap", change), samples=200)
    assert why in shown() and "95%" not in shown()


def test_a_different_model_and_version_are_named(run_data):
    a, b = run_data(), run_data()
    b["versions"]["torch"], b["model"]["fingerprint"] = "2.14.0", "0" * 64
    found = {key: (one, other) for key, one, other in origins(*map(RunResult.model_validate, (a, b)))}
    assert found == {"version of torch": ("2.13.0", "2.14.0"), "model fingerprint": ("f" * 12, "0" * 12)}


def test_settings_are_compared_by_name_and_parts_once():
    a = "prune: {use: pp, selector: {name: x, rows: 0.1}}\nevaluate: [{name: cost}, {name: perplexity, window: 5}]"
    b = "prune: {use: pp, selector: null}\nevaluate: [{name: perplexity, window: 6}, {name: cost}]\noutput: {dir: x}"
    assert settings(a, b) == [
        ("prune.selector.name", "x", "-"), ("prune.selector.rows", "0.1", "-"), ("evaluate.perplexity.window", "5", "6")
    ]  # fmt: skip


def test_windows_of_few_are_warned_about(run_data):
    a, b = run_data("pp"), run_data("flap")
    for data in (a, b):
        sides = data["metrics"][0]["details"]["pruned"]
        sides.update({key: values[:4] for key, values in sides.items()})
    assert "With only 4 windows" in intervals(*map(RunResult.model_validate, (a, b)), 100, 0)[0]


def test_folders_that_hold_no_single_run_are_refused(folder, tmp_path, run_data):
    with pytest.raises(SpecError, match="not a results folder"):
        compare(folder("a"), tmp_path)
    (tmp_path / "study.sqlite").touch()
    with pytest.raises(SpecError, match=r"study.sqlite is a file, .*two folders .*prunekit run; prunekit report shows"):
        compare(tmp_path / "a", tmp_path / "study.sqlite")
    demo = tmp_path / "demo"
    demo.mkdir()
    run = {**run_data(), "pipeline": "pipelines/a.yaml", "situation": "other"}
    (demo / "results.json").write_text(json.dumps({"format": 1, "runs": [run]}))
    with pytest.raises(SpecError, match=r"holds 1 runs.*prunekit report"):
        compare(tmp_path / "a", demo)
    assert CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]).exit_code == 2


def other_limit(data):
    data["metrics"][0]["protocol"] |= {"limit": 20, "windows": 20, "tokens": 2559, "ids_sha256": "b" * 64}


def other_length(data):
    data["metrics"][2]["protocol"] |= {"length": 128, "torch": "2.14.0"}


def test_what_was_measured_otherwise_gets_no_relation(folder, shown):
    def change(data):
        other_limit(data)
        other_length(data)

    compare(folder("a"), folder("b", "wanda_sp", change), samples=200)
    text = shown()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "perplexity 24.00 33.60 34.75 -" in lines
    assert "perplexity: A and B do not compare: limit - against 20" in lines
    assert "cost: A and B do not compare: length 256 against 128" in lines
    assert "cost: parameters 1,000 700 700 same" in lines  # of the model, not of a text
    assert "zero shot: boolq 0.700 65.0% ± 2.0 65.0% ± 2.0 same" in lines


def test_machine_times_and_other_tasks_do_not_forbid_a_relation(outcome, run_result):
    tasks = {"boolq": {"documents": 10}, "piqa": {"documents": 20}}
    fewer = {"boolq": {"documents": 10}, "piqa": {"documents": 5}}
    a = [
        outcome("zero_shot", None, {"boolq": 0.5, "piqa": 0.5, "mean": 0.5}, {"tasks": tasks}),
        outcome("latency", None, {"prefill_ratio": 0.5, "decode_ratio": 0.5}, {"threads": 1, "decode_steps": 4}),
    ]  # fmt: skip
    b = [
        outcome("zero_shot", None, {"boolq": 0.6, "piqa": 0.6, "mean": 0.6}, {"tasks": fewer}),
        outcome("latency", None, {"prefill_ratio": 0.6, "decode_ratio": 0.6}, {"threads": 2, "decode_steps": 8}),
    ]  # fmt: skip
    runs = [run_result().model_copy(update={"metrics": [EvaluatorResult(**one) for one in side]}) for side in (a, b)]
    assert {row[0]: row[-1] for row in results(*runs)} == {
        "zero shot: boolq": "x 1.2", "zero shot: piqa": "-", "zero shot: mean": "-",
        "latency: prefill ratio": "x 1.2", "latency: decode ratio": "-",
    }  # fmt: skip


def test_the_same_tokens_compare_whatever_their_limit_or_seed_was(run_data):
    a, b = run_data(), run_data("flap")
    b["metrics"][0]["protocol"]["limit"] = 500
    for data, seed in ((a, 0), (b, 1)):
        data["metrics"][2]["protocol"]["text"] = f"random ids, seed {seed}"
    assert differences(*map(RunResult.model_validate, (a, b))) == []
