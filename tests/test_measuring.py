"""What evaluators see of a pruned model: shared measurements, and other prunings of the same model in between."""

import math
from typing import Any, ClassVar, Literal

import numpy
import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.files.spec import PipelineSpec
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.registry import Catalog, DataError, Evaluator, Measurement, PluginError, SpecError
from prunekit.registry.catalog import Entry

CALLS = []


class Counting(Evaluator):
    """Says how often it ran, and what the model computes."""

    name: Literal["counting"] = "counting"
    scale: int = 1

    def evaluate(self, subject):
        CALLS.append(self.scale)
        ids = torch.arange(3, 51).view(2, 24)
        with torch.no_grad():
            value = subject.model(input_ids=ids).logits.double().abs().sum().item()
        return Measurement({"value": value, "drawn": torch.rand(1).item()}, {"scale": self.scale})


class Asking(Evaluator):
    """Asks for what another evaluator measures, both ways."""

    paired: ClassVar[bool] = True
    name: Literal["asking"] = "asking"
    what: Any = "counting"

    def evaluate(self, subject):
        found = subject.measure(self.what)
        with subject.dense():
            dense = subject.measure(self.what)
        return Measurement({"x": found.values["value"], "dense_x": dense.values["value"]}, found.protocol)


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


@pytest.fixture
def ids():
    return torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture
