"""How long a prefill and a decode step take, in pairs with the dense model, and where the time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..registry import STAGES, Evaluator, Measurement, Subject, TextSource, hookimpl
from .inputs import batch_text, one_batch, setting
from .parts import HEAD, MLP, OTHER, PROJECTIONS, SCORES, charged
from .passes import cached_prefill, decode_step, prefill, prompt_length, settle
from .timing import Clock, clock_of, machine, percentile

ATTENTION = "attention"
PARTS = (ATTENTION, MLP, HEAD, OTHER, *STAGES)
PART_OF = {PROJECTIONS: ATTENTION, SCORES: ATTENTION}

BREAKDOWN_PASSES = 3
"""Passes of each, pruned and dense, that the shares of the parts are averaged over."""


@dataclass
class Round:
    """Seconds of one timed prefill, and of every decode step after another one."""

    prefill: float
    steps: list[float]


class Latency(Evaluator):
    """Seconds of a prefill and of a decode step, pruned and dense in turn, and the median of their paired ratios.

    After ``warmup`` untimed rounds of each, pruned and dense alternate ``pairs`` times on the same tokens (a machine
    that slows down meanwhile slows both). In a round a short untimed pass comes first, so that what the change between
    pruned and dense costs is not counted: a cut that is made once is gathered and compensated anew then, one that is
    made per batch in the timed prefill. That one computes logits at every position and keeps no cache. For
    decoding, a second prefill fills a cache, untimed, and ``decode_steps`` steps of one token for each sequence
    follow; strategies that decide per batch decide in that prefill and keep to it. The tokens are given, not
    sampled, so that pruned and dense compute on the same ones.

    The time is from an idle device to a finished result: by CUDA events where the model lies on one GPU, else by the
    wall clock. ``breakdown`` adds passes of their own, in which the device is waited for at every change
    of part; their sum is larger than a timed pass. One evaluator measures one shape; list it again for another.
    Running a batch moves the history of strategies that probe; the pipeline resets it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["latency"] = "latency"
    batch_size: int = Field(default=20, ge=1, description="sequences of the batch")
    length: int = Field(default=256, ge=1, description="tokens of each sequence's prefill, at most the model's context")
    decode_steps: int = Field(
        default=16, ge=0, description="tokens for each sequence after the prefill; 0: prefill only"
    )
    pairs: int = Field(default=5, ge=1, description="timed rounds of each")
    warmup: int = Field(default=1, ge=0, description="untimed rounds of each before")
    text: TextSource | None = Field(default=None, description="take the tokens from here; null: random ones")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the random tokens")
    breakdown: bool = Field(
        default=True, description="also measure, in passes of their own, where a prefill's time goes"
    )

    def check(self, model: Any) -> None:
        """Raise SpecError where prefill and decode steps do not fit in the model's context."""
        prompt_length(self.name, model, self.length, self.decode_steps)

    def evaluate(self, subject: Subject) -> Measurement:
        """Time; raises SpecError (decode steps beyond the context) and DataError (``text`` too short)."""
        length = prompt_length(self.name, subject.model, self.length, self.decode_steps)
        ids = one_batch(subject, self.text, self.batch_size, length + self.decode_steps, self.seed)
        clock = clock_of(subject.model)
        pruned: list[Round] = []
        dense: list[Round] = []
        rounds = self.warmup + self.pairs
        for _ in subject.progress(iter(range(rounds)), self.name, rounds):
            for into, mode in ((pruned, nullcontext), (dense, subject.dense)):
                with mode():
                    into.append(one_round(clock, subject.model, ids, length))
        pruned, dense = pruned[self.warmup :], dense[self.warmup :]

        def of(take: Callable[[Round], Sequence[float]]) -> tuple[list, list]:
            return [take(done) for done in pruned], [take(done) for done in dense]

        values = compared("prefill", *of(lambda done: [done.prefill]), tokens=self.batch_size * length)
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
            "text": batch_text(self.text, self.seed),
            "batch_size": self.batch_size,
            "length": length,
            **setting(model),
            **machine(model),
        }

    def _about_breakdown(self) -> str:
        if not self.breakdown:
            return "none"
        return f"mean of {BREAKDOWN_PASSES} further prefills of each, wall clock, waiting at every change of part"


def one_round(clock: Clock, model: Any, ids: Tensor, length: int) -> Round:
    """A settling pass, a timed prefill of ids (B, length), and timed decode steps on the rest of ids (B, T)."""
    settle(model, ids)
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
    """The values called ``name``, of the samples of each round in seconds; ``tokens`` are done in one sample."""
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
    """Seconds of a prefill of ids (B, T) by part, ``pruned`` and ``dense``, that add up to the whole pass.

    A step of the deciding counts as itself, not as part of the attention or MLP within which it happens.
    """
    spent = {"pruned": Counter(dict.fromkeys(PARTS, 0.0)), "dense": Counter(dict.fromkeys(PARTS, 0.0))}
    for _ in range(BREAKDOWN_PASSES):
        for which, mode in (("pruned", nullcontext), ("dense", subject.dense)):
            with mode():
                settle(subject.model, ids)
                with charged(subject, clock.now, lambda stage: stage) as seconds:
                    prefill(subject.model, ids)
            for (part, _layer), amount in seconds.items():
                spent[which][PART_OF.get(part, part)] += amount / BREAKDOWN_PASSES
    return {which: dict(parts) for which, parts in spent.items()}


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Latency]
