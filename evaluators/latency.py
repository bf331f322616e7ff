"""Seconds of a prefill and of a decode step, pruned and dense in turn, and seconds of each part of a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..registry import STAGES, Evaluator, Measurement, Subject, hookimpl
from .parts import HEAD, MLP, OTHER, PROJECTIONS, SCORES, attributed
from .passes import Decoding, cached_prefill, decode_step, prefill, setting, short_pass
from .timing import Clock, alternated, clock_of, machine, percentile

ATTENTION = "attention"
PARTS = (ATTENTION, MLP, HEAD, OTHER, *STAGES)
PART_OF = {PROJECTIONS: ATTENTION, SCORES: ATTENTION}

BREAKDOWN_PASSES = 3
"""Passes, pruned and dense, that the seconds of the parts are averaged over."""


@dataclass
class Round:
    """Seconds of one timed prefill, and of every decode step after another one."""

    prefill: float
    steps: list[float]


class Latency(Decoding):
    """Seconds of a prefill and of a decode step, pruned and dense in turn, and the median of their paired ratios.

    After ``warmup`` untimed rounds, pruned and dense alternate ``pairs`` times on the same tokens, so that a machine
    that slows down slows both. Every round starts with a short untimed pass, in which a static cut gathers its weights
    and folds its compensation in; a strategy that decides per batch does both in the timed prefill. The timed prefill
    computes logits at every position and keeps no cache. For decoding, a second, untimed prefill fills a cache, and
    ``decode_steps`` steps of one token for each sequence follow; strategies that decide per batch decide in that
    prefill and keep the decision. The tokens are fixed, not sampled, so that pruned and dense compute the same ones.

    The time is from an idle device to a finished result: by CUDA events if the whole model is on one GPU, else by the
    wall clock. ``breakdown`` runs additional passes that synchronize the device at every change of part; their sum is
    larger than a timed pass. One evaluator measures one shape; list it again for another. A batch changes the history
    of strategies that probe; the pipeline restores it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["latency"] = "latency"
    pairs: int = Field(default=5, ge=1, description="timed rounds, pruned and dense")
    warmup: int = Field(default=1, ge=0, description="untimed rounds before them")
    breakdown: bool = Field(
        default=True, description="also measure the seconds of each part of a prefill, in additional passes"
    )

    def plan(self, subject: Subject) -> str:
        """Rounds and the shape of the batch; raises DataError if the text is too short."""
        return f"{self.warmup + self.pairs} rounds of {super().plan(subject)}"

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (decode steps beyond the context) and DataError (``text`` too short)."""
        length = self.prompt_length(subject.model)
        ids = self.batch(subject, length + self.decode_steps)
        clock = clock_of(subject.model)
        once = partial(one_round, clock, subject.model, ids, length)
        pruned, dense = alternated(subject, self.name, self.warmup, self.pairs, once)

        def of(take: Callable[[Round], Sequence[float]]) -> tuple[list, list]:
            return [take(done) for done in pruned], [take(done) for done in dense]

        values: dict[str, float | int | None] = dict(
            compared("prefill", *of(lambda done: [done.prefill]), tokens=self.batch_size * length)
        )
        if self.decode_steps:
            values |= compared("decode", *of(lambda done: done.steps), tokens=self.batch_size)
        details = {}
        if self.breakdown and subject.sites:
            details["breakdown"] = breakdown(subject, clock, ids[:, :length])
        return Measurement(values, self._protocol(subject.model, length, clock), details=details)

    def _protocol(self, model: Any, length: int, clock: Clock) -> dict[str, Any]:
        decoding = {
            "decode": "seconds per step of one given token for each sequence, after a prefill with a cache",
            "decode_steps": self.decode_steps,
            "decode_samples": f"{self.pairs * self.decode_steps}, all steps of all rounds",
        }
        return {
            "prefill": "seconds per batch, logits at every position, no cache",
            "gather": "of weights, and compensation: for a cut made once before the clock starts; for one made per "
            "batch in its prefill",
            "prefill_samples": self.pairs,
            **(decoding if self.decode_steps else {}),
            "seconds": "median of the samples",
            "p95": "nearest rank: the smallest sample that 95% do not exceed (of fewer than 20 the largest)",
            "ratio": "pruned to dense, round by round (of a round's steps the median): median, least and largest",
            "tokens_per_second": "by the median; a prefill's own tokens, or one for each sequence and step",
            "order": "pruned, dense, pruned, dense, ...",
            "pairs": self.pairs,
            "warmup": self.warmup,
            "breakdown": self._about_breakdown(),
            "clock": clock.name,
            **self.about_batch(length),
            **setting(model),
            **machine(model),
        }

    def _about_breakdown(self) -> str:
        if not self.breakdown:
            return "none"
        return f"mean of {BREAKDOWN_PASSES} further prefills of each, wall clock, waiting at every change of part"


def one_round(clock: Clock, model: Any, ids: Tensor, length: int) -> Round:
    """A short untimed pass, a timed prefill of ids (B, length), and timed decode steps on the rest of ids (B, T)."""
    short_pass(model, ids)
    prompt = ids[:, :length]
    seconds, logits = clock.timed(partial(prefill, model, prompt))
    del logits
    if ids.shape[1] == length:
        return Round(seconds, [])
    cache = cached_prefill(model, prompt)
    steps = []
    for token in ids[:, length:].split(1, 1):
        taken, _ = clock.timed(partial(decode_step, model, token, cache))
        steps.append(taken)
    return Round(seconds, steps)


def compared(name: str, pruned: list[list[float]], dense: list[list[float]], tokens: int) -> dict[str, float]:
    """The values ``name``_*, from each round's samples in seconds; one sample computes ``tokens`` tokens."""
    values = {}
    for prefix, rounds in (("", pruned), ("dense_", dense)):
        samples = [seconds for done in rounds for seconds in done]
        values[f"{prefix}{name}_seconds"] = median(samples)
        values[f"{prefix}{name}_p95"] = percentile(samples)
        values[f"{prefix}{name}_tokens_per_second"] = tokens / median(samples)
    ratios = [median(p) / median(d) for p, d in zip(pruned, dense, strict=True)]
    return values | {
        f"{name}_ratio": median(ratios),
        f"{name}_ratio_min": min(ratios),
        f"{name}_ratio_max": max(ratios),
    }


def breakdown(subject: Subject, clock: Clock, ids: Tensor) -> dict[str, dict[str, float]]:
    """Mean seconds of a prefill of ids (B, T) by part, ``pruned`` and ``dense``; the parts add up to the whole pass.

    A strategy's step counts as that step, not as part of the attention or MLP in which it happens.
    """
    spent = {which: dict.fromkeys(PARTS, 0.0) for which in ("pruned", "dense")}
    for _ in range(BREAKDOWN_PASSES):
        for which, mode in (("pruned", nullcontext), ("dense", subject.dense)):
            with mode():
                short_pass(subject.model, ids)
                with attributed(subject, clock.now, lambda stage: stage) as seconds:
                    prefill(subject.model, ids)
            for (part, _layer), amount in seconds.items():
                spent[which][PART_OF.get(part, part)] += amount / BREAKDOWN_PASSES
    return spent


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Latency]
