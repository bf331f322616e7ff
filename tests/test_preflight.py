"""Before anything is loaded: what a pipeline file, the folders it names and this machine tell."""

from functools import partial

import pytest
import transformers
from prunekit.compress.ablation.mistakes import preflight
from prunekit.compress.ablation.study import Study
from prunekit.compress.cli import main
from prunekit.compress.files.spec import PipelineSpec
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.compress.runs.preflight import mistakes, unseen
from prunekit.evaluators.latency import Latency
from prunekit.registry import Measurement
from typer.testing import CliRunner

PP = {"use": "pp", "ratio": 0.4}
REAP = {"use": "reap", "ratio": 0.5}


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def of(text):
        (tmp_path / "file.yaml").write_text(text)
        return tmp_path / "file.yaml"

    return of


def rows(spec):
    return [each.longest_row(None) for each in spec.evaluate]


def test_validate_finds_what_the_file_and_its_folders_tell(write, tmp_path):
    path = write(
        "model: {device: gpu}\n"
        "prune: {use: pp, ratio: 0.4, skip_layers: [99]}\n"
        "calibration: {length: 1024, statistics: nowhere/here.safetensors}\n"
        "evaluate:\n"
        "  - {name: perplexity, window: 2000}\n"
        "  - {name: latency, length: 512}\n"
        "  - {name: zero_shot, tasks: [true_continuation], metric: acca}\n"
    )
    for command in ("validate", "run"):
        result = CliRunner().invoke(main.app, [command, str(path)])
        assert result.exit_code == 2
        for words in (
            "line 1: model.device: 'gpu' is not a device",
            "line 2: prune.skip_layers: the model has layers 0 to 7, found 99",
            "line 3: calibration.statistics: ",
            "line 3: calibration.length: the model's context is 512 tokens, found 1024",
            "line 5: evaluate.0: perplexity.window: 2000 tokens are more than the model's context of 512",
            "line 6: evaluate.1: latency.decode_steps: a prefill of 512 tokens and 16 steps",
        ):
            assert words in result.stderr, words
        assert "line 7: evaluate.2: zero_shot.metric: task true_continuation has no metric 'acca'" in result.stderr
    path = write("model: {name: ./not-there}\nprune: {use: pp, ratio: 0.4}\n")
    assert "line 1: model.name: folder ./not-there does not exist" in CliRunner().invoke(
        main.app, ["validate", str(path)]
    ).output.replace("\n", " ")


def test_validate_says_what_it_does_not_look_at(write):
    spec = PipelineSpec.of({"model": {"name": "owner/model"}, "prune": PP, "calibration": {"dataset": "owner/text"}})
    assert unseen([spec, spec]).endswith("and on the hub: model owner/model, dataset owner/text")
    result = CliRunner().invoke(main.app, ["validate", str(write("prune: {use: pp, ratio: 0.4}"))])
    assert result.exit_code == 0 and "not looked at: the weights" in result.output


@pytest.mark.parametrize("evaluator", [{"name": "perplexity", "window": 129}, {"name": "cost", "length": 129}])
def test_rows_that_are_longer_than_the_history_are_refused(evaluator):
    data = {"prune": PP, "calibration": {"length": 128}, "evaluate": [evaluator]}
    (found,) = mistakes(PipelineSpec.of(data))
    assert found.place[:2] == ("evaluate", 0) and found.place[2] in evaluator
    assert "rows of 129 tokens, but pp keeps a history of calibration.length = 128 positions" in found.message
    assert not mistakes(PipelineSpec.of({**data, "prune": {"use": "flap", "ratio": 0.4}}))
    far = {"name": "cost", "length": 100_000}
    (found,) = mistakes(PipelineSpec.of({**data, "evaluate": [far]}))
    assert "rows of 512 tokens (found 100000), but pp" in found.message  # the bundled model's context


def test_rows_that_are_left_out_fit_the_history():
    evaluate = ["perplexity", "cost", "latency", "memory", "similarity", "overlap", {"name": "cost", "length": 64}]
    data = {"prune": PP, "calibration": {"length": 128}, "evaluate": evaluate}
    spec = PipelineSpec.of(data)
    assert rows(spec) == [128] * 6 + [64] and not mistakes(spec)
    assert rows(PipelineSpec.of({**data, "calibration": {}})) == [512, *[256] * 5, 64]
    assert rows(PipelineSpec.of({**data, "prune": {"use": "flap", "ratio": 0.4}})) == [512, *[256] * 5, 64]
    assert "window: 128" in spec.to_yaml()


def test_all_trials_of_a_study_run_the_rows_that_fit_all_histories(write):
    study = Study.load(
        write(
            "base: {prune: {ratio: 0.4}, evaluate: [perplexity, {name: cost, length: 96}]}\n"
            "vary: {prune.use: [pp, flap], calibration.length: [128, 256]}\n"
        )
    )
    assert [rows(trial.spec) for trial in study.trials] == [[128, 96]] * 4
    assert not preflight(study.trials, {trial.key for trial in study.trials}, here=True)
    study = Study.load(
        write(
            "base: {prune: {ratio: 0.4}, calibration: {length: 128}, evaluate: [{name: cost, length: 256}]}\n"
            "vary: {prune.use: [pp, flap]}\n"
        )
    )
    found = preflight(study.trials, {trial.key for trial in study.trials}, here=True)
    assert list(found) == [0] and "lower evaluate.0.length to 128" in found[0][0].message


def test_an_evaluator_asked_for_by_another_fits_the_history(monkeypatch):
    def evaluate(self, subject):
        return Measurement({"dense_prefill_seconds": 2.0, "prefill_ratio": 0.5}, {"length": self.length})

    monkeypatch.setattr(Latency, "evaluate", evaluate)
    spec = {
        "prune": {**PP, "selector": {"rows": 0.5}},
        "calibration": {"sequences": 8, "length": 32},
        "evaluate": [{"name": "perplexity", "limit": 2}, "prr"],
    }
    found = Pipeline(spec).measure().record.metric("prr")
    assert found.protocol["latency"]["length"] == 32


def test_an_export_looks_at_what_it_runs(write, tmp_path):
    path = write(
        "model: {device: gpu}\n"
        "prune: {use: pp, ratio: 0.4}\n"
        "calibration: {length: 128}\n"
        "evaluate: [{name: perplexity, window: 256}, {name: cost, length: 256}]\n"
    )
    arguments = ["export", str(path), "--profile", "dynamic", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(main.app, arguments).stderr
    assert "2 mistakes" in said and "line 1: model.device" in said and "line 4: evaluate.0.window" in said


@pytest.mark.parametrize(
    ("config", "prune", "said"),
    [
        (transformers.LlamaConfig, REAP, "prune.experts: whole removes routed experts, and"),
        (transformers.BioGptConfig, PP, "model.name: no architecture serves model type 'biogpt'"),
        (transformers.T5Config, PP, "model.name: t5 is an encoder-decoder"),
        (
            partial(transformers.DeepseekV3Config, n_group=2),
            {"use": "reap", "ratio": 0.5},
            "prune: model.layers.1.mlp.gate divides",
        ),
    ],
)
def test_the_configuration_says_whether_the_model_can_be_cut(config, prune, said, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    experts = {"n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
    config(**sizes, **experts, vocab_size=64, intermediate_size=32).save_pretrained(tmp_path / "model")
    (found,) = mistakes(PipelineSpec.of({"model": {"name": str(tmp_path / "model")}, "prune": prune}))
    assert found.message.startswith(said.partition(": ")[2]), found
    assert ".".join(map(str, found.place)) == said.partition(": ")[0]
