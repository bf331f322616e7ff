"""What the Ray engine asks of a cluster and whom it gives which trial, without Ray."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from prunekit import __version__
from prunekit.compress.ablation.ray_cluster import demand
from prunekit.compress.ablation.ray_engine import TIMEOUT_VARIABLE, choose, run_ray
from prunekit.compress.ablation.ray_worker import RemoteWorker, files_of, unfitness
from prunekit.compress.ablation.trials import Planned
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import PrunekitError, SpecError


def trial(number, **sections):
    spec = PipelineSpec.of({"prune": {"use": "magnitude", "ratio": 0.1}, **sections})
    return Planned(number, str(number), {}, spec)


def machines(*resources):
    dead = {"Alive": False, "Resources": {"CPU": 100, "GPU": 100}}
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": each} for each in resources] + [dead])


@pytest.mark.parametrize(
    ("there", "devices", "workers", "threads", "expected"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], {"auto"}, None, 4, (3, 0, 1, 3)),
        ([{"CPU": 8, "GPU": 2}], {"cuda", "cpu"}, 1, 4, (1, 0, 1, 2)),
        ([{"CPU": 8, "GPU": 2}], {"cpu"}, None, 4, (2, 4, 0, 2)),
        ([{"CPU": 8}], {"cuda"}, None, 4, (1, 0, 1, 0)),  # a GPU may still come
        ([{"CPU": 8}, {"CPU": 3}], {"auto"}, None, 4, (2, 4, 0, 2)),
        ([{"CPU": 8}, {"CPU": 3}], {"auto"}, 3, 4, (3, 3, 0, 3)),  # two on the first machine, one on the second
        ([{"CPU": 2}], {"auto"}, 4, 2, (4, 1, 0, 2)),
        ([{"CPU": 2}], {"auto"}, None, 4, (1, 2, 0, 1)),
        ([{"CPU": 64}], {"auto"}, None, 1, (10, 1, 0, 64)),  # no more than trials
    ],
)
def test_workers_and_what_each_asks_for(there, devices, workers, threads, expected):
    asked = demand(machines(*there), devices, workers, threads, trials=10)
    assert (asked.workers, asked.cpus, asked.gpus, asked.room) == expected


def test_a_numbered_gpu_is_refused():
    with pytest.raises(SpecError, match=r"model.device: cuda:1 names one GPU.*set model.device: cuda"):
        demand(machines({"GPU": 2}), {"cuda:1"}, None, 1, 1)


def test_an_idle_worker_gets_what_it_knows_else_what_nobody_has():
    short, long, other = {"length": 64}, {"length": 128}, {"dtype": "bfloat16"}
    one, two, three = trial(1, calibration=short), trial(2, calibration=long), trial(3, model=other)
    same = trial(4, calibration=long)
    assert choose([one, two, three], None, []) is one
    assert choose([one, same, three], two, [one]) is same
    assert choose([one, three], two, [one]) is one  # the model it has loaded, although another worker has the text
    assert choose([one, two], None, [one]) is two
    assert choose([one, one], two, [one, one]) is one  # never none


def test_files_of_a_trial_are_looked_for_on_the_workers_machine(tmp_path):
    text, task = tmp_path / "text.txt", tmp_path / "tasks"
    text.write_text("words")
    task.mkdir()
    spec = trial(
        1,
        calibration={"file": str(text)},
        evaluate=[{"name": "perplexity", "text": {"file": str(text)}}],
        model={"name": str(task), "offload_folder": str(tmp_path)},
        output={"dir": str(tmp_path)},  # what a trial writes need not be there
    ).spec
    assert files_of(spec) == {text, task}
    assert unfitness(__version__, [text], spec.to_yaml()) is None
    text.unlink()
    assert f"it has no {text}; put" in unfitness(__version__, [text], spec.to_yaml())
    assert "there is no file" in unfitness(__version__, [], spec.to_yaml())
    assert "it has prunekit" in unfitness("0.0.0", [], spec.to_yaml())


def test_a_worker_has_the_threads_of_the_driver_and_no_gpu_that_ray_did_not_give(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    RemoteWorker(3, gpu=True)
    assert (threads, os.environ["CUDA_VISIBLE_DEVICES"]) == ([3], "7")
    RemoteWorker(2, gpu=False)
    assert (threads, os.environ["CUDA_VISIBLE_DEVICES"]) == ([3, 2], "")


def run(address=None):
    run_ray([trial(1)], lambda *said: None, None, workers=1, address=address)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match="pip install ray"):
        run()


def test_a_ray_client_address_and_a_timeout_that_is_no_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ray := machines({"CPU": 1}))
    ray.is_initialized, ray.shutdown = lambda: False, lambda: None
    with pytest.raises(SpecError, match="--address ray://there:10001: Ray Client"):
        run("ray://there:10001")
    ray.is_initialized = lambda: True
    monkeypatch.setenv(TIMEOUT_VARIABLE, "soon")
    with pytest.raises(SpecError, match=r"PRUNEKIT_RAY_TIMEOUT: expected a number.*'soon'"):
        run("there:6379")


@pytest.fixture
def joined(monkeypatch):
    """A stand-in for Ray that refuses to join; holds the addresses that it was asked for."""
    asked = []

    def init(address, **options):
        asked.append(address)
        raise ConnectionError("no cluster")

    ray = machines({"CPU": 1})
    ray.is_initialized, ray.shutdown, ray.init = lambda: False, lambda: None, init
    ray.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray._private.services", SimpleNamespace())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


@pytest.fixture
def port():
    """A port of this machine at which nothing answers, until the socket listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server


