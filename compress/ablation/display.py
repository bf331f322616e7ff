"""A study's progress on stderr: trials done, time left, current trial; one line per trial if that is not a terminal."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ..output.pace import duration, left
from ..output.printing import Bars
from .trials import Planned, StoredTrial
from .worker import Outcome

BRIEF = 60
"""Characters of an error in a line of progress."""


class Forecast:
    """Seconds that are left, where a trial takes the median of the finished trials of its strategy."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def learn(self, strategy: str, seconds: float) -> None:
        self._seconds.setdefault(strategy, []).append(seconds)

    def left(self, strategies: Iterable[str], running: Iterable[float] = (), workers: int = 1) -> float | None:
        """For trials of these strategies, some ``running`` for so many seconds; ``None`` if no trial has finished."""
        if not self._seconds:
            return None
        overall = median(second for seconds in self._seconds.values() for second in seconds)
        needed = sum(median(self._seconds.get(strategy, [overall])) for strategy in strategies)
        spent = sum(min(seconds, overall) for seconds in running)
        return max(0.0, needed - spent) / max(1, workers)


class Display:
    """The progress display, a :class:`~.worker.Watch`; a context manager."""

    def __init__(self, trials: Sequence[Planned], stored: Sequence[StoredTrial], waiting: Sequence[Planned]):
        self._total = len(trials)
        self._waiting = {trial.key: trial for trial in waiting}
        self._running: dict[str, float] = {}
        self._failed = 0
        self._bars = Bars()
        self._forecast = Forecast()
        strategies = {trial.key: trial.spec.prune.name for trial in trials}
        for trial in stored:
            if trial.status == "done" and trial.seconds is not None and trial.key in strategies:
                self._forecast.learn(strategies[trial.key], trial.seconds)

    def __enter__(self) -> Display:
        self._bars.__enter__()
        self._task = self._bars.add("trials", self._total, self._total - len(self._waiting))
        self._refresh()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.__exit__(*exc)

    def progress(self, items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
        """The steps within a trial, on a bar of their own; the time left is updated with them."""
        if not self._bars.shown:
            yield from self._bars.minutes(items, label, total)
            return
        for item in self._bars.track(items, label, total):
            yield item
            self._refresh()

    def started(self, planned: Planned) -> None:
        self._running[planned.key] = time.monotonic()
        self._refresh()

    def finished(self, planned: Planned, outcome: Outcome) -> None:
        self._running.pop(planned.key, None)
        self._waiting.pop(planned.key, None)
        if outcome.error is None:
            self._forecast.learn(planned.spec.prune.name, outcome.seconds)
            ended = f"done in {duration(outcome.seconds)}"
        else:
            self._failed += 1
            ended = f"failed ({brief(outcome.error)})"
        done = self._total - len(self._waiting)
        if not self._bars.shown or outcome.error is not None:
            trial = f"trial {planned.number} ({planned.label})"
            self._bars.say(f"{done}/{self._total} {trial}: {ended}{f', {self.left}' if self.left else ''}")
        self._refresh()

    @property
    def left(self) -> str:
        """``about 3 min left``; empty if all is done or no trial has finished."""
        now = time.monotonic()
        strategies = [trial.spec.prune.name for trial in self._waiting.values()]
        running = [now - began for began in self._running.values()]
        seconds = self._forecast.left(strategies, running, len(running))
        return left(seconds) if strategies and seconds is not None else ""

    def _refresh(self) -> None:
        names = [trial.label for key, trial in self._waiting.items() if key in self._running]
        current = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""
        parts = ["trials", f"{self._failed} failed" if self._failed else "", self.left, current]
        self._bars.update(self._task, " · ".join(part for part in parts if part), self._total - len(self._waiting))


def brief(error: str) -> str:
    """An error's kind if it names one, else its beginning; the end of the run prints all of it."""
    line = next(iter(error.strip().splitlines()), "")
    kind = re.match(r"[A-Z]\w+(?=: )", line)
    return kind.group() if kind else textwrap.shorten(line, BRIEF, placeholder=" ...")
