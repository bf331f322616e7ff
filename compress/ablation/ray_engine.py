"""Spreads a study's trials over a Ray cluster: one model per worker, one writer of the store."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import __version__
from ...registry import PrunekitError, SpecError
from ..models.loading import reason_of
from .display import Watch
from .planned import Planned
from .ray_cluster import Demand, connected, demand, resources
from .ray_worker import Place, RemoteWorker, files_of
from .worker import Outcome

ATTEMPTS = 3
"""Times that a trial is begun whose workers die, and that a worker which dies as it starts is started anew."""

TIMED = ("latency", "prr")
"""Evaluators whose values are times: worth nothing from a machine that does other things meanwhile."""

TIMEOUT_VARIABLE = "PRUNEKIT_RAY_TIMEOUT"
TIMEOUT = 180.0
"""Seconds to wait while not a single worker is there, where the environment says nothing else."""

PAUSE = 0.05
"""Seconds between two looks at what has ended."""


def run_ray(
    planned: Sequence[Planned],
    record: Callable[[Planned, Outcome], None],
    watch: Watch,
    *,
    workers: int | None,
    address: str | None,
) -> None:
    """Run trials on a Ray cluster and ``record`` each as it ends, in this process.

    Idle workers are handed trials, those of the model and calibration text that they know first. A trial whose
    worker dies is begun again on another, :data:`ATTEMPTS` times in all, then recorded as failed. Every worker
    computes with as many threads as this process, so that the values are those of the local engine. Raises
    :class:`PrunekitError` where Ray is missing, no worker starts, or a worker's machine lacks what the study needs;
    what has been recorded stays.
    """
    if not planned:
        return
    with connected(address, workers) as (ray, own):
        devices = {trial.spec.model.device for trial in planned}
        wanted = demand(ray, devices, workers, torch.get_num_threads(), len(planned))
        _Run(ray, planned, record, watch, wanted, own).run()


@dataclass
class _Seat:
    """One worker as the driver sees it."""

    actor: Any
    host: str = ""
    machine: str = ""
    """Ray's id of the machine; empty until the worker has started."""
    trial: Planned | None = None
    last: Planned | None = None
    began: float = 0.0
    company: int = 1
    """The most workers that computed on the machine during the trial, this one included."""


