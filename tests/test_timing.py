"""Clocks and where the time goes, on clocks that only move when a test says so."""

from types import SimpleNamespace

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.engine import probing
from prunekit.compress.engine.gathering import Gatherer
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators import timing
from prunekit.evaluators.latency import PARTS, Latency
from prunekit.evaluators.passes import cached_prefill, prefill
from prunekit.evaluators.timing import Clock, EventClock, accelerators, clock_of
from prunekit.registry import STAGES, SpecError
from prunekit.strategies.pp.mergers import MovingAverage


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one number."""
    moment = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: moment[0]))
    return moment


def test_the_wall_clock_stops_when_the_devices_have_finished(now, monkeypatch):
    device = torch.device("cuda:0")

    def finish(waited_for):
        assert waited_for == device
        now[0] += 100 if "called" in done else 1

    done = []
    monkeypatch.setattr(timing.torch.accelerator, "synchronize", finish)

    def call():
        now[0] += 7
        done.append("called")
        return "result"

    assert Clock((device,)).timed(call) == (107, "result")
    assert Clock().now() == now[0]


def test_events_are_recorded_around_the_call_on_an_idle_device(monkeypatch):
    happened, device = [], torch.device("cuda:1")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, end):
            return 2500.0

    class Within:
        def __init__(self, entered):
            assert entered == device

        def __enter__(self):
            happened.append("enter")

        def __exit__(self, *_):
            happened.append("exit")

    cuda = SimpleNamespace(Event=Event, device=Within)
    accelerator = SimpleNamespace(synchronize=lambda _: happened.append("finish"))
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda, accelerator=accelerator))
    assert EventClock((device,)).timed(lambda: happened.append("call")) == (2.5, None)
    assert happened == ["enter", "finish", "record", "call", "record", "finish", "exit"]


@pytest.mark.parametrize(
    ("places", "device_map", "devices", "name"),
    [
        (["cpu"], None, [], "wall clock"),
        (["cuda:0"], None, ["cuda:0"], "CUDA events"),
        (["cuda:0"], {"": 0}, ["cuda:0"], "CUDA events"),
        (["cuda:0", "cuda:1"], {"model": 0, "lm_head": 1}, ["cuda:0", "cuda:1"], "wall clock"),
        (["cuda:0", "meta"], {"model": 0, "lm_head": "cpu"}, ["cuda:0"], "wall clock"),
        (["meta"], {"model": 1, "lm_head": "disk"}, ["cuda:1"], "wall clock"),
        (["meta"], {"": "disk"}, [], "wall clock"),
        (["mps:0"], None, ["mps:0"], "wall clock"),
    ],
)
def test_the_clock_follows_where_the_model_lies(places, device_map, devices, name):
    class Model(SimpleNamespace):
        def parameters(self):
            return iter([SimpleNamespace(device=torch.device(place)) for place in places])

    model = Model() if device_map is None else Model(hf_device_map=device_map)
    assert [str(device) for device in accelerators(model)] == devices
    assert clock_of(model).name == name


def test_a_prefill_needs_no_gradients_and_no_cache():
    def model(input_ids, use_cache, **_):
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=use_cache, past_key_values=None)

    ids = torch.zeros(1, 2, dtype=torch.long)
    assert prefill(model, ids) is False
    with pytest.raises(SpecError, match="has no key/value cache"):
        cached_prefill(model, ids)


# Where the time goes


@pytest.fixture
def broken_down(make_model, batches, now, monkeypatch):
    """The breakdown of a model on which only these take time: q_proj 1 s, the MLP's down_proj 3 s, the head 7 s, a
    producer's gathering 100 s, learning 1000 s, and 10,000 s around each probe."""

    def spend(seconds):
        now[0] += seconds

    def costly(function, seconds):
        def wrapped(*args, **kwargs):
            spend(seconds)
            return function(*args, **kwargs)

        return wrapped

    def copying(self, chosen, *rest):
        spend(0 if chosen.dim else 100)
        return copy(self, chosen, *rest)

    copy = Gatherer.copy
    monkeypatch.setattr(Gatherer, "copy", copying)
    monkeypatch.setattr(MovingAverage, "update", costly(MovingAverage.update, 1000))
    monkeypatch.setattr(probing, "probe_states", costly(probing.probe_states, 10_000))

    def measure(use, family="llama-gqa", **options):
        model = make_model(family)
        for name, module in model.named_modules():
            seconds = {"q_proj": 1, "down_proj": 3, "fc2": 3, "lm_head": 7}.get(name.rpartition(".")[2])
            if seconds:
                module.register_forward_hook(lambda *_, seconds=seconds: spend(seconds))
        with prune(model, use, ratio=0.5, skip_layers=[0], calibration=batches) as pruned:
            subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
            found = Latency(batch_size=4, length=24, pairs=1, warmup=0, decode_steps=0, **options).evaluate(subject)
        return {
            which: {part: round(seconds, 6) for part, seconds in parts.items()}
            for which, parts in found.details.get("breakdown", {}).items()
        }

    return measure


def nothing_but(**seconds):
    return {**dict.fromkeys(PARTS, 0), **seconds}


def test_time_is_told_apart_and_counted_once(broken_down):
    found = broken_down("pp")
    assert set(PARTS) == {"attention", "mlp", "head", "other", *STAGES}
    assert found["dense"] == nothing_but(attention=3, mlp=9, head=7)
    # Two layers are cut: three producers each in attention and two in the MLP are gathered; the q_proj and the
    # (idle) down_proj of a probe run within it.
    probe = 4 * 10_000 + 2 * 1 + 2 * 3
    assert found["pruned"] == nothing_but(attention=3, mlp=9, head=7, gather=1000, history=4000, probe=probe)


def test_a_cut_that_is_made_once_is_gathered_before(broken_down):
    found = broken_down("wanda_sp", family="opt")
    assert found["pruned"] == found["dense"] == nothing_but(attention=3, mlp=9, head=7)


def test_the_breakdown_can_be_left_out(broken_down):
    assert broken_down("wanda_sp", breakdown=False) == {}
