"""The Ray engine: a local cluster of two workers that every test joins, and what goes wrong on it."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import types
from types import SimpleNamespace

import pytest
import yaml
from prunekit.compress.ablation import ray_cluster, ray_engine
from prunekit.compress.ablation.ray_engine import run_ray
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.trials import Planned
from prunekit.compress.ablation.worker import Outcome, run_local
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.files.spec import PipelineSpec
from prunekit.registry import PrunekitError

from tests.run_records import run_record

pytestmark = pytest.mark.slow

# A cluster of the tests' own, which nobody else may join, and no token written to the user's home.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

ray = pytest.importorskip("ray")

HEAD = """
import ray, sys
ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

PATIENT = '''
import os, time
from pathlib import Path
from typing import Literal
from prunekit.registry import Evaluator, Measurement, hookimpl

class Patient(Evaluator):
    """Leaves word of its process and waits, the first time."""
    name: Literal["patient"] = "patient"
    flag: str
    def evaluate(self, subject):
        if not Path(self.flag).exists():
            Path(self.flag + ".new").write_text(str(os.getpid()))
            os.replace(self.flag + ".new", self.flag)
            time.sleep(120)
        return Measurement({"patience": 1.0}, {})

@hookimpl
def evaluators(): return [Patient]
'''


MEASURED = run_record(metrics=[{"evaluator": "latency", "label": "latency", "pruned": {}}])


class Watch:
    """Remembers what an engine says."""

    progress = staticmethod(no_progress)

    def __init__(self):
        self.begun, self.ended = [], []

    def started(self, planned):
        self.begun.append(planned.number)

    def finished(self, planned, outcome):
        self.ended.append(planned.number)


class Stub:
    """Stands for a worker, so that its process starts at once: the trial's seed says what becomes of it."""

    problem = None

    def __init__(self, threads, gpu):
        self.given = (threads, gpu)

    def start(self, version, files, trial):
        return SimpleNamespace(host="there", problem=self.problem)

    def run(self, trial):
        seed = yaml.safe_load(trial)["seed"]
        if seed == 13:
            os._exit(1)
        time.sleep({60: 60, 1: 0, 5: 8}.get(seed, 0.5))  # 5: while the other worker starts, too
        return Outcome(MEASURED.model_copy(update={"given": self.given}), None, None, 0.5)