class _Run:
    """One call of :func:`run_ray`: who is at work on what, and what waits."""

    def __init__(
        self,
        ray: Any,
        planned: Sequence[Planned],
        record: Callable[[Planned, Outcome], None],
        watch: Watch,
        wanted: Demand,
        own: bool,
    ):
        self.ray, self.record, self.watch, self.wanted = ray, record, watch, wanted
        self.waiting = list(planned)
        self.texts = {trial.number: trial.spec.to_yaml() for trial in planned}
        self.files = sorted({file for trial in planned for file in files_of(trial.spec)})
        self.deaths: dict[int, int] = {}
        self.seats: list[_Seat] = []
        self.awaited: dict[Any, _Seat] = {}
        self.stillborn = 0
        self.alone_since = time.monotonic()
        # What a cluster of our own lacks will not come; any other may still grow.
        self.patience = 0.0 if own and not wanted.room else _timeout()

    def run(self) -> None:
        try:
            for _ in range(self.wanted.workers):
                self._hire()
            while self.waiting or self._busy():
                self._check_anyone_there()
                ready, _ = self.ray.wait(list(self.awaited), timeout=0)
                if not ready:
                    time.sleep(PAUSE)  # here, not in Ray, which would turn SIGTERM's exception into another
                for reference in ready:
                    self._hear(reference, self.awaited.pop(reference))
                self._hand_out()
        finally:
            for seat in self.seats:
                with suppress(Exception):  # a connection that is lost, while another error is on its way
                    self.ray.kill(seat.actor)

    def _hire(self) -> None:
        wanted = self.wanted
        kind = self.ray.remote(num_cpus=wanted.cpus, num_gpus=wanted.gpus, max_restarts=0)(RemoteWorker)
        seat = _Seat(kind.remote(torch.get_num_threads(), bool(wanted.gpus)))
        self.seats.append(seat)
        self.awaited[seat.actor.start.remote(__version__, self.files, next(iter(self.texts.values())))] = seat

    def _hear(self, reference: Any, seat: _Seat) -> None:
        """Take in what a worker has to say: that it has started, what became of its trial, or that it died."""
        kinds = self.ray.exceptions
        try:
            said = self.ray.get(reference)
        except (kinds.RayActorError, kinds.OutOfMemoryError, kinds.NodeDiedError, kinds.ObjectLostError) as error:
            self._bury(seat, error)
        except Exception as error:  # an outcome that does not travel, as of a plugin that gives back odd objects
            if seat.trial is None:
                raise PrunekitError(f"a Ray worker cannot start: {_reason(error)}") from None
            self._settle(seat, Outcome(None, None, f"its outcome was lost: {_reason(error)}", 0.0))
        else:
            if seat.trial is None:
                self._welcome(seat, said)
            else:
                self._settle(seat, said)

    def _welcome(self, seat: _Seat, place: Place) -> None:
        if place.problem:
            raise PrunekitError(f"Ray worker on {place.host}: {place.problem}")
        seat.host, seat.machine, self.stillborn = place.host, place.machine, 0

    def _settle(self, seat: _Seat, outcome: Outcome) -> None:
        """Record what became of the worker's trial."""
        trial, seat.last, seat.trial = seat.trial, seat.trial, None
        outcome = note_company(outcome, seat.company, seat.host)
        self.record(trial, outcome)
        self.watch.finished(trial, outcome)

    def _bury(self, seat: _Seat, error: Exception) -> None:
        """Let another worker take the place of a dead one, and its trial, if that has not killed enough of them."""
        self.seats.remove(seat)
        self.ray.kill(seat.actor)  # Ray calls a worker lost too that it cannot reach
        trial = seat.trial
        if trial is None:
            self.stillborn += 1
            if self.stillborn >= ATTEMPTS:
                if not self.seats:
                    raise PrunekitError(f"Ray workers die as they start: {_reason(error)}")
                return
        else:
            deaths = self.deaths[trial.number] = self.deaths.get(trial.number, 0) + 1
            if deaths < ATTEMPTS:
                self.waiting.insert(0, trial)
            else:
                seconds = round(time.monotonic() - seat.began, 3)
                self._settle(seat, Outcome(None, None, _killer(deaths, seat, error), seconds))
        self._hire()

    def _hand_out(self) -> None:
        """Give every idle worker a trial, if there is one."""
        for seat in self.seats:
            if not (self.waiting and seat.machine and seat.trial is None):
                continue
            taken = [other.trial or other.last for other in self.seats if other is not seat]
            trial = choose(self.waiting, seat.last, [other for other in taken if other is not None])
            self.waiting.remove(trial)
            seat.trial, seat.began, seat.company = trial, time.monotonic(), 1
            neighbours = [other for other in self._busy() if other.machine == seat.machine]
            for other in neighbours:
                other.company = max(other.company, len(neighbours))
            self.awaited[seat.actor.run.remote(self.texts[trial.number])] = seat
            self.watch.started(trial)

    def _busy(self) -> list[_Seat]:
        return [seat for seat in self.seats if seat.trial is not None]

    def _check_anyone_there(self) -> None:
        now = time.monotonic()
        if any(seat.machine for seat in self.seats):
            self.alone_since = now
        elif now - self.alone_since > self.patience:
            waited = f" in {self.patience:.0f} seconds" if self.patience else ""
            raise PrunekitError(
                f"no Ray worker has started{waited}: asked for {self.wanted.label}, and the "
                f"cluster has {resources(self.ray)}; lower --workers, set model.device, add machines or wait for other "
                f"work to end ({TIMEOUT_VARIABLE} is the time to wait, in seconds)"
            )


def choose(waiting: Sequence[Planned], last: Planned | None, others: Sequence[Planned]) -> Planned:
    """The trial for an idle worker: of the model and text of its ``last`` one, else of a text that no other has.

    Among equals, the first of the plan; there always is one, so that no worker is kept idle.
    """

    def strangeness(trial: Planned) -> tuple[bool, bool, int]:
        model, text = trial.spec.model, trial.spec.calibration
        known = last.spec if last else trial.spec
        claims = sum((other.spec.model, other.spec.calibration) == (model, text) for other in others)
        return model != known.model, text != known.calibration, claims

    return min(waiting, key=strangeness)


def note_company(outcome: Outcome, workers: int, host: str) -> Outcome:
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


def _killer(deaths: int, seat: _Seat, error: Exception) -> str:
    return (
        f"its worker died {deaths} times, the last on {seat.host} ({_reason(error)}); if memory ran out, lower batch "
        "sizes or --workers; Ray's logs of the session say more"
    )


def _reason(error: Exception) -> str:
    """What Ray's pages of explanation come down to."""
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
