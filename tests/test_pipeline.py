"""The pipeline: dense and pruned in one run, results that rerun, and a folder that is whole or absent."""

import json

import pytest
import torch
import transformers
from prunekit.compress import Pipeline, PipelineSpec
from prunekit.compress.bundled import MODEL
from prunekit.compress.models.loading import fingerprint, load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.runs import pipeline
from prunekit.registry import DataError, Measurement, PlainSubject, SpecError

EVALUATORS = '''
from typing import Any, ClassVar, Literal
from prunekit.registry import Evaluator, Measurement, hookimpl

class Fails(Evaluator):
    """Stops the run."""
    name: Literal["fails"] = "fails"
    interrupt: bool = False
    def evaluate(self, subject):
        raise KeyboardInterrupt if self.interrupt else RuntimeError("boom")

class Pair(Evaluator):
    """Measures dense itself."""
    paired: ClassVar[bool] = True
    name: Literal["pair"] = "pair"
    def evaluate(self, subject):
        pruned = subject.parameters()
        with subject.dense():
            dense = subject.parameters()
        return Measurement({"size": pruned, "dense_size": dense}, {}, ["a note"])

class Listing(Evaluator):
    """Has an option that has no hash."""
    name: Literal["listing"] = "listing"
    where: Any = None
    def evaluate(self, subject):
        return Measurement({"places": len(self.where)}, {})

@hookimpl
def evaluators(): return [Fails, Pair, Listing]
'''