@pytest.fixture(scope="module")
def head():
    """The address of a cluster with two CPUs."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process.stdout.readline().strip()
    process.communicate()


@pytest.fixture
def stub(monkeypatch):
    """Workers that compute nothing."""
    kind = type("Stub", (Stub,), {})
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_engine, "RemoteWorker", kind)
    yield kind
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def plan(*seeds, **model):
    return [
        Planned(number, str(number), {"seed": seed}, pipeline(seed, **model)) for number, seed in enumerate(seeds, 1)
    ]


def pipeline(seed=0, length=512, **model):
    return PipelineSpec.of(
        {"prune": {"use": "magnitude", "ratio": 0.1}, "seed": seed, "model": model, "calibration": {"length": length}}
    )


def run(planned, address, watch=None, workers=2):
    outcomes = {}
    run_ray(planned, lambda p, o: outcomes.update({p.number: o}), watch or Watch(), workers=workers, address=address)
    return outcomes


def without_times(outcome):
    metrics = [metric.model_copy(update={"seconds": 0}) for metric in outcome.result.metrics]
    return outcome.result.model_copy(update={"started": "", "seconds": None, "metrics": metrics}), outcome.resolved


def test_results_are_those_of_the_local_engine_though_a_worker_is_killed(head, tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    flag = tmp_path / "flag"
    measured = [{"name": "perplexity", "limit": 1, "window": 32}]
    study = {
        "base": {
            "plugins": ["patient.py"],
            "calibration": {"sequences": 2, "length": 32},
            "prune": {"use": "wanda_sp", "ratio": 0.4},
            "evaluate": measured,
        },
        "trials": [
            {"prune.use": "flap", "evaluate": [*measured, {"name": "patient", "flag": str(flag)}]},
            {"prune.use": "pp"},
            {"calibration.length": 100_000},
        ],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    planned = Study.load(tmp_path / "study.yaml").trials

    def kill():
        while not flag.exists():
            time.sleep(0.05)
        os.kill(int(flag.read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    watch = Watch()
    spread = run(planned, head, watch)
    here = {}
    run_local(planned, lambda trial, outcome: here.update({trial.number: outcome}), Watch())
    assert sorted(watch.begun) == sorted(watch.ended) == [1, 2, 3]
    for number in (1, 2):
        assert without_times(spread[number]) == without_times(here[number])
    assert "context" in spread[3].error and spread[3].error == here[3].error


def test_a_trial_that_kills_its_workers_fails_and_the_others_are_done(head, stub):
    watch = Watch()
    outcomes = run(plan(13, 2, 3, 4), head, watch)
    assert "worker died 3 times, first on there" in outcomes[1].error
    assert sorted(watch.begun) == sorted(watch.ended) == [1, 2, 3, 4]
    assert all(outcomes[number].error is None for number in (2, 3, 4))


def test_times_measured_side_by_side_carry_a_note(head, stub, monkeypatch):
    for outcome in run(plan(5, 5), head).values():
        assert "while 2 workers computed on there" in outcome.result.notes[0]
        assert outcome.result.metrics[0].notes == outcome.result.notes
    monkeypatch.setattr(ray_engine.torch, "get_num_threads", lambda: 5)
    assert run(plan(2), head)[1].result == MEASURED.model_copy(update={"given": (5, False)})


def test_an_interruption_keeps_what_is_finished_and_ends_the_workers(head, stub):
    class Impatient(Watch):
        def finished(self, planned, outcome):
            raise KeyboardInterrupt

    recorded = []
    with ray_cluster.connected(head, None):
        with pytest.raises(KeyboardInterrupt):
            run_ray(plan(60, 1), lambda p, o: recorded.append(p.number), Impatient(), workers=2, address=head)
        assert recorded == [2]
        deadline = time.monotonic() + 20
        while ray.available_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline, "a worker still holds its CPU"
            time.sleep(0.1)


def test_a_machine_that_lacks_something_is_named(head, stub):
    stub.problem = "it has no /data/text.txt"
    with pytest.raises(PrunekitError, match="Ray worker on there: it has no /data/text"):
        run(plan(1), head)


def test_workers_that_cannot_import_prunekit(head, monkeypatch):
    nowhere = types.ModuleType("prunekit_of_the_driver")
    monkeypatch.setitem(sys.modules, nowhere.__name__, nowhere)
    members = {"__module__": nowhere.__name__, "__init__": Stub.__init__, "start": Stub.start}
    nowhere.Worker = type("Worker", (), members)
    monkeypatch.setattr(ray_engine, "RemoteWorker", nowhere.Worker)
    with pytest.raises(PrunekitError, match="No module named 'prunekit_of_the_driver'; install "):
        run(plan(1), head)


def test_waiting_for_what_the_cluster_has_not_ends(head, monkeypatch):
    monkeypatch.setenv(ray_engine.TIMEOUT_VARIABLE, "0.5")
    asked = r"asked for 2 workers with 1 GPU each, and the cluster has GPU 0 \(0 free\), CPU 2"
    with pytest.raises(PrunekitError, match=asked):
        run(plan(1, 2, device="cuda"), head)


def test_a_cluster_of_its_own_is_started_and_stopped(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    found = []
    connect = ray_cluster._connect
    monkeypatch.setattr(ray_cluster, "_connect", lambda *args: (connect(*args), found.append(ray.nodes())))
    monkeypatch.setattr(ray_engine, "demand", lambda *args: ray_cluster.Demand(1, cpus=0, gpus=1, room=0))
    with pytest.raises(PrunekitError, match="no Ray worker has started: asked for 1 worker with 1 GPU each"):
        run(plan(1, device="cuda"), None)
    assert found[0][0]["Resources"]["CPU"] >= 2
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
