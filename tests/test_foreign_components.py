"""What other people's components do to a model is noticed, put back where it can be, and named."""

import json
from typing import Literal

import pytest
import torch
import yaml
from prunekit.compress import prune
from prunekit.compress.ablation.worker import Worker
from prunekit.compress.files.spec import PipelineSpec
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.registry import PluginError, PruneWarning, SpecError
from prunekit.strategies.application import Zero
from prunekit.strategies.pp import PP

from tests.broken_components import Everything, Good, Plain, made

ME = "of plugin tests"


def refused(model, batches, **parts):
    """The message of the error that pruning and one pass end with."""
    with pytest.raises((PluginError, SpecError)) as caught, prune(model, "pp", ratio=0.4, calibration=batches, **parts):
        model(**batches[0])
    return str(caught.value)


def test_a_scorer_that_writes_to_the_weights_is_named(make_model, batches):
    scorer = made(Good, "writes", prepare=lambda self, w, site: w.abs_().sum(0))
    message = refused(make_model("llama-gqa"), batches, scorer=scorer)
    assert f"layer 0 attention: prepare of scorer 'good' {ME} has written to the model's weights" in message


@pytest.mark.parametrize("method", ["producer", "consumer"])
def test_an_applier_that_writes_to_the_weights_is_named(make_model, batches, method):
    bodies = {
        "producer": lambda self, weight, bias, rows: (weight.mul_(1), bias),
        "consumer": lambda self, weight, columns: weight.mul_(1),
    }
    applier = made(Zero, "writes", **{method: bodies[method]})
    message = refused(make_model("llama-gqa"), batches, applier=applier)
    assert f"{method} of mask applier 'zero' {ME} has written to the model's weights" in message


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (lambda self, s, v, g: (torch.tensor([0]), torch.tensor([0, s.shape[1]])), "picks positions [0, 24] of 24"),
        (lambda self, s, v, g: (torch.tensor([0]), torch.tensor([1, 1])), "picks positions [1, 1] of 24"),
        (lambda self, s, v, g: (torch.tensor([], dtype=torch.int64), torch.tensor([1])), "picks rows [] of 4"),
        (lambda self, s, v, g: (torch.tensor([0]), torch.arange(len(s.mul_(2)))), "has written to the states"),
    ],
)
def test_a_selector_that_picks_or_writes_wrongly_is_named(make_model, batches, select, words):
    message = refused(make_model("llama-gqa"), batches, selector=made(Everything, "errs", select=select))
    assert f"layer 0 attention: probe selector 'everything' {ME}" in message
    assert words in message


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (lambda self, sites, ratio: [0.5 for each in sites], "keeps 0.5 of 4 units at layer 0 attention; it must be a"),
        (lambda self, sites, ratio: None, "returned a NoneType; it must return a list"),
        (lambda self, sites, ratio: [1], "returned 1 counts for 6 sites"),
        (lambda self, sites, ratio: 1 / 0, f"allocator 'plain' {ME} raised ZeroDivisionError: division by zero"),
    ],
)
def test_an_allocator_that_errs_is_named(make_model, batches, allocate, words):
    message = refused(make_model("llama-gqa"), batches, allocator=made(Plain, "errs", allocate=allocate))
    assert "allocator" in message and "plain" in message
    assert words in message


class Writing(Plain):
    """Writes to the scores it is shown."""

    needs_scores = True

    def allocate(self, sites, ratio):
        for each in sites:
            each.channels.neg_()
            each.units.neg_()
        return super().allocate(sites, ratio)


def test_an_allocator_may_write_to_the_scores(make_model):
    kept = []
    for allocator in (Plain(), Writing()):
        with prune(make_model("llama-gqa"), "magnitude", ratio=0.5, allocator=allocator) as pruned:
            kept.append(pruned.sites_kept)
    assert kept[0] == kept[1]


class Leaves(PP):
    """Leaves a hook, and writes to a norm."""

    name: Literal["leaves"] = "leaves"

    def install(self, model, layers, sites, padding_of):
        model.model.norm.register_forward_hook(lambda *call: None)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return []


def test_remove_names_the_component_that_changed_the_model(make_model, batches):
    with (
        pytest.warns(PruneWarning) as caught,
        prune(make_model("llama-gqa"), Leaves(ratio=0.4), calibration=batches) as pruned,
    ):
        pass
    (message,) = [str(each.message) for each in caught if "not what it was" in str(each.message)]
    assert "model.norm.weight has been written to; a hook is left at model.norm" in message
    assert f"strategy 'leaves' {ME}" in message
    assert pruned.changed in message


