"""What choosers share that solve the covariance with a ridge, in double precision."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Chooser, MemoryPlan, SiteCovariance
from ..registry.errors import LinAlgError
from .compensation.least_squares import DEPENDENCE, GIB, shrinkage_ridge

GROWTH, LARGEST = 10.0, 1.0
"""A ridge that is too small grows by this factor, up to this share of the mean variance."""


class RidgedChooser(Chooser):
    """A chooser that solves the covariance with a ridge."""

    ridge: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="added to every variance, as a share of the channels' mean variance; null: at every site as much "
        "as its number of calibration tokens requires, as with least_squares; where the covariance is not positive "
        "definite even so, it is raised tenfold until it is",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="memory that covariances and solving may take; null: most of what is free",
    )

    def _plan(self, working: int) -> MemoryPlan:
        return MemoryPlan(working, 0, None if self.memory_gib is None else int(self.memory_gib * GIB))


def working_place(matrix: Tensor) -> torch.device:
    """Where double precision is computed: Apple's GPUs have none."""
    return torch.device("cpu") if matrix.device.type == "mps" else matrix.device


def inverse_of(covariance: SiteCovariance, ridge: float | None) -> tuple[Tensor, Tensor]:
    """The variance that is added, and the inverse (C, C) float64 of the covariance with it.

    Cholesky's factor and the inverse are computed in the memory of one matrix. The share of the mean variance that was
    enough is reported as ``ridge``. Channels that never vary count as if the mean variance were 1. Raises
    torch.linalg.LinAlgError where no ridge is enough.
    """
    if ridge is None:
        ridge = shrinkage_ridge(covariance.matrix, covariance.tokens / DEPENDENCE)
    place, known = working_place(covariance.matrix), covariance.matrix
    variance = known.diagonal().to(place, torch.float64).mean()
    variance = torch.where(variance > 0, variance, 1.0)
    # LAPACK stores columns: only then can its results take the place of what they are computed from.
    matrix = torch.empty(known.shape, dtype=torch.float64, device=place).mT
    info = torch.empty((), dtype=torch.int32, device=place)
    while True:
        added = ridge * variance
        matrix.copy_(known.mT).diagonal().add_(added)
        torch.linalg.cholesky_ex(matrix, out=(matrix, info))
        if not info:
            covariance.diagnostics["ridge"] = ridge
            return added, torch.cholesky_inverse(matrix, out=matrix).mT
        if ridge >= LARGEST:
            raise LinAlgError(f"it is not positive definite, even with a ridge of {ridge:g} times the mean variance")
        ridge = min(ridge * GROWTH, LARGEST)
