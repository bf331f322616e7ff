"""When a strategy that decides per batch decides while a model generates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..registry import PerPrompt, Policy, hookimpl


class PrefillOnly(Policy):
    """The prompt chooses units for itself; decode steps run with all units."""

    name: Literal["prefill_only"] = "prefill_only"

    @property
    def prunes_steps(self) -> bool:
        return False


class DecodeOnly(Policy):
    """The prompt runs with all units and chooses those of its decode steps."""

    name: Literal["decode_only"] = "decode_only"

    @property
    def prunes_prompt(self) -> bool:
        return False


class Repeated(Policy):
    """A policy that chooses units again in decode steps."""

    prompt: Literal["pruned", "dense"] = Field(
        default="pruned", description="whether the prompt runs pruned, or with all units as in decode_only"
    )

    @property
    def prunes_prompt(self) -> bool:
        return self.prompt == "pruned"


class EveryN(Repeated):
    """Decode steps choose units again after every n tokens, from these tokens."""

    name: Literal["every_n"] = "every_n"
    n: int = Field(default=16, ge=1, description="tokens from one decision to the next")

    @property
    def reads(self) -> int:
        return self.n

    def again(self, since: int, memory: Mapping[str, Any]) -> bool:
        return since >= self.n


class Drift(Repeated):
    """Decode steps choose units again when the output of the last attention has moved (DART).

    ``s`` is the cosine of the mean output of the last tokens and of the mean output when units were chosen. Every step
    with ``s < mean - max(deviations * standard deviation, margin)`` counts; mean and deviation are those of ``s`` since
    the decision.
    """

    paper: ClassVar[str] = "DART, arXiv 2601.22632, drift detection"
    watches: ClassVar[bool] = True
    name: Literal["drift"] = "drift"
    tokens: int = Field(default=5, ge=1, description="last tokens whose mean output is compared")
    margin: float = Field(default=0.1, gt=0, description="least fall of the cosine below its mean that counts")
    deviations: float = Field(default=0.1, ge=0, description="the same, in standard deviations of the cosine")
    pressure: int = Field(default=5, ge=1, description="steps that must count before units are chosen again")
    window: int = Field(default=16, ge=1, description="last tokens that the new decision reads")

    @property
    def reads(self) -> int:
        return self.window

    def again(self, since: int, memory: Mapping[str, Any]) -> bool:
        return bool(memory.get("pressure", 0) >= self.pressure)

    def watch(self, memory: Mapping[str, Any], output: Tensor, decided: bool) -> dict[str, Any]:
        last = [*memory.get("last", ()), output][-self.tokens :]
        if decided:  # a prompt's output is the mean over its tokens
            return {
                "base": torch.stack(last).mean(0),
                "last": [],
                "seen": 0,
                "mean": 0.0,
                "squares": 0.0,
                "pressure": 0,
            }
        changed = {**memory, "last": last}
        if len(last) < self.tokens:
            return changed
        cosine = float(functional.cosine_similarity(torch.stack(last).mean(0), memory["base"], dim=0))
        seen, mean, squares = memory["seen"], memory["mean"], memory["squares"]
        deviation = math.sqrt(squares / seen) if seen else 0.0
        if seen and cosine < mean - max(self.deviations * deviation, self.margin):
            changed["pressure"] = memory["pressure"] + 1
        step = cosine - mean  # Welford's running mean and sum of squares about it
        new_mean = mean + step / (seen + 1)
        return changed | {"seen": seen + 1, "mean": new_mean, "squares": squares + step * (cosine - new_mean)}


@hookimpl
def policies() -> list[type[Policy]]:
    return [PerPrompt, PrefillOnly, DecodeOnly, EveryN, Drift]
