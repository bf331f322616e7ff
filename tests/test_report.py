"""Reports: numbers as people read them, tables, and the demo's sentences, whoever wins."""

import json

import pytest
from prunekit.compress.ablation.worker import Outcome, Worker
from prunekit.compress.bundled import TEXTS
from prunekit.compress.demo import demo
from prunekit.compress.demo.demo_report import HEAD, Row, sentences, table_rows
from prunekit.compress.files.spec import PipelineSpec
from prunekit.compress.output import formatting, printing
from prunekit.compress.output.folders import write_json
from prunekit.compress.output.formatting import named_layers
from prunekit.compress.runs import report
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.registry import SpecError

from tests.run_records import run_record


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (12345, "12,345"),
        (0, "0"),
        (0.0, "0.000"),
        (5.4704, "5.470"),
        (47.308, "47.31"),
        (1234.56, "1,235"),
        (12861440.0, "1.286e+07"),
        (0.00012, "1.200e-04"),
        (float("inf"), "inf"),
        (True, "True"),
    ],
)
def test_numbers(value, text):
    assert formatting.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.4, "40%"), (0.3333, "33.3%"), (9.994, "999%"), (9.999, "1,000%"), (11.4, "1,140%"),
        (123456.0, "12,300,000%"), (0.0, "0%"), (float("inf"), "inf%"),
    ],
)  # fmt: skip
def test_shares(value, text):
    assert formatting.share(value) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], "none"), ([0], "layer 0"), ([2, 0, 1], "layers 0, 1, 2"), ([0, 1, 2, 3, 4, 7], "layers 0-4, 7")],
)
def test_layers_are_named_so_that_layer_0_is_not_read_as_none(layers, text):
    assert named_layers(layers) == text


@pytest.fixture
def record():
    return run_record(
        model={
            "name": "bundled", "parameters": 5_000_000, "dtype": "float32", "device": "cpu", "attention": "sdpa",
            "fingerprint": "a" * 64,
        },
        calibration={"text": "bundled reference-calibration", "length": 512, "fingerprint": "b" * 64},
        metrics=[
            {
                "evaluator": "perplexity",
                "label": "perplexity",
                "dense": {"perplexity": 40.0, "tokens": 100},
                "pruned": {"perplexity": 60.0, "tokens": 100},
                "protocol": {"window": 512, "tokens": 100, "separator": "\n\n", "limit": None},
            },
            {
                "evaluator": "cost",
                "label": "cost",
                "dense": {"flops": 2.0},
                "pruned": {"flops": 1.0, "flops_ratio": 0.5},
                "protocol": {"flops": "per token"},
            },
        ],
        layers=[{"layer": 0, "attention": {"kept": 3, "units": 5}, "mlp": {"kept": 308, "units": 512}}],
        versions={"torch": "2.13"},
        notes=["mind this"],
    )  # fmt: skip


def test_rows_put_dense_beside_pruned(record):
    assert report.metric_rows(record) == [
        ("perplexity", "40.00", "60.00", "x 1.5"),
        ("cost: flops", "2.000", "1.000", "x 0.5"),
    ]
    perplexity, cost = record.metrics
    perplexity.dense["loss"], perplexity.pruned["loss"] = 3.5, 4.0
    assert report.metric_rows(record)[1] == ("perplexity: loss", "3.500", "4.000", "+0.5")
    del perplexity.pruned["loss"]
    perplexity.pruned["perplexity"] = None
    changed = record.model_copy(update={"metrics": [perplexity, cost.model_copy(update={"dense": None})]})
    assert report.metric_rows(changed) == [
        ("perplexity", "40.00", "-", ""),
        ("cost: flops", "-", "1.000", ""),
        ("cost: flops ratio", "-", "0.500", ""),
    ]


def test_accuracies_are_in_percent_with_their_error_and_compared_in_points(record):
    perplexity, _ = record.metrics
    sides = [
        {"arc": a, "arc_stderr": e, "boolq": 0.5, "boolq_stderr": 0.1, "mean": a / 2 + 0.25}
        for a, e in ((0.8, 0.133), (0.3, 0.153))
    ]
    found = perplexity.model_copy(update={"label": "zero_shot", "dense": sides[0], "pruned": sides[1], "protocol": {}})
    assert report.metric_rows(record.model_copy(update={"metrics": [found]})) == [
        ("zero shot: arc", "80.0% ± 13.3", "30.0% ± 15.3", "-50.0 points"),
        ("zero shot: boolq", "50.0% ± 10.0", "50.0% ± 10.0", "+0.0 points"),
        ("zero shot: mean", "65.0% ± 8.3", "40.0% ± 9.1", "-25.0 points"),
    ]  # fmt: skip


def test_the_report_states_protocol_cut_and_notes(record):
    text = report.markdown(record)
    for words in (
        "requested 40%; removed 39.0% of the prunable parameters (37.5% of units)",
        "| perplexity  | 40.00 | 60.00  | x 1.5  |",
        "**perplexity**: window 512, tokens 100, separator '\\n\\n'",
        "- mind this",
        "| layer | attention (key/value groups) | mlp",
        "3 of 5",
        "`aaaaaaaaaaaa`",
    ):
        assert words in text, f"{words}\nis not in\n{text}"
    assert "**calibration**: none needed" in report.markdown(record.model_copy(update={"calibration": None}))


def test_results_are_json_whatever_the_values(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("inf"), "b": [float("nan"), 1], "c": None, "d": tmp_path})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": "inf", "b": ["nan", 1], "c": None, "d": str(tmp_path)}


