"""What allocators share whose ratio is a share of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_serializer
from torch import Tensor

from ..registry import MEASURED_LENGTH, Evaluate, NonFiniteError, Objective, Site, SparsityAllocator, SpecError

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


def not_finite(allocator: str, objective: Objective) -> NonFiniteError:
    """The error of an allocator whose measurements are all infinite, so that none of them is a reason for a choice."""
    return NonFiniteError(
        f"allocator {allocator}: no cut that it measured for this ratio has a finite objective ({objective}); lower "
        "the ratio, or load the model in float32 or bfloat16"
    )


def kept_by_rank(values: Sequence[Tensor], costs: Sequence[float], budget: float, minimum_units: int) -> list[int]:
    """Units that every site keeps if the units with the lowest values of all sites are cut, as the budget allows.

    values (U,) and the cost of one unit, for each site. The ``minimum_units`` with the highest values of a site stay. A
    unit that costs more than what is left is skipped; cheaper ones after it may still be cut.
    """
    ranked = [value.cpu().double() for value in values]
    for value in ranked:
        value[value.topk(min(minimum_units, len(value))).indices] = torch.inf
    cost = torch.cat([torch.full_like(value, float(each)) for value, each in zip(ranked, costs, strict=True)])
    owner = torch.cat([torch.full((len(value),), place) for place, value in enumerate(ranked)])
    value = torch.cat(ranked)
    order = value.argsort(stable=True)
    cut = order[_affordable(cost[order], value[order].isfinite(), budget)]
    dropped = torch.bincount(owner[cut], minlength=len(ranked))
    return [len(value) - int(count) for value, count in zip(ranked, dropped, strict=True)]


def _affordable(cost: Tensor, free: Tensor, budget: float) -> Tensor:
    """Indices (k,) of the units that fit into the budget, taken in order; cost (U,), free (U,) bool."""
    rest, taken = free.nonzero().flatten(), []
    # Every iteration ends at a unit that does not fit and drops all units of its cost or more.
    while len(rest := rest[cost[rest] <= budget]):
        spent = cost[rest].cumsum(0)
        fits = int((spent <= budget).sum())
        taken.append(rest[:fits])
        budget -= float(spent[fits - 1])
        rest = rest[fits:]
    return torch.cat(taken) if taken else rest


class MeasuringAllocator(SparsityAllocator):
    """An allocator that measures the loss of candidates, and whose ratio is a share of the parameters."""

    needs_scores: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    tokens: int = Field(default=1024, ge=2, description="tokens of the calibration text that every cut is measured on")
    length: int = Field(default=MEASURED_LENGTH, ge=2, description="most tokens of a row that are measured")
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
        defaults = {key: type(self).model_fields[key].default for key in ("length", "objective", "top_logits")}
        return {key: value for key, value in handler(self).items() if key not in defaults or value != defaults[key]}

    def granularity(self, site: Site) -> int:
        return self.mlp_multiple if site.group in ("mlp", "expert") else 1

    def _measuring(self, evaluate: Evaluate | None) -> Evaluate:
        """``evaluate``; raises :class:`SpecError` if there is none."""
        if evaluate is None:
            raise SpecError(f"allocator {self.name} measures the model, and is called without a way to; fix the caller")
        return evaluate

    @property
    def _how(self) -> dict[str, Any]:
        """What is measured, as :class:`~prunekit.registry.Evaluate` takes it."""
        return {"length": self.length, "objective": self.objective, "top_logits": self.top_logits}
