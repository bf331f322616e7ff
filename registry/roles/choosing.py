"""The chooser's role: a scorer that judges the units of a site together, by the covariance of their channels.

Letters: C channels entering the consumer, O its outputs, U units.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SpecError
from ..sites import Site
from ..tensors.statistics import Statistic
from .compensation import MemoryPlan, SiteCovariance
from .parts import Scorer


@dataclass(frozen=True, eq=False)
class Order:
    """In which order the units of a site go. Cuts of any size are nested: each drops the first units of the order."""

    units: Tensor
    """(U,) int64: every unit once, the one that goes first at the beginning."""
    loss: Tensor
    """(U,): what is lost when a unit and all before it are gone; at least 0, not decreasing, in any unit of measure."""

    @property
    def scores(self) -> Tensor:
        """(U,) float32, by unit: its loss. Equal losses differ by the smallest steps of float32."""
        loss = self.loss.float().clamp(min=0).abs()  # abs: minus zero has other bits than zero
        steps = torch.arange(len(loss), device=loss.device)
        # The bits of positive floats, read as integers, are in the order of the floats.
        raised = (loss.view(torch.int32) - steps).cummax(0).values + steps
        return torch.empty_like(loss).scatter_(0, self.units, raised.int().view(torch.float32))

    def flaw(self, units: int) -> str | None:
        """What is wrong with the order of so many units; None where nothing is."""
        for name, tensor in (("units", self.units), ("loss", self.loss)):
            if not isinstance(tensor, Tensor) or tensor.shape != (units,):
                found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                return f"must return {name} as a tensor ({units},), found {found}"
        if self.units.dtype != torch.int64 or not torch.equal(
            self.units.sort().values, torch.arange(units, device=self.units.device)
        ):
            return f"must return every unit from 0 to {units - 1} once, as int64"
        if not bool(self.loss.isfinite().all()):
            return "returns a loss with NaN or infinity in it"
        if bool((self.loss < 0).any()) or bool((self.loss.diff() < 0).any()):
            return "returns a loss that is negative or decreases: it is that of a unit and all before it"
        return None


class Chooser(Scorer):
    """Chooses the units of a site jointly: from the covariance of its channels it says in which order they go.

    It stands in a strategy's ``scorer`` field, and decides once. It is a scorer whose statistic is the covariance: the
    place in the order becomes the score, so that allocators, traces and exports work with it as with other scores. One
    order serves every count, so it does not get the count.
    """

    statistic: ClassVar[Statistic | None] = None
    """Histories keep none: the covariance is computed instead, and shared with the compensator."""

    @abstractmethod
    def order(self, covariance: SiteCovariance, weight: Tensor, site: Site) -> Order:
        """The order in which units go; weight (O, C) float32 is the consumer's.

        It may write to the covariance, which is a copy, and adds what is worth reporting to its ``diagnostics``. Raises
        ``torch.linalg.LinAlgError`` for a covariance that cannot be solved; the run then names the site.
        """

    @abstractmethod
    def memory_plan(self, site: Site) -> MemoryPlan:
        """Bytes that ordering a site takes, besides the covariance it gets; nothing is held afterwards."""

    def prepare(self, weight: Tensor, site: Site) -> tuple[Tensor, Site]:
        return weight, site

    def score(self, prepared: tuple[Tensor, Site], statistic: SiteCovariance) -> Tensor:
        """The units' scores, repeated for their channels; (C,). Raises :class:`SpecError` for an invalid order."""
        weight, site = prepared
        order = self.order(statistic, weight, site)
        if flaw := order.flaw(site.units) if isinstance(order, Order) else f"must return an Order, found {order!r:.80}":
            raise SpecError(f"{site.label}: order of scorer {self.name} {flaw}; fix the plugin")
        return order.scores.repeat_interleave(site.unit_size)

    def unit_scores(self, scores: Tensor, unit_size: int) -> Tensor:
        return scores.view(-1, unit_size)[:, 0].contiguous()
