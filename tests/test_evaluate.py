"""``prunekit evaluate`` and ``evaluate()``: a model, or a pruned one, measured as it is."""

import json

import pytest
import yaml
from prunekit.compress import Exporter, Pipeline, PipelineSpec, evaluate, load, prune
from prunekit.compress.cli import main
from prunekit.compress.models.loading import load as load_model
from prunekit.compress.models.source import ModelSource
from prunekit.compress.runs.pipeline import calibration_of
from prunekit.evaluators.cost import Cost
from prunekit.registry import DataError, SpecError
from typer.testing import CliRunner

PERPLEXITY = {"window": 64, "limit": 3}
EVALUATE = [{"name": "perplexity", **PERPLEXITY}, {"name": "cost", "batch_size": 1, "length": 32}]
PIPELINE = {
    "prune": {"use": "pp", "ratio": 0.4, "selector": {"rows": 0.5}},
    "calibration": {"sequences": 4, "length": 64},
    "evaluate": EVALUATE,
}


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelSource())


@pytest.fixture(scope="module")
def results(loaded):
    """The results of the pipeline that the others are compared with."""
    return Pipeline(PIPELINE).measure(loaded=loaded).metrics


@pytest.fixture
def run(tmp_path):
    """Runs ``prunekit evaluate`` with the evaluators of the pipeline, and returns its results."""

    def of(*arguments):
        settings = ["--set", "evaluate=" + json.dumps(EVALUATE), "--out", str(tmp_path / "out"), "--overwrite"]
        result = CliRunner().invoke(main.app, ["evaluate", *map(str, arguments), *settings])
        assert result.exit_code == 0, result.output
        data = json.loads((tmp_path / "out" / "results.json").read_text())
        return data, {metric["label"]: metric["pruned"] for metric in data["metrics"]}, result.output

    return of


def test_a_model_by_name_has_the_dense_values_of_a_run(run, results, tmp_path):
    data, values, output = run()
    assert values["perplexity"]["perplexity"] == results["perplexity.perplexity"]["dense"]
    assert values["cost"]["flops"] == results["cost.flops"]["dense"]
    assert data["strategy"] == "none" and "bundled, not pruned" in output
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Not pruned\n\nbundled, not pruned.")
    assert "to do: perplexity: 3 windows of 64 tokens; the model as it is" in output
    again = Pipeline(PipelineSpec.load(tmp_path / "out" / "resolved.yaml")).measure().metrics
    assert again["perplexity.perplexity"]["pruned"] == values["perplexity"]["perplexity"]
    for command in ("report", "compare"):
        others = [str(tmp_path / "out")] * (1 + (command == "compare"))
        out = [] if command == "compare" else ["--out", str(tmp_path / "report")]
        assert CliRunner().invoke(main.app, [command, *others, *out]).exit_code == 0


def test_of_a_pipeline_file_everything_but_the_pruning_is_used(tmp_path, results):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(PIPELINE))
    arguments = ["evaluate", str(tmp_path / "file.yaml"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main.app, arguments).exit_code == 0
    (metric, _) = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metric["pruned"]["perplexity"] == results["perplexity.perplexity"]["dense"]


@pytest.mark.parametrize("profile", ["hf-hetero", "dynamic"])
def test_an_export_is_measured_as_it_is(run, results, tmp_path, profile):
    use = {"use": "wanda_sp", "ratio": 0.4} if profile == "hf-hetero" else PIPELINE["prune"]
    spec = PipelineSpec.of({**PIPELINE, "prune": use, "evaluate": EVALUATE[:1]})
    manifest = Exporter(spec, profile, tmp_path / "export").export()
    data, values, _ = run(tmp_path / "export")
    recorded = manifest.metrics[0].exported["perplexity"]
    assert values["perplexity"]["perplexity"] == pytest.approx(recorded, rel=1e-6)
    assert data["strategy"] == use["use"] and data["ratio"]["asked"] == 0.4
    if profile == "dynamic":
        assert recorded == results["perplexity.perplexity"]["pruned"]
        found = evaluate(load(tmp_path / "export"), "perplexity", **PERPLEXITY)
        assert found.values["perplexity"] == recorded


def test_a_loaded_model_and_a_handle_in_python(loaded, results):
    dense = evaluate(loaded.model, "perplexity", tokenizer=loaded.tokenizer, **PERPLEXITY)
    assert dense.values["perplexity"] == results["perplexity.perplexity"]["dense"]
    batches, _ = calibration_of(PipelineSpec.of(PIPELINE).calibration, loaded)
    with prune(loaded.model, "pp", ratio=0.4, selector={"rows": 0.5}, calibration=batches) as pruned:
        for _ in range(2):
            found = evaluate(pruned, tokenizer=loaded.tokenizer, limit=3)
            assert found.values["perplexity"] == results["perplexity.perplexity"]["pruned"]
        assert evaluate(pruned, Cost(batch_size=1, length=32)).values["flops"] == results["cost.flops"]["pruned"]


def test_mistakes_are_named(loaded):
    with pytest.raises(SpecError, match="perplexity reads text; pass tokenizer="):
        evaluate(loaded.model)
    with pytest.raises(SpecError, match="expected a loaded model or what prune"):
        evaluate("gpt2")
    with pytest.raises(SpecError, match="windw: unknown key"):
        evaluate(loaded, windw=3)
    with pytest.raises(SpecError, match="leave length out"):
        evaluate(loaded, Cost(), length=3)
    with pytest.raises((SpecError, DataError), match="more than the model's context of 512"):
        evaluate(loaded, window=1024)
    result = CliRunner().invoke(main.app, ["evaluate", "--set", "evaluate.0.windw=3"])
    assert result.exit_code == 2 and "--set evaluate.0.windw: unknown key" in result.stderr
    result = CliRunner().invoke(main.app, ["evaluate", "nowhere.yaml"])
    assert result.exit_code == 2 and "there is no pipeline file nowhere.yaml" in result.stderr
