"""Least squares: kept channels take over what they predict of the dropped ones, by the calibration covariance."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ...registry import MemoryPlan, Prepared, SiteCovariance, Slope, SpecError
from ...registry.errors import LinAlgError
from .held_out import RIDGES, best_held_out, working_bytes
from .mean import ProbedMean
from .pivot import pivot, regression_on

GIB = 1024**3
DEPENDENCE = 3
"""Tokens of a text depend on one another: three count as one sample of a covariance (docs/compensation.md)."""
LEAST_SHRINKAGE = 1e-4
"""Least weight of the identity: in float32 a covariance cannot be solved without."""


class Regression(ProbedMean):
    """A compensator that predicts dropped channels from kept ones by the calibration covariance."""

    needs_covariance: ClassVar[bool] = True

    ridge: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="added to every variance, as a share of the channels' mean variance; null: at every site as much "
        "as its number of calibration tokens requires (oracle approximating shrinkage)",
    )
    held_out: int = Field(
        default=0,
        ge=0,
        le=64,
        description="divide the calibration text into so many parts, and use the ridge (where it is null) and the "
        "share of the slope that predict every part best from all others; 0: do not",
    )
    singular: Literal["error", "mean"] = Field(
        default="error", description="a covariance that cannot be solved: an error, or the mean alone at that site"
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="memory that covariances and solving may take; null: most of what is free",
    )

    @property
    def covariance_parts(self) -> int:
        return max(self.held_out, 1)

    @field_validator("held_out")
    @classmethod
    def _one_of_several(cls, parts: int) -> int:
        if parts == 1:
            raise ValueError("one part is predicted from the others, so there must be at least 2; 0 holds none out")
        return parts

    def prepare(self, covariance: SiteCovariance) -> Prepared | None:
        matrix, ridge, share = covariance.matrix, self.ridge, None
        try:
            if not bool(matrix.diagonal().isfinite().all()):
                raise LinAlgError("it is not finite")
            if self.held_out:
                ridge, share = self._best_held_out(covariance)
                covariance.diagnostics["share"] = share
            elif ridge is None:
                ridge = shrinkage_ridge(matrix, covariance.tokens / DEPENDENCE)
            covariance.diagnostics["ridge"] = ridge
            prepared = self._prepared(covariance, ridge * matrix.diagonal().mean())
            return prepared if share is None else (*in_tuple(prepared), torch.tensor(share, device=matrix.device))
        except LinAlgError:
            if self.singular == "error":
                raise
            return None

    def _best_held_out(self, covariance: SiteCovariance) -> tuple[float, float]:
        """The ridge and the share of the slope that predict held-out parts best, for the calibrated cut."""
        kept, weight = covariance.kept, covariance.weight
        if kept is None or weight is None:
            raise SpecError(f"compensator {self.name}: held_out needs calibrated scores; set it to 0")
        if len(covariance.parts) < 2:
            raise LinAlgError("all of its real tokens are in one part")
        return best_held_out(covariance.parts, weight, kept, RIDGES if self.ridge is None else [self.ridge])

    def slope(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        try:
            if not self.held_out:
                return self._regression(prepared, kept, dropped)
            *rest, share = in_tuple(prepared)
            first, *others = self._regression(rest[0] if len(rest) == 1 else tuple(rest), kept, dropped)
            return share * first, *others
        except LinAlgError:
            if self.singular == "error":
                raise
            return ()

    def memory_plan(self, channels: int, dropped: int, per_batch: bool) -> MemoryPlan:
        limit = None if self.memory_gib is None else int(self.memory_gib * GIB)
        working = self._working_bytes(channels, dropped, per_batch)
        if self.held_out:  # the covariance of all parts, and what one part is tried with
            working = 4 * channels * channels + max(working, working_bytes(channels, dropped))
        return super().memory_plan(channels, dropped, per_batch)._replace(working=working, limit=limit)

    @abstractmethod
    def _prepared(self, covariance: SiteCovariance, ridge: Tensor) -> Prepared:
        """What slopes are computed from; ``ridge`` is the variance to add."""

    @abstractmethod
    def _regression(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        """The regression of dropped on kept channels."""

    @abstractmethod
    def _working_bytes(self, channels: int, dropped: int, per_batch: bool) -> int:
        """Bytes that solving one site takes in addition to its covariance."""


def in_tuple(prepared: Prepared) -> tuple[Tensor, ...]:
    """The tensors of a prepared part."""
    return (prepared,) if isinstance(prepared, Tensor) else prepared


def shrinkage_ridge(covariance: Tensor, samples: float) -> float:
    """The ridge, as a share of the mean variance, that best shrinks the covariance (C, C) of so many samples.

    Oracle approximating shrinkage towards a multiple of the identity (Chen, Wiesel, Eldar and Hero, Shrinkage
    algorithms for MMSE covariance estimation, IEEE Transactions on Signal Processing 58, 2010).
    """
    channels = len(covariance)
    squares = float(covariance.norm()) ** 2
    trace = float(covariance.diagonal().sum(dtype=torch.float64)) ** 2
    spread = (samples + 1 - 2 / channels) * (squares - trace / channels)
    weight = ((1 - 2 / channels) * squares + trace) / spread if spread > 0 else 1.0
    weight = min(max(weight, LEAST_SHRINKAGE), 1 - LEAST_SHRINKAGE)
    return weight / (1 - weight)


class LeastSquares(Regression):
    """Kept channels absorb the least-squares prediction of the dropped ones; a bias keeps the mean."""

    paper: ClassVar[str] = "closed-form updates of OBC (NeurIPS 2022) and SlimGPT (NeurIPS 2024), for one whole cut"
    name: Literal["least_squares"] = "least_squares"
    per_batch: Literal["pivot", "solve", "usual"] = Field(
        default="pivot",
        description="where cuts are made per batch: pivot corrects the solution of the calibrated cut for the channels "
        "that differ, solve computes it anew (equal results); usual leaves the correction out",
    )
    target: Literal["dense_weights", "dense_outputs", "dense_stream"] = Field(
        default="dense_weights",
        description="what is fitted on the inputs of the layers already pruned: what the dense weights make of these "
        "inputs; the outputs of the dense model, so that errors in these inputs are compensated, too; or its residual "
        "stream, so that all errors of earlier layers are (both sequential)",
    )

    @property
    def fits_dense_outputs(self) -> bool:
        return self.target != "dense_weights"

    @property
    def fits_dense_stream(self) -> bool:
        return self.target == "dense_stream"

    @model_validator(mode="after")
    def _target_fits(self) -> LeastSquares:
        if self.fits_dense_outputs and (self.check or self.held_out):
            raise ValueError(
                f"target {self.target} has no check and no held_out, which compare with what the dense weights make of "
                "the same inputs; set check to false and held_out to 0, or target to dense_weights"
            )
        return self

    def memory_plan(self, channels: int, dropped: int, per_batch: bool) -> MemoryPlan:
        plan, kept = super().memory_plan(channels, dropped, per_batch), channels - dropped
        if not self.fits_dense_outputs:
            return plan
        return plan._replace(working=4 * (2 * kept * kept + 3 * channels * kept), held=4 * channels * kept)

    def _prepared(self, covariance: SiteCovariance, ridge: Tensor) -> Prepared:
        """The covariance with its ridge (C, C), or that pivoted on a base, and the base as a mask (C,)."""
        matrix, base = covariance.matrix, covariance.kept
        matrix.diagonal().add_(ridge)
        if covariance.cross is not None:
            covariance.cross.diagonal().add_(ridge)  # so that the ridge shrinks towards the dense weights
            return matrix, covariance.cross
        if covariance.once or self.per_batch == "solve":
            return matrix
        if base is None and self.per_batch == "usual":
            raise SpecError("compensator least_squares: per_batch usual needs calibrated scores; use pivot")
        if base is None:
            base = torch.arange(len(matrix), device=matrix.device)
        in_base = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device).index_fill_(0, base, True)
        return pivot(matrix, base), in_base

    def _regression(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        if isinstance(prepared, Tensor):
            return (_solve(prepared, kept, dropped),)
        matrix, other = prepared  # the covariance and the cross covariance, or the pivoted one and its base
        if self.fits_dense_outputs:
            return (_added(matrix, other, kept),)
        return (regression_on(kept, dropped, matrix, other, self.per_batch == "pivot"),)

    def _working_bytes(self, channels: int, dropped: int, per_batch: bool) -> int:
        kept = channels - dropped
        if not per_batch or self.per_batch == "solve":
            return 4 * (channels * kept + max(2 * kept * kept, kept * kept + 3 * dropped * kept))
        corner = max(kept * kept, dropped * (channels + dropped), 3 * dropped * dropped)
        return 4 * (channels * channels + kept * kept + 2 * kept * dropped + corner)


def _solve(covariance: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
    """The regression of dropped on kept channels by Cholesky's factor; (C, C), (k,), (d,) -> (d, k)."""
    columns = covariance[:, kept]
    factor = torch.linalg.cholesky(columns[kept])
    return torch.cholesky_solve(columns[dropped].T, factor).T


def _added(covariance: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """The regression of all dense channels, and of the lag, on kept pruned channels, less these as they are; (R, k)."""
    factor = torch.linalg.cholesky(covariance[kept[:, None], kept])
    slope = torch.cholesky_solve(cross[:, kept].T, factor).T.contiguous()
    slope[kept, torch.arange(len(kept), device=kept.device)] -= 1
    return slope
