"""Joint choice by least squares (optimal brain surgeon), in rounds: the family of ZipLM, OSSCAR and SlimGPT."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import (
    Compensator,
    MaskApplier,
    MemoryPlan,
    Order,
    Scorer,
    Site,
    SiteCovariance,
    SparsityAllocator,
    Strategy,
    complement,
    hookimpl,
)
from .allocation import Uniform
from .application import Slice
from .compensation.least_squares import LeastSquares
from .ridged import RidgedChooser, inverse_of

BLOCK = 256
"""Rows that are in double precision at once."""


class ObsChooser(RidgedChooser):
    """Drops first the units that least squares on the remaining channels predict best; rounds see what has gone before.

    The loss of a unit is the share of the output's variance that is lost once this unit and all earlier ones are
    gone. It is exact for every count, whatever the number of rounds.
    """

    paper: ClassVar[str] = "ZipLM, NeurIPS 2023, arXiv 2302.04089; OSSCAR, ICML 2024; SlimGPT, NeurIPS 2024"
    name: Literal["obs"] = "obs"
    rounds: int = Field(
        default=64,
        ge=1,
        description="rounds in which all units of a site go, as many in each; after every round the others are judged "
        "anew; 1: all by one judgement; as many as units: one by one. A site takes about 5/3 C^3 + O C^2 operations "
        "in double precision, with up to C/64 rounds; more rounds take longer (docs/strategies.md)",
    )
    gradient: bool = Field(
        default=False,
        description="add the first-order term of the published code of Tyr-the-Pruner: half the loss plus the product "
        "of a unit's weights with the covariance times the dense weights",
    )

    def order(self, covariance: SiteCovariance, weight: Tensor, site: Site) -> Order:
        """Backward elimination: ``P`` is the inverse covariance of the channels that are left, ``V`` their weights.

        A unit g costs ``V_g' P_gg^-1 V_g``. When it goes, ``P`` and ``V`` lose what they share with it. All products of
        a round are made by Cholesky's factor of ``P`` at its units, in the order in which these go; the rows of the
        solved weights are then the losses one by one.
        """
        ridge, inverse = inverse_of(covariance, self.ridge)
        values, first_order = self._start(covariance, weight, inverse, ridge)
        units, size = torch.arange(site.units, device=inverse.device), site.unit_size
        gone, losses = [], []
        for number in range(min(self.rounds, site.units)):
            count = _share(site.units, self.rounds, number)
            by_number = units.argsort()  # so that of equal losses the first unit goes first, wherever it lies
            scores = _losses_alone(inverse, values, first_order, size)[by_number]
            going = by_number[scores.argsort(stable=True)[:count]]
            drop = site.columns(going)
            factor = torch.linalg.cholesky(inverse[drop[:, None], drop])
            lost = torch.linalg.solve_triangular(factor, values[drop], upper=False)
            gone.append(units[going])
            losses.append(lost.square().sum(1).view(-1, size).sum(1))
            staying = len(units) - count
            if not staying:
                break
            shared = torch.linalg.solve_triangular(factor, inverse[drop], upper=False)
            # What stays at the end takes the places of what goes before it: little is copied.
            to, others = going[going < staying], complement(going, len(units))
            moving = others[others >= staying]
            rows, moved = site.columns(to), site.columns(moving)
            for matrix in (shared.T, inverse, inverse.T, values, first_order):
                if matrix is not None:
                    matrix[rows] = matrix[moved]
            units[to] = units[moving]
            units, left = units[:staying], staying * size
            shared, inverse = shared[:, :left], inverse[:left, :left]
            inverse.addmm_(shared.T, shared, alpha=-1)
            values = values[:left].addmm_(shared.T, lost, alpha=-1)
            first_order = None if first_order is None else first_order[:left]
        loss = torch.cat(losses).cumsum(0)
        share = loss / loss[-1].clamp(min=torch.finfo(loss.dtype).tiny)
        device = covariance.matrix.device
        return Order(torch.cat(gone).to(device), share.float().to(device))

    def memory_plan(self, site: Site) -> MemoryPlan:
        """In double precision a matrix (C, C), two or three (C, O), and what the channels of a round share with all."""
        channels, inputs = site.channels, site.channels * site.outputs
        going = -(-site.units // min(self.rounds, site.units)) * site.unit_size
        of_outputs = (2 + self.gradient + (site.unit_size > 1)) * inputs
        return self._plan(8 * (channels**2 + of_outputs + (2 * going + min(BLOCK, channels)) * channels))

    def _start(
        self, covariance: SiteCovariance, weight: Tensor, inverse: Tensor, ridge: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The weights to begin with, and the covariance of channels and outputs where ``gradient`` needs it; (C, O)."""
        values = weight.T.to(inverse.device, inverse.dtype, copy=True, memory_format=torch.contiguous_format)
        if covariance.cross is None and not self.gradient:
            return values, None
        target = ridge * values
        known = covariance.matrix
        if covariance.cross is not None:
            of_channels, of_lag = covariance.cross.tensor_split([len(values)])
            known = of_channels.T
            if len(of_lag):
                target += of_lag.T.to(target.device, target.dtype)
        for rows, block in zip(target.split(BLOCK), known.split(BLOCK), strict=True):
            rows.addmm_(block.to(values.device, values.dtype), values)
        if covariance.cross is not None:
            torch.mm(inverse, target, out=values)
        return values, target if self.gradient else None


def _share(units: int, rounds: int, number: int) -> int:
    """Units that go in a round, if so many rounds take as equal numbers as possible; at least one in each."""
    rounds = min(rounds, units)
    return units * (number + 1) // rounds - units * number // rounds


def _losses_alone(inverse: Tensor, values: Tensor, first_order: Tensor | None, size: int) -> Tensor:
    """What each unit costs if it goes alone; (C, C), (C, O) -> (U,)."""
    units = len(values) // size
    if size == 1:
        losses = torch.linalg.vector_norm(values, dim=1).square() / inverse.diagonal()
    else:
        blocks = inverse.unflatten(1, (units, size)).unflatten(0, (units, size)).diagonal(dim1=0, dim2=2)
        factors = torch.linalg.cholesky(blocks.permute(2, 0, 1))
        solved = torch.linalg.solve_triangular(factors, values.view(units, size, -1), upper=False)
        losses = solved.square().sum((1, 2))
    if first_order is not None:
        losses = losses / 2 + (values * first_order).sum(1).view(units, size).sum(1)
    return losses


class Obs(Strategy):
    """OBS: units chosen jointly by the covariance, layer by layer, and the rest refitted by least squares.

    Every layer is calibrated on the outputs of the layers before it, ordered, cut and compensated. Nothing is computed
    per batch.
    """

    paper: ClassVar[str] = ObsChooser.paper
    name: Literal["obs"] = "obs"
    scorer: Scorer = ObsChooser()
    allocator: SparsityAllocator = Uniform(rounding="to_channels")
    applier: MaskApplier = Slice()
    compensate: Compensator = LeastSquares()
    sequential: bool = Field(default=True, description=Strategy.model_fields["sequential"].description)


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [ObsChooser]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Obs]
