"""What allocators share whose ratio is a share of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, model_serializer

from ..registry import Evaluate, Objective, Site, SparsityAllocator, SpecError

WORST = 1e6
"""Nats per token that stand for an infinite loss."""

EXACT = 1 + 1e-9
"""A budget this close to whole units pays for them."""


def parameters_to_cut(
    allocator: str, sites: Sequence[Site], most: Sequence[int], ratio: float, minimum_units: int
) -> float:
    """The share ``ratio`` of the parameters of all units of ``sites``.

    ``most``: how many units each site can lose, with ``minimum_units`` kept. Raises :class:`SpecError` if these are too
    few.
    """
    total = sum(site.units * site.unit_parameters for site in sites)
    reachable = sum(units * site.unit_parameters for site, units in zip(sites, most, strict=True))
    if ratio * total > reachable * EXACT:
        raise SpecError(
            f"allocator {allocator}: a ratio of {ratio:.4g} of these layers' parameters is out of reach: every site "
            f"keeps minimum_units: {minimum_units}, so {math.floor(reachable / total * 1e4) / 1e4:.4g} can be cut; "
            "lower the ratio or minimum_units"
        )
    return ratio * total * EXACT


class MeasuringAllocator(SparsityAllocator):
    """An allocator that measures the loss of candidates, and whose ratio is a share of the parameters."""

    needs_scores: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    tokens: int = Field(default=1024, ge=2, description="tokens of the calibration text that every cut is measured on")
    objective: Objective = Field(
        default="loss",
        description="loss: of the next token; kl: divergence from the dense model's prediction of the next token",
    )
    top_logits: int = Field(
        default=0, ge=0, description="kl: compare the likeliest tokens only, so many at each position; 0: all tokens"
    )
    minimum_units: int = Field(default=1, ge=0, description="units that every site keeps in any case")
    mlp_multiple: int = Field(default=1, ge=1, description="kept MLP widths are multiples of this; 64 is fast on GPUs")

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: Any) -> dict[str, Any]:
        # These options are newer than stored trials, whose keys are made of what is written.
        defaults = {key: type(self).model_fields[key].default for key in ("objective", "top_logits")}
        return {key: value for key, value in handler(self).items() if key not in defaults or value != defaults[key]}

    def _multiple(self, site: Site) -> int:
        """The number whose multiples a site may keep."""
        return self.mlp_multiple if site.kind == "mlp" else 1

    def _measuring(self, evaluate: Evaluate | None) -> Evaluate:
        """``evaluate``; raises :class:`SpecError` if there is none."""
        if evaluate is None:
            raise SpecError(f"allocator {self.name} measures the model, and is called without a way to; fix the caller")
        return evaluate

    @property
    def _how(self) -> dict[str, Any]:
        """What is measured, as :class:`~prunekit.registry.Evaluate` takes it."""
        return {} if self.objective == "loss" else {"objective": self.objective, "top_logits": self.top_logits}