def measuring(make_model, batches):
    """A Measuring of a small pruned model; ``running.pruned`` is its handle."""
    opened = []

    def make(use="pp", family="llama-gqa", model=None, dense=None, listed=(), **options):
        model = make_model(family) if model is None else model
        pruned = prune(model, use, calibration=batches, **{"ratio": 0.5, **options})
        opened.append(pruned)
        found = Measuring(
            Loaded(model, None, {}), pruned, lambda items, *_: items, {} if dense is None else dense, listed
        )
        found.pruned = pruned
        return found

    yield make
    for pruned in opened:
        pruned.remove()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def state(model):
    """Everything that pruning touches: classes, attributes, hooks, configuration and parameters."""
    return [
        (
            name,
            type(module),
            sorted(key for key in vars(module) if not key.startswith("_")),
            {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            [
                (key, id(parameter), parameter._version, parameter.stride(), parameter.data_ptr() % 64, tuple(row))
                for key, parameter in module.named_parameters(recurse=False)
                for row in parameter.detach().reshape(len(parameter), -1).tolist()
            ],
        )
        for name, module in model.named_modules()
    ] + [model.config._attn_implementation]


def test_what_two_evaluators_ask_for_is_measured_once(measuring, calls):
    running = measuring(listed=(Asking(), Counting(scale=5), Counting(scale=7)))
    asked = running.measure(Asking())
    assert calls == [5, 5]  # pruned and dense, by the first that is listed
    assert running.measure(Counting(scale=5)).values["value"] == asked.values["x"]
    assert running.measure(Counting(scale=5), dense=True).values["value"] == asked.values["dense_x"]
    assert asked.values["x"] != asked.values["dense_x"] and calls == [5, 5]
    running.measure(Counting(scale=7))
    running.measure(Asking(what=Counting(scale=7)))
    assert calls == [5, 5, 7, 7]


def test_an_evaluator_by_its_name_alone_needs_defaults(measuring):
    class Needy(Counting):
        """Needs a size."""

        name: Literal["needy"] = "needy"
        size: int

    catalog = Catalog.discover(block="")
    catalog.entries.append(Entry("evaluators", "needy", Needy, "mine", "file mine.py"))
    with pytest.raises(
        SpecError, match=r"^evaluator 'needy' of file mine.py: option size is required; measure it by an"
    ):
        measuring(catalog=catalog).measure("needy")
    assert measuring(listed=(Needy(size=3),), catalog=catalog).measure("needy").protocol == {"scale": 1}


def test_dense_measurements_are_shared_by_runs_and_pruned_ones_are_not(measuring, make_model, calls):
    model, dense = make_model("llama-gqa"), {}
    first = measuring("pp", model=model, dense=dense)
    one = first.measure(Counting(), dense=True), first.measure(Counting())
    first.pruned.remove()
    second = measuring("wanda_sp", model=model, dense=dense)
    two = second.measure(Counting(), dense=True), second.measure(Counting())
    assert len(calls) == 3 and two[0] is one[0]
    assert two[1].values["value"] != one[1].values["value"]


def test_an_evaluator_goes_on_alike_whether_what_it_asked_for_was_known(measuring, ids):
    """PP's history moves while another evaluator measures, and so does the random state: neither shows afterwards."""
    found = []
    for known in (False, True):
        running = measuring()
        subject = running
        if known:
            running.measure(Counting())
        logits(subject.model, ids)
        subject.measure(Counting())
        found.append((logits(subject.model, ids), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_every_measurement_begins_calibrated(measuring, ids):
    running = measuring()
    first = running.measure(Counting())
    for _ in range(3):
        logits(running.loaded.model, ids)  # history moves
    moved = running.measure(Counting(scale=2))
    assert moved.values == first.values


@pytest.mark.parametrize("use", ["pp", "flap", "wanda_sp"])
@pytest.mark.parametrize("options", [{}, {"attention_unit": "query_head", "skip_layers": [1]}], ids=["groups", "heads"])
def test_full_batch_probing_leaves_everything_as_it_was(measuring, ids, use, options):
    running = measuring(use, **options)
    subject, model, counts = running, running.loaded.model, running.pruned.counts
    with subject.dense():
        unpruned = logits(model, ids)
    running.pruned.reset()
    own, kept = logits(model, ids), subject.kept()
    running.pruned.reset()
    before = state(model)
    histories = [cut.history.clone() for cut in running.pruned._engine.cuts]
    with subject.full_batch():
        full, probed = logits(model, ids), subject.kept()
        assert {place: len(units) for place, units in probed.items()} == {
            place: len(units) for place, units in kept.items()
        }
        with subject.dense():
            assert torch.equal(logits(model, ids), unpruned)
        assert torch.equal(logits(model, ids), full)  # it has no history
    with pytest.raises(RuntimeError, match="half way"), subject.full_batch():
        logits(model, ids)
        raise RuntimeError("half way")
    assert state(model) == before and running.pruned.counts == counts
    for cut, history in zip(running.pruned._engine.cuts, histories, strict=True):
        for name in ("table", "rows", "mean"):
            old, new = getattr(history, name), getattr(cut.history, name)
            assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(logits(model, ids), own) and subject.kept() == kept
    assert kept != probed and not torch.equal(own, full) and not torch.equal(full, unpruned)
    running.pruned.remove()
    assert torch.equal(logits(model, ids), unpruned)


def test_full_batch_probing_is_the_strategy_of_that_name(measuring, make_model, ids):
    running = measuring("pp")
    with running.full_batch():
        full = logits(running.loaded.model, ids)
    other = make_model("llama-gqa")
    with prune(other, "full_batch_probing", ratio=0.5, merger="probe_only"):
        assert torch.equal(logits(other, ids), full)


def test_full_batch_probing_works_for_opt(measuring, ids):
    running = measuring("flap", family="opt")
    with running.full_batch():
        assert logits(running.loaded.model, ids).isfinite().all()
        found = {place: len(units) for place, units in running.kept().items()}
    assert found == running.pruned.counts and len(set(found.values())) > 2  # not uniform


def test_measurements_of_full_batch_probing_are_not_taken_for_the_strategys(measuring, calls):
    running = measuring()
    subject = running
    with subject.full_batch():
        full = subject.measure(Counting())
        dense = running.measure(Counting(), dense=True)
        assert subject.measure(Counting()) is full
    assert running.measure(Counting()).values["value"] not in (full.values["value"], dense.values["value"])
    assert running.measure(Counting(), dense=True) is dense and len(calls) == 3


@pytest.mark.parametrize("use", ["pp", "wanda_sp"])
def test_a_suspended_model_is_as_it_was_before(make_model, batches, ids, use):
    model = make_model("llama-gqa")
    before, unpruned = state(model), logits(model, ids)
    with prune(model, use, ratio=0.5, calibration=batches, attention_unit="query_head") as pruned:
        own, while_pruned = logits(model, ids), state(model)
        pruned.reset()
        with pruned.suspended():
            assert state(model) == before and torch.equal(logits(model, ids), unpruned) and pruned.is_dense
            with prune(model, "magnitude", ratio=0.25):
                assert not torch.equal(logits(model, ids), unpruned)
        assert not pruned.is_dense and state(model) == while_pruned
        assert torch.equal(logits(model, ids), own)
        pruned.reset()
        with pruned.dense(), pruned.suspended():
            pass
        with pytest.raises(KeyError), pruned.suspended():
            raise KeyError
        assert torch.equal(logits(model, ids), own)
        with pruned.suspended():
            pruned.remove()
    assert state(model) == before and torch.equal(logits(model, ids), unpruned)


def test_too_long_a_batch_leaves_nothing_open(measuring, ids):
    running = measuring("pp")
    subject, before = running, state(running.loaded.model)
    with pytest.raises(DataError, match="longer than the history"):
        logits(subject.model, torch.cat([ids, ids], 1))
    assert state(running.loaded.model) == before and subject.held_bytes()["gathered"] == 0


GIVEN = []


class Giving(Evaluator):
    """Returns the values it was made with."""

    name: Literal["giving"] = "giving"

    def evaluate(self, subject):
        return GIVEN[-1]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "evaluator 'giving' returned NoneType, expected a Measurement"),
        (Measurement([1.0], {}), "evaluator 'giving': values is of type list; return a dict of numbers"),
        (Measurement({"x": "hello"}, {}), "evaluator 'giving': value x is 'hello' (str); return a number or None"),
        (Measurement({"x": True}, {}), "evaluator 'giving': value x is True (bool); return a number or None"),
        (Measurement({"x": [1.0]}, {}), "evaluator 'giving': value x is [1.0] (list); return a number or None"),
        (
            Measurement({"x": torch.ones(1)}, {}),
            "evaluator 'giving': value x is tensor([1.]) (Tensor); return a number or None",
        ),
        (Measurement({1: 1.0}, {}), "evaluator 'giving': a value is called 1 (int); name it by a string"),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_what_is_no_measurement_is_refused(measuring, found, message, dense):
    GIVEN.append(found)
    with pytest.raises(PluginError) as caught:
        measuring("magnitude").measure(Giving(), dense)
    assert str(caught.value) == message


def test_scalars_become_numbers_and_what_is_not_finite_gets_a_note(measuring):
    values = {
        "a": torch.tensor(0.5),
        "b": numpy.int64(3),
        "c": numpy.array(2.0),
        "d": None,
        "e": 1,
        "f": torch.tensor(7),
    }
    GIVEN.append(Measurement({**values, "g": math.nan, "h": -math.inf}, {}, ["own note"]))
    found = measuring("magnitude").measure(Giving())
    plain = {name: value for name, value in found.values.items() if name not in "gh"}
    assert plain == {"a": 0.5, "b": 3, "c": 2.0, "d": None, "e": 1, "f": 7}
    assert [type(value) for value in plain.values()] == [float, int, float, type(None), int, int]
    assert found.notes == ["own note", "value g is nan", "value h is -inf"]


def test_an_error_of_the_system_is_the_evaluators_own(tmp_path):
    class Server(Evaluator):
        """Asks a server."""

        name: Literal["server"] = "server"
        full: bool = False

        def evaluate(self, subject):
            raise OSError(28, "No space left on device") if self.full else OSError("http://127.0.0.1:9 does not answer")

    catalog = Catalog.discover()
    for full, words in ((False, "does not answer"), (True, "No space left on device")):
        data = {"prune": {"use": "magnitude", "ratio": 0.2}, "evaluate": [Server(full=full)]}
        with pytest.raises(DataError, match=f"evaluator server cannot measure: .*{words}"):
            Pipeline(PipelineSpec.of(data, catalog=catalog)).run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
