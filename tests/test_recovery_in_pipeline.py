"""The section ``recover``: a row is what exporting and recovering gives, and the loaded model is as before."""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
import yaml

pytest.importorskip("peft", reason="recovery needs peft: pip install peft")

from prunekit.compress import Exporter, Pipeline, PipelineSpec, prune
from prunekit.compress.ablation.store import Store
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.trials import identity
from prunekit.compress.ablation.worker import Worker
from prunekit.compress.cli.main import app
from prunekit.compress.files import recover as options
from prunekit.compress.files.recover import Recover
from prunekit.compress.models.loading import load
from prunekit.compress.recovery.recovering import Recovery
from prunekit.compress.runs.preflight import mistakes
from prunekit.registry import DataError, ModelError, NonFiniteError, SpecError
from typer.main import get_command

# peft asks transformers something by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore::prunekit.registry.PruneWarning"
)

QUICK = {"steps": 3, "batch_size": 2, "learning_rate": 5e-3, "length": 32}


@pytest.fixture
def content(small_pipeline):
    """Makes a pipeline's content with ``recover``, or without (None)."""

    def make(recover=QUICK, family="llama-gqa", **strategy):
        made = small_pipeline(family, **{"use": "flap", **strategy})
        cost = {"name": "cost", "length": 16, "batch_size": 2}
        return {**made, "recover": recover, "evaluate": [*made["evaluate"], cost]}

    return make


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("llama-gqa", {"use": "flap", "skip_layers": [0]}),
        ("opt", {"use": "wanda_sp", "compensate": "least_squares"}),
        ("llama-mha", {"use": "shortgpt", "ratio": 0.34, "skip_layers": [2]}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["use"],
)
def test_a_row_is_what_exporting_and_recovering_gives(family, strategy, content, tmp_path):
    """Means in biases, a layer that is whole, one in the middle that is gone, and OPT's blocks."""
    made = content(family=family, **strategy)
    spec = PipelineSpec.of(made)
    record = Pipeline(spec).measure().record
    cut = Pipeline(PipelineSpec.of({**made, "recover": None})).measure().record
    Exporter(PipelineSpec.of({**made, "recover": None}), "hf-hetero", tmp_path / "cut").export()
    how = Recover(file=spec.calibration.file, **QUICK)
    (expected,) = Recovery(tmp_path / "cut", tmp_path / "recovered", how).recover().metrics
    found, cost = record.metrics
    assert found.pruned["loss"] == pytest.approx(expected.exported["loss"], rel=1e-5)
    assert abs(found.pruned["loss"] / cut.metrics[0].pruned["loss"] - 1) > 1e-3
    assert found.dense == cut.metrics[0].dense and cost.pruned == cut.metrics[1].pruned
    assert cost.dense == cut.metrics[1].dense and record.layers == cut.layers
    assert (record.recovery.tokens, record.recovery.text, record.recovery.steps) == (192, "text.txt", 3)
    assert cut.recovery is None and "recovery" not in cut.as_json()


def test_a_following_trial_gives_the_same_numbers(content):
    made = content()
    plain = PipelineSpec.of({**made, "recover": None, "prune": {"use": "wanda_sp", "ratio": 0.3, "skip_layers": [1]}})
    worker = Worker()
    assert worker.run(PipelineSpec.of({**made, "recover": None})).error is None
    model = worker._loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placed = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert worker.run(PipelineSpec.of(made)).error is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert placed == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    after = worker.run(plain).result
    alone = Worker().run(plain).result
    assert worker._loaded.model is model
    for one, other in zip(after.metrics, alone.metrics, strict=True):
        assert (one.dense, one.pruned, one.details) == (other.dense, other.pruned, other.details)


def test_training_leaves_the_random_states(content):
    random.seed(1), numpy.random.seed(1)
    drawn = random.random(), numpy.random.rand()
    random.seed(1), numpy.random.seed(1)
    worker = Worker()
    assert worker.run(PipelineSpec.of(content({**QUICK, "steps": 1, "seed": 2**40}))).error is None
    assert drawn == (random.random(), numpy.random.rand())