@pytest.mark.parametrize(
    ("address", "variable", "place", "remedy"),
    [
        ("127.0.0.1:{}", None, "--address 127.0.0.1:{}", "leave --address out"),
        ("localhost:{}", "there:6379", "--address localhost:{}", "leave --address out"),
        (None, "127.0.0.1:{}", "RAY_ADDRESS=127.0.0.1:{}", "leave RAY_ADDRESS out"),
        ("auto", "127.0.0.1:{}", "RAY_ADDRESS=127.0.0.1:{}", "leave RAY_ADDRESS out"),  # which means that, as in Ray
    ],
)
def test_where_nothing_answers_ray_is_not_asked(monkeypatch, joined, port, address, variable, place, remedy):
    number = port.getsockname()[1]
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable.format(number))
    with pytest.raises(SpecError) as caught:
        run(address and address.format(number))
    message = str(caught.value)
    assert message.startswith(f"{place.format(number)}: nothing answers there (Connection refused); start Ray with ray")
    assert remedy in message and not joined


def test_a_cluster_that_ray_remembers_may_have_died(monkeypatch, joined, port):
    address = f"127.0.0.1:{port.getsockname()[1]}"
    remembered = SimpleNamespace(get_ray_address_from_environment=lambda given, folder: address)
    monkeypatch.setitem(sys.modules, "ray._private.services", remembered)
    with pytest.raises(SpecError, match=rf"^--address auto \({address}\): nothing answers there .*leave --address out"):
        run("auto")
    assert not joined
    port.listen()
    with pytest.raises(PrunekitError, match="no Ray cluster can be joined there"):
        run("auto")
    assert joined == ["auto"]


def test_an_address_that_is_none(joined):
    with pytest.raises(SpecError, match=r"--address 127\.0\.0\.1:70000: nothing answers there"):
        run("127.0.0.1:70000")
    assert not joined


def test_what_answers_or_has_no_port_is_left_to_ray(monkeypatch, joined, port):
    port.listen()
    address = f"127.0.0.1:{port.getsockname()[1]}"
    for given in (address, "auto"):
        with pytest.raises(PrunekitError, match=f"^--address {given}: no Ray cluster can be joined there"):
            run(given)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(PrunekitError, match="no Ray can be started on this machine"):
        run()
    assert joined == [address, "auto", "local"]