PERPLEXITY = {"name": "perplexity", "window": 32, "limit": 6, "batch_size": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with the bundled tokenizer, as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load(ModelSource(name=str(folder), device="cpu"))


@pytest.fixture
def content(folder):
    """What a small pipeline file holds, changed by keywords."""

    def make(evaluate=(PERPLEXITY,), use="pp", ratio=0.4, output=None, calibration=None, **prune):
        return {
            "model": {"name": str(folder), "device": "cpu"},
            "calibration": {"sequences": 4, "length": 32, **(calibration or {})},
            "prune": {"use": use, "ratio": ratio, **prune},
            "evaluate": list(evaluate),
            "output": output or {},
        }

    return make


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "plugins" / "evaluators.py"
    file.parent.mkdir()
    file.write_text(EVALUATORS)
    return file


def test_the_results_folder(content, tmp_path):
    results = Pipeline(content(output={"trace": True}, evaluate=[PERPLEXITY, {"name": "cost", "length": 16}])).run(
        tmp_path / "run"
    )
    assert results.folder == tmp_path / "run"
    assert {path.name for path in results.folder.iterdir()} == {
        "results.json", "resolved.yaml", "report.md", "decisions.jsonl",
    }  # fmt: skip
    data = json.loads((results.folder / "results.json").read_text())
    perplexity, cost = data["metrics"]
    assert perplexity["dense"]["perplexity"] != perplexity["pruned"]["perplexity"]
    assert perplexity["protocol"]["window"] == 32
    assert cost["pruned"]["parameters"] < cost["dense"]["parameters"]
    assert results.metrics["cost.parameters"]["dense"] == data["model"]["parameters"]
    assert data["ratio"]["asked"] == 0.4
    # 40% of 6 groups is 2, of 144 channels 58.
    kept = {kind: [layer[kind]["kept"] for layer in data["layers"]] for kind in ("attention", "mlp")}
    assert sorted(kept["attention"]) == [1, 1, 2] and sorted(kept["mlp"]) == [28, 29, 29]
    assert {layer["attention"]["units"] for layer in data["layers"]} == {2}
    assert data["ratio"]["units_cut"] == pytest.approx((2 / 6 + 58 / 144) / 2, abs=1e-6)
    assert len(data["model"]["fingerprint"]) == len(data["calibration"]["fingerprint"]) == 64
    assert {"python", "torch", "transformers", "prunekit"} <= set(data["versions"])
    assert any("strategies/pp" in names for names in data["plugins"].values())
    assert data["seeds"] == {"pipeline": 0, "calibration": 0, "strategy": 0}


def test_every_decision_is_a_line(content, tmp_path):
    down = {"rounding": "down"}
    results = Pipeline(content(output={"trace": True}, allocator=down)).run(tmp_path / "run")
    records = [json.loads(line) for line in (results.folder / "decisions.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3  # batches, layers; attention keeps everything here
    assert {(record["evaluator"], record["kind"]) for record in records} == {("perplexity", "mlp")}
    assert all(len(record["kept"]) == 29 and record["positions"] for record in records)
    static = Pipeline(content(use="wanda_sp", output={"trace": True})).measure()
    assert {record["evaluator"] for record in static.trace} == {None}
    assert not (Pipeline(content()).run(tmp_path / "quiet").folder / "decisions.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"use": "pp", "selector": {"name": "random", "rows": 0.5}, "seed": 5},
        {"use": "flap", "skip_layers": [0]},
        {"use": "random", "seed": 3},
    ],
    ids=lambda options: options["use"],
)
def test_resolved_yaml_reruns_to_the_same_numbers(content, tmp_path, options):
    first = Pipeline(content(**options)).run(tmp_path / "first")
    spec = PipelineSpec.load(first.folder / "resolved.yaml")
    again = Pipeline(spec).run(tmp_path / "again")
    assert again.metrics == first.metrics
    assert again.record.calibration == first.record.calibration
    assert again.record.layers == first.record.layers
    assert (again.folder / "resolved.yaml").read_text() == (first.folder / "resolved.yaml").read_text()


def test_resolved_yaml_pins_what_was_really_loaded(content, loaded):
    pinned = pipeline.pinned(PipelineSpec.of(content()), loaded)
    assert (pinned.model.dtype, pinned.model.revision) == ("float32", None)
    from_hub = type(loaded)(loaded.model, loaded.tokenizer, {**loaded.identity, "commit": "abc"})
    assert pipeline.pinned(PipelineSpec.of(content()), from_hub).model.revision == "abc"


def test_dense_is_the_model_itself_and_is_left_as_it_was(content, loaded):
    before = fingerprint(loaded.model)
    spec = PipelineSpec.of(content())
    results = Pipeline(spec).measure(loaded=loaded)
    assert fingerprint(loaded.model) == before == results.record.model.fingerprint
    subject = PlainSubject(loaded.model, loaded.tokenizer)
    subject.read = pipeline.read_documents
    alone = spec.evaluate[0].evaluate(subject)
    assert results.record.metrics[0].dense == alone.values


def test_every_evaluator_starts_from_the_calibrated_history(content):
    results = Pipeline(content(evaluate=[PERPLEXITY, PERPLEXITY], merger={"momentum": 0.1})).measure()
    first, second = results.record.metrics
    assert (first.label, second.label) == ("perplexity 1", "perplexity 2")
    assert first.pruned == second.pruned


def test_dense_values_are_shared_where_runs_share_a_model(content, loaded, monkeypatch):
    known = {}
    first = Pipeline(content()).measure(loaded=loaded, dense=known)
    (key,) = known
    known[key] = Measurement({"perplexity": 1.0, "loss": 0.0}, {})
    second = Pipeline(content(ratio=0.2)).measure(loaded=loaded, dense=known)
    assert first.record.metrics[0].dense["perplexity"] > 1
    assert second.record.metrics[0].dense["perplexity"] == 1.0


def test_a_paired_evaluator_measures_dense_itself(content, plugin):
    spec = PipelineSpec.of(content(evaluate=["pair"], use="magnitude", ratio=0.5), plugins=[plugin])
    record = Pipeline(spec).measure().record
    (metric,) = record.metrics
    assert metric.dense["size"] > metric.pruned["size"]
    assert set(metric.pruned) == {"size"}
    assert record.notes == ["pair: a note"]
    assert record.calibration is None
    assert record.plugins[f"file {plugin}"] == ["evaluators/pair"]


def test_an_evaluators_options_need_no_hash(content, plugin):
    several = [{"name": "listing", "where": [1, 2]}, {"name": "listing", "where": [1]}]
    record = Pipeline(PipelineSpec.of(content(evaluate=several, use="magnitude"), plugins=[plugin])).measure().record
    assert [metric.dense["places"] for metric in record.metrics] == [2, 1]


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        # Rounded down, of 2 groups none can go at 40%, of 48 channels 19; at 50% all is as requested.
        (
            {"allocator": {"rounding": "down"}},
            ["40% of 2 key/value groups rounds to none, so all are kept in 3 layers", "requested 40%; "],
        ),
        ({"ratio": 0.02, "skip_layers": [0]}, ["3% of 2 key/value groups rounds to none"]),
        ({}, ["requested 40%; removed 37.5% of the prunable parameters (36.8% of units)"]),
        ({"ratio": 0.5}, []),
        ({"ratio": 0}, []),
        ({"ratio": None, "allocator": {"name": "explicit", "attention": [0] * 3, "mlp": [0] * 3}}, []),
    ],
)
def test_a_cut_that_rounding_makes_smaller_is_noted_once(content, loaded, options, notes):
    found = Pipeline(content(**{"use": "magnitude", **options})).measure(loaded=loaded).record.notes
    assert len(found) == len(notes)
    assert all(said.startswith(words) for said, words in zip(found, notes, strict=True)), found