def test_weights_from_elsewhere_are_of_the_pruned_model_alone(make_model, batches):
    """In a prompt, in its decode steps, in what is counted; not in a dense pass, within suspended(), or afterwards."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]

    def run(length=None):
        with torch.no_grad():
            if length is None:
                return model(input_ids=ids, use_cache=False).logits
            first = model(input_ids=ids[:, :length], use_cache=True)
            steps = [first.logits]
            for token in ids[:, length:].split(1, 1):
                steps.append(model(input_ids=token, past_key_values=first.past_key_values, use_cache=True).logits)
            return torch.cat(steps, 1)

    def densely():
        with pruned.dense():
            return run()

    dense, own = run(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with prune(model, "flap", ratio=0.4, skip_layers=(1,), calibration=batches) as pruned:
        cut, held = run(), pruned.held_bytes()
        weights = {linear: linear.weight for linear in (model.model.layers[1].mlp.up_proj,)}
        given = {linear: (2 * weight.clone(), None) for linear, weight in weights.items()}
        for site in (each for each in pruned.cuts if not each.whole):
            for linear, producer in site.binding.producers:
                weight, bias = site.open_cut.producer(linear, producer)
                given[linear] = (2 * weight, bias)
            weight, bias = site.consumer_weights()
            given[site.binding.consumer] = (-weight, bias)
        pruned.compute_with(given)
        changed = run()
        assert not torch.allclose(changed, cut, atol=1e-2)
        assert torch.allclose(run(length=20), changed, atol=1e-4)  # steps repeat what the step before has found
        assert all(site.open_cut.ready for site in pruned.cuts if not site.whole)
        whole = sum(weight.nbytes for weight in weights.values())
        assert pruned.held_bytes() == {**held, "gathered": held["gathered"] + whole}
        for keep in (False, True):  # what is saved of the model is the dense one
            assert all(torch.equal(each, own[name]) for name, each in model.state_dict(keep_vars=keep).items())
        with ThreadPoolExecutor(1) as other:
            with pruned.dense():
                assert torch.equal(other.submit(run).result(), changed)  # of a thread that has not asked for it
            assert torch.equal(other.submit(densely).result(), dense) and torch.equal(run(), changed)
        with pytest.raises(SpecError, match=r"layers\.1\.mlp\.up_proj.*192 x 128"):
            pruned.compute_with({model.model.layers[1].mlp.up_proj: (torch.ones(3, 3), None)})
        with pruned.dense():
            assert torch.equal(run(), dense)
        with pruned.suspended():
            assert torch.equal(run(), dense)
        pruned.refresh()
        assert torch.equal(run(), changed)
    assert torch.equal(run(), dense)


def test_trials_without_it_are_what_they_were(content, tmp_path):
    without = PipelineSpec.of(content(None))
    assert "recover" not in without.to_yaml() and "recover" not in identity(without, tmp_path)
    used = PipelineSpec.of({**content(), "seed": 3})
    assert used.recover.seed == 3 and PipelineSpec.of(yaml.safe_load(without_output(used))).recover == used.recover
    file = tmp_path / "own.txt"
    keys = []
    for text in ("one", "two"):
        file.write_text(text)
        keys.append(identity(PipelineSpec.of(content({**QUICK, "file": str(file)})), tmp_path)["recover"]["file"])
    assert keys[0] != keys[1] and keys[0].startswith("sha256")


def without_output(spec):
    return re.sub(r"^output:.*\n", "", spec.to_yaml(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"use": "pp", "ratio": 0.4}}, r"recover: strategy pp decides per batch.*--freeze mean-score"),
        ({"prune": {"use": "flap", "ratio": 0.4, "applier": "zero"}}, r"recover: applier zero .* use applier slice"),
        ({"calibration": {"generated": {}}}, r"recover: the calibration text is generated.*name a text in recover"),
        ({"recover": {"split": "test"}}, r"recover: split is of a text, and none is named"),
        ({"recover": {"steps": 0}}, r"recover\.steps: should be greater than or equal to 1"),
        ({"recover": {"length": 10_000}}, r"recover\.length: the model's context is 256 tokens, found 10000"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(changes, message, content):
    with pytest.raises(SpecError, match=message):
        PipelineSpec.of({**content(), **changes}, check=mistakes)


def test_mistakes_come_before_calibration_and_leave_nothing(content, tmp_path, monkeypatch, command):
    made = content()
    spec = PipelineSpec.of(made)
    calibrated = []
    monkeypatch.setattr("prunekit.compress.runs.pipeline.calibration_of", lambda *_: calibrated.append(1))
    with pytest.raises(DataError, match=r"recover\.sequences: text\.txt gives .* 900 are asked for"):
        Pipeline(PipelineSpec.of({**made, "recover": {**QUICK, "sequences": 900}})).run(tmp_path / "out")
    loaded = load(spec.model)
    monkeypatch.setattr("prunekit.compress.export.family.Family.refusal", lambda *_: "it is too odd")
    with pytest.raises(ModelError, match=r"recover: a smaller llama is trained, and none can be made: it is too odd"):
        Pipeline(spec).run(tmp_path / "out", loaded=loaded)
    monkeypatch.undo()
    assert not calibrated
    with monkeypatch.context() as patched:
        patched.setattr("prunekit.compress.recovery.in_pipeline.logits_of", lambda *_: torch.randn(1, 4, 8))
        patched.setattr("prunekit.compress.recovery.in_pipeline.train", lambda *_: calibrated.append(1))
        with pytest.raises(ModelError, match=r"recover: the smaller model and .* other logits .*so it was not trained"):
            Pipeline(spec).run(tmp_path / "out", loaded=loaded)
    assert not calibrated
    uneven = {**made, "prune": {"use": "flap", "ratio": 0.4, "attention_unit": "query_head"}}
    with pytest.raises(SpecError, match=r"recover: .* cannot be written: .*nearest: .*kv_group .*leave recover out$"):
        Pipeline(uneven).run(tmp_path / "out", loaded=loaded)
    with monkeypatch.context() as patched:
        patched.setattr(options.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SpecError, match=r"recover: it trains with peft.*pip install peft"):
            PipelineSpec.of(made, check=mistakes)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"recover: .* NaN or infinite at step .*lower learning_rate"):
        Pipeline({**made, "recover": {**QUICK, "steps": 6, "learning_rate": 1e30}}).run(tmp_path / "out", loaded=loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    file = tmp_path / "row.yaml"
    file.write_text(yaml.safe_dump(made))
    for arguments in (("export", file, "--profile", "hf-hetero"), ("generate", file, "--prompt", "w1")):
        code, output = command(*arguments, "--out", tmp_path / "out")
        assert code == 2 and "recover=null" in output, output
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_study_varies_it_and_its_report_says_so(content, tmp_path, command):
    base = content(None)
    del base["recover"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"base": base, "vary": {"recover": [None, QUICK]}}))
    study = Study.load(tmp_path / "study.yaml")
    assert [trial.spec.recover is None for trial in study.trials] == [True, False]
    out = tmp_path / "study.sqlite"
    code, output = command("ablate", tmp_path / "study.yaml", "--out", out)
    assert code == 0, output
    with Store.open(out) as store:
        rows = {trial.settings["recover"] is None: trial.result for trial in store.trials}
    assert rows[True].recovery is None and rows[False].recovery.steps == 3
    assert rows[True].metrics[0].pruned != rows[False].metrics[0].pruned
    code, output = command("report", out, "--out", tmp_path / "report")
    assert code == 0, output
    pages = " ".join(path.read_text() for path in (tmp_path / "report").glob("*.md"))
    assert "1 of 2 trials: LoRA of rank 8, 3 steps of 64 tokens of text.txt, learning rate 0.005" in pages


def test_the_results_of_a_run_say_so(content, tmp_path, command):
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(content(use="magnitude")))
    code, output = command("run", tmp_path / "row.yaml", "--out", tmp_path / "out")
    assert code == 0, output
    assert "recovered by LoRA of rank 8" in output
    assert "**recovery**: LoRA of rank 8, 3 steps" in (tmp_path / "out" / "report.md").read_text()
    code, output = command("evaluate", tmp_path / "row.yaml", "--out", tmp_path / "dense")
    assert code == 0 and "recover" not in (tmp_path / "dense" / "resolved.yaml").read_text(), output


def test_the_command_has_the_options_and_their_defaults():
    parameters = {parameter.name: parameter for parameter in get_command(app).commands["recover"].params}
    known = {"bundled", "file", "data_files", "apply_chat_template", "skip_null", "revision"}  # --text names a place
    assert Recover.model_fields.keys() - known <= parameters.keys()
    trained = Recover.model_fields.keys() - Recover.__base__.model_fields.keys()
    assert {name: parameters[name].default for name in trained} == {n: getattr(Recover(), n) for n in trained}
