"""Probe Pruning with least squares, as far as each batch's probe confirms it."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..registry import Compensator, SparsityAllocator, Strategy, hookimpl
from .allocation import Uniform
from .compensation.least_squares import LeastSquares
from .pp import ProbePruning


class PPLeastSquares(ProbePruning):
    """Probe Pruning; kept channels absorb the dropped by least squares, as far as the probe confirms it.

    The probe that chooses the units also says which share of the compensation serves this batch. Heads that are not
    whole are made up for by channels. Its advantage over PP was measured on a real model (docs/choosing.md).
    """

    paper: ClassVar[str] = "PP, ICLR 2025; least-squares reconstruction (He et al., ICCV 2017)"

    name: Literal["pp_ls"] = "pp_ls"
    allocator: SparsityAllocator = Uniform(rounding="to_channels")
    compensate: Compensator = LeastSquares(check=True)


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [PPLeastSquares]
