"""Runs a study's trials on a Ray cluster: one model per worker, one writer of the store."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import __version__
from ...registry import PrunekitError, SpecError
from ..models.loading import reason_of
from .ray_cluster import Demand, connected, demand, resources
from .ray_worker import RemoteWorker, files_of
from .trials import Planned
from .worker import Outcome, Watch

ATTEMPTS = 3
"""Times that Ray runs a trial whose worker dies, or starts a worker that dies as it starts."""

TIMED = ("latency", "prr")
"""Evaluators whose values are times, which other work on the same machine changes."""

TIMEOUT_VARIABLE = "PRUNEKIT_RAY_TIMEOUT"
TIMEOUT = 180.0
"""Seconds to wait for the first worker, unless the environment sets another number."""

PAUSE = 0.05
"""Seconds between two polls."""


def run_ray(
    planned: Sequence[Planned],
    record: Callable[[Planned, Outcome], None],
    watch: Watch,
    *,
    workers: int | None,
    address: str | None,
) -> None:
    """Run trials on a Ray cluster and ``record`` each as it ends, in this process.

    An idle worker gets a trial of the model and calibration text that it has loaded, if there is one. Where a worker
    dies, Ray starts it again and repeats its trial, :data:`ATTEMPTS` times in all; the trial is then recorded as
    failed. Every worker computes with as many threads as this process, so that the values are those of the local
    engine. Raises :class:`PrunekitError` where Ray is missing, no worker starts, or a worker's machine lacks what the
    study needs; what has been recorded stays.
    """
    if not planned:
        return
    with connected(address, workers) as (ray, own):
        devices = {trial.spec.model.device for trial in planned}
        wanted = demand(ray, devices, workers, torch.get_num_threads(), len(planned))
        # A cluster of our own does not grow; any other may.
        pool = _Pool(ray, wanted, planned, patience=0.0 if own and not wanted.room else _timeout())
        try:
            for trial, outcome in pool.outcomes(watch):
                record(trial, outcome)
                watch.finished(trial, outcome)
        finally:
            pool.close()


@dataclass(eq=False)
class _Slot:
    """One worker of the pool, and the trial that it runs."""

    actor: Any = None
    host: str = ""
    """Its machine; empty until the worker has started."""
    trial: Planned | None = None
    last: Planned | None = None
    began: float = 0.0
    neighbours: int = 1
    """The most workers that computed on the machine during the trial, this one included."""


class _Pool:
    """The workers of one study; Ray restarts those that die and repeats what they did."""

    def __init__(self, ray: Any, wanted: Demand, planned: Sequence[Planned], patience: float):
        self.ray, self.wanted, self.patience = ray, wanted, patience
        self.waiting = list(planned)
        self.texts = {trial.number: trial.spec.to_yaml() for trial in planned}
        self.files = sorted({file for trial in planned for file in files_of(trial.spec)})
        self.slots = [_Slot() for _ in range(wanted.workers)]
        self.pending: dict[Any, _Slot] = {}
        """The slot, by Ray's reference to what its worker is doing."""
        needs = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}
        self.kind = ray.remote(**needs, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(RemoteWorker)

    def outcomes(self, watch: Watch) -> Iterator[tuple[Planned, Outcome]]:
        """All trials, each as it ends."""
        for slot in self.slots:
            self._start(slot)
        began = time.monotonic()
        while self.waiting or any(slot.trial for slot in self.slots):
            ready, _ = self.ray.wait(list(self.pending), timeout=0)
            if not ready:
                if not any(slot.host for slot in self.slots) and time.monotonic() - began > self.patience:
                    raise self._nobody()
                time.sleep(PAUSE)  # not in ray.wait, which turns the exception of SIGTERM into another
            for reference in ready:
                slot = self.pending.pop(reference)
                trial = slot.trial
                if trial is None:
                    self._started(slot, reference)
                else:
                    outcome = self._outcome(slot, reference)
                    slot.last, slot.trial = trial, None
                    yield trial, outcome
                if slot.host and self.waiting:
                    watch.started(self._submit(slot))
                elif slot.host:
                    self.ray.kill(slot.actor)  # makes room for another worker that Ray has to restart

    def close(self) -> None:
        """End all workers."""
        for slot in self.slots:
            with suppress(Exception):  # a connection that is lost, while another error is raised
                self.ray.kill(slot.actor)

    def _start(self, slot: _Slot) -> None:
        slot.actor, slot.host = self.kind.remote(torch.get_num_threads(), bool(self.wanted.gpus)), ""
        self.pending[slot.actor.start.remote(__version__, self.files, next(iter(self.texts.values())))] = slot

    def _started(self, slot: _Slot, reference: Any) -> None:
        """Note where a worker is, or drop its slot while others are left."""
        try:
            place = self.ray.get(reference)
        except Exception as error:
            self.ray.kill(slot.actor)
            self.slots.remove(slot)
            if not self.slots:
                raise PrunekitError(f"no Ray worker can start: {_reason(error)}") from None
            return
        if place.problem:
            raise PrunekitError(f"Ray worker on {place.host}: {place.problem}")
        slot.host = place.host

    def _submit(self, slot: _Slot) -> Planned:
        """Give an idle worker a trial, and return it."""
        others = [other.trial or other.last for other in self.slots if other is not slot]
        trial = choose(self.waiting, slot.last, [other for other in others if other is not None])
        self.waiting.remove(trial)
        slot.trial, slot.began, slot.neighbours = trial, time.monotonic(), 1
        here = [other for other in self.slots if other.trial and other.host == slot.host]
        for other in here:
            other.neighbours = max(other.neighbours, len(here))
        self.pending[slot.actor.run.remote(self.texts[trial.number])] = slot
        return trial

    def _outcome(self, slot: _Slot, reference: Any) -> Outcome:
        """The outcome of a trial; where its worker could not be kept alive, another takes the worker's place."""
        try:
            return with_notes(self.ray.get(reference), slot.neighbours, slot.host)
        except Exception as error:
            message = (
                f"its worker died {ATTEMPTS} times, first on {slot.host} ({_reason(error)}); if memory ran out, lower "
                "batch sizes or --workers; Ray's logs of the session say more"
            )
            self.ray.kill(slot.actor)
            self._start(slot)
            return Outcome(None, None, message, round(time.monotonic() - slot.began, 3))

    def _nobody(self) -> PrunekitError:
        waited = f" in {self.patience:.0f} seconds" if self.patience else ""
        return PrunekitError(
            f"no Ray worker has started{waited}: asked for {self.wanted.label}, and the cluster has "
            f"{resources(self.ray)}; lower --workers, set model.device, add machines or wait for other work to end "
            f"({TIMEOUT_VARIABLE} is the time to wait, in seconds)"
        )


def choose(waiting: Sequence[Planned], last: Planned | None, others: Sequence[Planned]) -> Planned:
    """The trial for an idle worker: of the model and text of its ``last`` one, else of a text that no other has.

    Among equals, the first of the plan.
    """

    def cost(trial: Planned) -> tuple[bool, bool, int]:
        model, text = trial.spec.model, trial.spec.calibration
        loaded = last.spec if last else trial.spec
        users = sum((other.spec.model, other.spec.calibration) == (model, text) for other in others)
        return model != loaded.model, text != loaded.calibration, users

    return min(waiting, key=cost)


def with_notes(outcome: Outcome, workers: int, host: str) -> Outcome:
    """The outcome with a note on every measured time, if several ``workers`` computed on the machine at once."""
    if workers < 2 or outcome.result is None:
        return outcome
    metrics, notes = [], list(outcome.result.notes)
    for metric in outcome.result.metrics:
        if metric.evaluator in TIMED:
            note = (
                f"{metric.label}: measured while {workers} workers computed on {host}, which changes times; "
                "measure them with one worker a machine"
            )
            metric = metric.model_copy(update={"notes": [*metric.notes, note]})
            notes.append(note)
        metrics.append(metric)
    return replace(outcome, result=outcome.result.model_copy(update={"metrics": metrics, "notes": notes}))


def _reason(error: Exception) -> str:
    """The cause in one line of Ray's pages of explanation."""
    text = str(error)
    module = re.search(r"No module named '[^']+'", text)
    if module:
        return f"{module[0]}; install prunekit, and plugins that it needs, on every machine of the cluster"
    detail = re.search(r"exit detail: (.+?)\.( Some common|$)", text, re.MULTILINE)
    return detail[1] if detail else reason_of(getattr(error, "cause", None) or error)


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    try:
        seconds = TIMEOUT if text is None else float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise SpecError(f"{TIMEOUT_VARIABLE}: expected a number of seconds above 0 (found {text!r})")
    return seconds
