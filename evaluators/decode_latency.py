"""Seconds to the first new token and for each further one, and bytes of the key/value cache, pruned and dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, Subject, hookimpl
from ..registry.tensors.caches import cache_bytes
from .latency import compared
from .passes import Decoding, decode_step, next_logits, setting, short_pass
from .timing import Clock, alternated, clock_of, machine


@dataclass
class Round:
    """Seconds to the first new token of every sequence and of every step after it, and the cache's bytes at the end."""

    first: float
    steps: list[float]
    cache_bytes: int


class DecodeLatency(Decoding):
    """Time to the first new token, time per output token, and bytes of the key/value cache, as generation has them.

    ``first_token`` is one pass over the prompts that fills a key/value cache, computes logits at the last position and
    chooses a token; strategies that decide per prompt decide in it. ``token`` is a step of one token for each sequence.
    Pruned and dense alternate ``pairs`` times after ``warmup`` untimed rounds, on the same given tokens, each round
    after a short untimed pass; ratios are paired, as in ``latency``, which times a prefill at every position without
    a cache. One evaluator measures one shape; list it again for another, such as batch sizes of 1, 8 and 20.
    """

    paired: ClassVar[bool] = True

    name: Literal["decode_latency"] = "decode_latency"
    batch_size: int = Field(default=1, ge=1, description="sequences of the batch")
    decode_steps: int = Field(default=16, ge=1, description="tokens for each sequence after the first new one")
    pairs: int = Field(default=5, ge=1, description="timed rounds, pruned and dense")
    warmup: int = Field(default=1, ge=0, description="untimed rounds before them")

    def plan(self, subject: Subject) -> str:
        """Rounds and the shape of the batch; raises DataError if the text is too short."""
        return f"{self.warmup + self.pairs} rounds of {super().plan(subject)}"

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (no cache, steps beyond the context) and DataError (``text`` too short)."""
        length = self.prompt_length(subject.model)
        ids = self.batch(subject, length + self.decode_steps)
        clock = clock_of(subject.model)
        once = partial(one_round, clock, subject.model, ids, length)
        pruned, dense = alternated(subject, self.name, self.warmup, self.pairs, once)
        values: dict[str, float | int | None] = {
            **compared("first_token", [[one.first] for one in pruned], [[one.first] for one in dense], self.batch_size),
            **compared("token", [one.steps for one in pruned], [one.steps for one in dense], self.batch_size),
            "cache_bytes": pruned[-1].cache_bytes,
            "dense_cache_bytes": dense[-1].cache_bytes,
        }
        return Measurement(values, self._protocol(subject.model, length, clock))

    def _protocol(self, model: Any, length: int, clock: Clock) -> dict[str, Any]:
        return {
            "first_token": "seconds from prompts to their first new tokens: cache filled, logits at the last position",
            "token": "seconds per step of one given token for each sequence",
            "cache_bytes": "keys, values and other states after the last step",
            "decode_steps": self.decode_steps,
            "seconds": "median of the samples",
            "p95": "nearest rank: the smallest sample that 95% do not exceed (of fewer than 20 the largest)",
            "ratio": "pruned to dense, round by round (of a round's steps the median): median, least and largest",
            "tokens_per_second": "one for each sequence, by the median",
            "order": "pruned, dense, pruned, dense, ...",
            "pairs": self.pairs,
            "warmup": self.warmup,
            "clock": clock.name,
            **self.about_batch(length),
            **setting(model),
            **machine(model),
        }


def one_round(clock: Clock, model: Any, ids: Tensor, length: int) -> Round:
    """A short untimed pass, the first token after ids (B, length), and timed steps on the rest of ids (B, T)."""
    short_pass(model, ids)
    first, (_, cache) = clock.timed(partial(first_token, model, ids[:, :length]))
    steps = []
    for token in ids[:, length:].split(1, 1):
        taken, _ = clock.timed(partial(decode_step, model, token, cache))
        steps.append(taken)
    return Round(first, steps, cache_bytes(cache))


def first_token(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """The greedy token (B,) after ids (B, T), and the cache; raises :class:`SpecError` for a model without one."""
    logits, cache = next_logits(model, ids)
    return logits.argmax(-1), cache


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [DecodeLatency]
