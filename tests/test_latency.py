"""The latency evaluator: order of the passes, arithmetic of the ratios, protocol. Speed itself is not asserted."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from prunekit.evaluators import latency
from prunekit.evaluators.latency import Latency, prefill_seconds, processor
from prunekit.registry import Catalog, Subject


@pytest.fixture
def subject(make_model):
    """A real model; ``subject.shown`` records mode and ids of every pass."""
    model, mode = make_model("llama-gqa"), ["pruned"]

    @contextmanager
    def dense():
        mode[0] = "dense"
        try:
            yield
        finally:
            mode[0] = "pruned"

    found = Subject(model, None, None, dense, lambda: 0)
    found.shown = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: found.shown.append((mode[0], kwargs["input_ids"])), with_kwargs=True
    )
    return found


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "latency") is Latency


def test_pruned_and_dense_alternate_on_one_batch(subject):
    Latency(batch_size=3, length=12, pairs=2, warmup=1).evaluate(subject)
    whole = [(mode, ids) for mode, ids in subject.shown if ids.shape == (3, 12)]
    assert [mode for mode, _ in whole] == ["pruned", "dense"] * 3
    assert all(ids.equal(whole[0][1]) for _, ids in whole)
    # before each of them a short pass in the same mode
    assert [(mode, tuple(ids.shape)) for mode, ids in subject.shown[::2]] == [("pruned", (1, 8)), ("dense", (1, 8))] * 3


def test_ratios_are_paired_and_warm_up_is_left_out(subject, monkeypatch):
    # (pruned, dense) seconds: the warm-up, then three pairs
    times = iter([100, 1, 2, 4, 3, 4, 6, 12])
    monkeypatch.setattr(latency, "settled_seconds", lambda model, ids: next(times))
    found = Latency(batch_size=1, length=4, pairs=3, warmup=1).evaluate(subject)
    assert found.values == {
        "seconds": 3,
        "dense_seconds": 4,
        "time_ratio": 0.5,
        "time_ratio_min": 0.5,
        "time_ratio_max": 0.75,
    }


def test_protocol_names_the_machine_and_the_shapes(subject):
    seen = []
    subject.progress = lambda items, label, total: seen.append((label, total)) or items
    found = Latency(batch_size=1, length=4000, pairs=1, warmup=0, seed=2).evaluate(subject)
    assert seen == [("latency", 1)]
    protocol = found.protocol
    assert (protocol["batch_size"], protocol["length"], protocol["pairs"], protocol["warmup"]) == (1, 256, 1, 0)
    assert protocol["processor"] == processor() != ""
    assert (protocol["torch"], protocol["threads"]) == (torch.__version__, torch.get_num_threads())
    assert (protocol["dtype"], protocol["device"], protocol["text"]) == ("float32", "cpu", "random ids, seed 2")
    assert all(value > 0 for value in found.values.values())


def test_the_clock_runs_during_the_forward_pass_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def model(input_ids, use_cache):
        assert not use_cache and not torch.is_grad_enabled()
        now[0] += 7
        return SimpleNamespace(logits=input_ids)

    assert prefill_seconds(model, torch.zeros(1, 2, dtype=torch.long)) == 7


def test_it_runs_on_a_pruned_model(make_model, batches):
    prune = pytest.importorskip("prunekit.compress").prune
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, skip_layers=[], calibration=batches) as pruned:
        subject = Subject(model, None, None, pruned.dense, pruned.active_parameters)
        values = Latency(batch_size=2, length=24, pairs=1).evaluate(subject).values
    assert values["time_ratio_min"] == values["time_ratio"] == values["time_ratio_max"] > 0


def test_a_model_compared_with_itself_needs_no_dense_mode(make_model):
    subject = Subject(make_model("opt"), None, None, nullcontext, lambda: 0)
    assert Latency(batch_size=1, length=8, pairs=2).evaluate(subject).values["time_ratio"] > 0