# The demo


def rows(pp: float, flap: float, bound: float) -> list[Row]:
    costs = dict(accuracy=0.4, flops=0.7, parameters=0.7, time=0.8)
    return [
        Row("dense", None, 40.0, 40.0, 0.5, 1.0, 1.0, 1.0),
        Row("random", 0.4, 90.0, 90.0, **costs),
        Row("flap", 0.4, flap, flap, compensated=True, **costs),
        Row("pp", 0.4, pp, pp, dynamic=True, **costs),
        Row("full_batch_probing", 0.4, bound, bound, dynamic=True, **costs),
    ]


@pytest.mark.parametrize(
    ("pp", "flap", "bound", "present", "absent"),
    [
        (50, 60, 49.9, ["17% better than the best static strategy, FLAP", "gain next to nothing"], ["as a bias"]),
        (60, 50, 54, ["20% worse than the best static strategy, FLAP", "gain another 10%", "as a bias"], []),
        (50, 50.2, 55, ["ties with", "would lose 10%", "the score, not the probe"], ["better", "worse", "as a bias"]),
    ],
)
def test_the_sentences_say_who_wins(pp, flap, bound, present, absent):
    said = sentences(rows(pp, flap, bound), (0.4,))
    text = " ".join(said)
    assert said[0].startswith("40%, other text") and said[1].startswith("40%, same kind")
    assert all(words in text for words in present), text
    assert not any(words in text for words in absent), text
    assert "0.80 of dense's time" in text


@pytest.mark.parametrize(("flops", "said"), [(0.709, False), (0.66, True)])
def test_the_demos_sentences_name_unequal_costs(flops, said):
    made = rows(50, 60, 49)
    made[2].flops = flops
    words = ", at unequal cost (PP 70% of dense's FLOPs, FLAP 66%); "
    assert (words in sentences(made, (0.4,))[0]) == said


def test_the_demos_table_fits_its_head():
    cells = table_rows(rows(50, 60, 49))
    assert all(len(line) == len(HEAD) for line in cells)
    assert [line[0] for line in cells] == ["", "40%", "", "", ""]


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with little text."""
    # As wide as in a pipe, whatever COLUMNS says: pytest-xdist sets it to 80.
    monkeypatch.setattr(printing, "out", printing.Console(width=printing.PIPED_WIDTH))
    small = {"WINDOW": 96, "QUESTIONS": 4, "BATCH": 4, "WINDOWS": 5, "SEQUENCES": 4, "PAIRS": 1}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)


def test_the_demo_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, small_demo):
    monkeypatch.setattr(demo, "STRATEGIES", ("magnitude", "flap", "pp", "full_batch_probing"))
    monkeypatch.setattr(demo, "RATIOS", (0.4,))
    ran = []
    costs = {"flops_ratio": 0.7, "parameters_ratio": 0.7}
    values = {
        "perplexity": {"perplexity": 30.0},
        "zero_shot": {demo.TASK: 0.5},
        "cost": costs,
        "latency": {"prefill_ratio": 0.8},
    }
    metrics = [{"evaluator": name, "label": name, "dense": found, "pruned": found} for name, found in values.items()]

    def stopping(self, spec, progress=None):
        ran.append(spec.prune.name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return Outcome(run_record(strategy=spec.prune.name, metrics=metrics), spec.to_yaml(), None, 1.0)

    monkeypatch.setattr(Worker, "run", stopping)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 7 trials are finished and stored in .*the same command goes on"):
        demo.run(tmp_path / "demo")
    assert not (tmp_path / "demo" / "results.json").exists()
    demo.run(tmp_path / "demo")
    assert len(ran) == 3 + 5 and len(json.loads((tmp_path / "demo" / "results.json").read_text())["runs"]) == 7
    demo.run(tmp_path / "demo")
    assert len(ran) == 8
    shown = capsys.readouterr()
    assert f"Next: prunekit report {tmp_path / 'demo'} makes a page of it" in shown.out
    assert shown.err.index("1/7 trial 1 (0.4 magnitude other): done in") < shown.err.index("2/7 trial ")
    demo.run(tmp_path / "demo", overwrite=True)
    assert len(ran) == 8 + 7
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(SpecError, match="is not a results folder"):
        demo.run(tmp_path / "thesis", overwrite=True)


@pytest.mark.slow
def test_the_demo_compares_and_each_row_reruns(tmp_path, capsys, small_demo):
    assert demo.MEASURED_ON in TEXTS and set(demo.CALIBRATED_ON.values()) <= set(TEXTS)
    demo.run(tmp_path / "demo")
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if "%" in line and "other text" not in line]
    for title in ("dense", "random", "magnitude", "Wanda-sp", "FLAP", "PP", "full-batch probing"):
        assert any(title in line for line in table)
    assert all(len(line) <= 100 for line in table)
    assert str(tmp_path / "demo") in shown
    data = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert len(data["table"]) == 1 + 2 * 6
    assert len(data["runs"]) == 20
    assert all(None not in row.values() for row in data["table"][1:])
    (row,) = [row for row in data["table"] if (row["strategy"], row["ratio"]) == ("pp", 0.4)]
    spec = PipelineSpec.load(tmp_path / "demo" / "pipelines" / "pp-40-same.yaml")
    assert Pipeline(spec).measure().metrics["perplexity.perplexity"]["pruned"] == row["same"]