class Hidden(PP):
    """Writes to weights in a way that torch does not count."""

    name: Literal["hidden"] = "hidden"

    def install(self, model, layers, sites, padding_of):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
        return []


def test_remove_notices_writes_through_data(make_model, batches):
    with pytest.warns(PruneWarning, match=r"model\.layers\.1\.mlp\.up_proj\.weight has been written to.*'hidden'"):
        prune(make_model("llama-gqa"), Hidden(ratio=0.4), calibration=batches).remove()


def test_remove_has_nothing_to_name_where_the_model_is_as_it_was(make_model, batches, recwarn):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches, scorer=Good()) as pruned:
        model(**batches[0])
    pruned.remove()
    assert pruned.changed is None
    assert not [each for each in recwarn if "not what it was" in str(each.message)]


PLUGIN = '''
from typing import Literal
import torch
from prunekit.registry import Evaluator, Measurement, hookimpl


class Rude(Evaluator):
    """Leaves something."""

    name: Literal["rude"] = "rude"
    how: str = "hook"

    def evaluate(self, subject):
        model = subject.model
        if self.how == "hook":
            model.model.norm.register_forward_hook(lambda *call: 2 * call[2])
            model.model.layers[0].train()
        if self.how == "weight":
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
        if self.how == "data":
            model.model.embed_tokens.weight.data[0] += 1
        if self.how == "raise":
            1 / 0
        return Measurement({"one": 1}, {"counted": "one"})


@hookimpl
def evaluators():
    return [Rude]
'''


@pytest.fixture
def run(small_pipeline, tmp_path):
    """Makes a pipeline that measures perplexity, the rude evaluator, and perplexity again."""
    (tmp_path / "rude.py").write_text(PLUGIN)

    def make(how):
        content = small_pipeline(use="magnitude") | {"plugins": [str(tmp_path / "rude.py")]}
        (perplexity,) = content["evaluate"]
        return content | {"evaluate": [perplexity, {"name": "rude", "how": how}, perplexity | {"window": 16}]}

    return make


def test_what_an_evaluator_leaves_is_put_back_and_noted(run):
    rude, polite = (Pipeline(run(how)).measure().record for how in ("hook", "nothing"))
    values = [[each.pruned for each in record.metrics] for record in (rude, polite)]
    assert values[0] == values[1]
    note, *_ = [note for note in rude.notes if "put back" in note]
    assert "evaluator 'rude' of plugin file rude.py leaves a hook at model.norm" in note
    assert not [note for note in polite.notes if "put back" in note]


@pytest.mark.parametrize(("how", "weight"), [("weight", "lm_head"), ("data", "model.embed_tokens")])
def test_an_evaluator_that_changes_a_weight_ends_the_run(run, how, weight):
    with pytest.raises(PluginError, match=rf"evaluator 'rude' of plugin file rude\.py has written to {weight}\.weight"):
        Pipeline(run(how)).measure()


@pytest.mark.parametrize(
    ("how", "words", "left"),
    [("raise", "raised ZeroDivisionError", [True, False, True]), ("weight", "lm_head.weight", [True, False, False])],
)
def test_a_run_keeps_what_other_evaluators_measure(run, command, tmp_path, how, words, left):
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(run(how)))
    code, output = command("run", file, "--out", tmp_path / "out")
    assert code == 1
    assert "warning: rude has no values: evaluator 'rude' of plugin file rude.py" in output
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert [bool(metric["pruned"]) for metric in metrics] == left
    assert words in metrics[1]["notes"][0]


def test_a_trial_after_one_whose_plugin_failed_gets_another_model(run):
    worker = Worker()
    outcomes = [worker.run(PipelineSpec.of(run(how))) for how in ("nothing", "weight", "raise", "nothing")]
    assert [outcome.error is None for outcome in outcomes] == [True, False, False, True]
    assert "has written to lm_head.weight" in outcomes[1].error
    assert "evaluator 'rude' of plugin file rude.py raised ZeroDivisionError" in outcomes[2].error
    assert [each.pruned for each in outcomes[0].result.metrics] == [each.pruned for each in outcomes[3].result.metrics]