def test_the_protocol_names_the_attention_that_a_user_knows(content, loaded):
    record = Pipeline(content(attention_unit="query_head", ratio=0.5)).measure(loaded=loaded).record
    assert record.metrics[0].protocol["attention"] == record.model.attention == "sdpa"


def test_a_known_model_far_from_its_published_perplexity_is_noted(loaded):
    known = type(loaded)(loaded.model, loaded.tokenizer, {**loaded.identity, "name": "facebook/opt-125m"})
    protocol = {
        "text": "Salesforce/wikitext/wikitext-2-raw-v1/test", "separator": "\n\n", "documents": "all", "limit": None,
        "window": 2048, "stride": 2048, "bos": "first",
    }  # fmt: skip
    far = Measurement({"perplexity": 60.0}, protocol)
    (warning,) = pipeline.published_warnings(known, far)
    assert "27.65" in warning
    assert pipeline.published_warnings(known, Measurement({"perplexity": 27.65}, protocol)) == []
    assert pipeline.published_warnings(loaded, far) == []


# What goes wrong leaves nothing.


@pytest.mark.parametrize(("options", "error"), [({}, RuntimeError), ({"interrupt": True}, KeyboardInterrupt)])
def test_a_run_that_stops_leaves_nothing(content, plugin, tmp_path, options, error):
    spec = PipelineSpec.of(content(evaluate=[PERPLEXITY, {"name": "fails", **options}]), plugins=[plugin])
    with pytest.raises(error):
        Pipeline(spec).run(tmp_path / "a" / "b" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["plugins"]


def test_a_run_that_stops_leaves_the_model_unpruned(content, plugin, loaded):
    before = fingerprint(loaded.model)
    spec = PipelineSpec.of(content(evaluate=["fails"]), plugins=[plugin])
    with pytest.raises(RuntimeError, match="boom"):
        Pipeline(spec).measure(loaded=loaded)
    assert fingerprint(loaded.model) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.model.modules())


def test_an_existing_folder_is_refused_before_anything_is_loaded(content, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda source: pytest.fail("loaded"))
    (tmp_path / "run").mkdir()
    with pytest.raises(SpecError, match=r"run exists; choose another with --out, or replace it with --overwrite"):
        Pipeline(content()).run(tmp_path / "run")
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(SpecError, match="is not a results folder"):
        Pipeline(content(output={"overwrite": True})).run(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecError, match="is not a results folder"):
        Pipeline(content(output={"overwrite": True})).run(tmp_path / "file")
    with pytest.raises(SpecError, match="cannot be made"):
        Pipeline(content()).run(tmp_path / "file" / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"length": 65}}, ["calibration.length", "context is 64 tokens", "found 65"]),
        ({"calibration": {"sequences": 100_000}}, ["asks for 100000", "lower calibration.sequences"]),
        ({"evaluate": [{**PERPLEXITY, "window": 33}]}, ["evaluate.0.window", "33 tokens", "calibration.length = 32"]),
        ({"evaluate": [{"name": "cost", "length": 4096}]}, ["evaluate.0.length", "64 tokens"]),
    ],
)
def test_text_that_does_not_fit_is_refused(content, loaded, changes, words, monkeypatch):
    monkeypatch.setattr(pipeline, "prune_as_asked", lambda *a, **k: pytest.fail("calibrated"))
    with pytest.raises(DataError) as caught:
        Pipeline(content(**changes)).measure(loaded=loaded)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_strategy_without_history_takes_longer_batches(content, loaded):
    for options in ({"use": "wanda_sp"}, {"use": "pp", "merger": "probe_only"}):
        results = Pipeline(content(evaluate=[{**PERPLEXITY, "window": 64}], **options)).measure(loaded=loaded)
        assert results.record.metrics[0].protocol["window"] == 64


def test_where_results_go(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(Pipeline(content()).default_folder).startswith("results/pp-0.4-")
    results = Pipeline(content(output={"dir": "here/it/is"}, evaluate=["cost"], use="magnitude")).run()
    assert results.folder == tmp_path / "here" / "it" / "is"
    assert "dir: null" in results.resolved
