"""Kept channels that absorb what the dropped ones would have added, as far as they predict it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ...registry import Slope, SpecError
from .mean import ProbedMean
from .pivot import pivot, regression_on

GIB = 1024**3
RIDGE = 0.01
"""Where the number of tokens is not known."""
DEPENDENCE = 3
"""Tokens of a text depend on one another: three count as one sample of a covariance (docs/compensation.md)."""
LEAST_SHRINKAGE = 1e-4
"""Float32 cannot solve a covariance without any."""


class Regression(ProbedMean):
    """A compensator that predicts dropped channels from kept ones by the calibration covariance."""

    needs_covariance: ClassVar[bool] = True

    ridge: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="added to every variance, as a share of the channels' mean variance; null: at every site as much "
        "as its calibration tokens ask for (oracle approximating shrinkage)",
    )
    singular: Literal["error", "mean"] = Field(
        default="error", description="a covariance that cannot be solved: refuse it, or give back the mean alone there"
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="memory that covariances and solving may take; null: most of what is free",
    )

    @property
    def memory(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * GIB)

    @property
    def falls_back(self) -> bool:
        return self.singular == "mean"

    @property
    def ridge_share(self) -> float | None:
        return self.ridge

    def fitted(self, covariance: Tensor, tokens: int) -> Self:
        if self.ridge is not None:
            return self
        return self.model_copy(update={"ridge": shrinkage_ridge(covariance, tokens / DEPENDENCE)})

    def ridge_of(self, covariance: Tensor) -> Tensor:
        """The variance to add, for a covariance (C, C) that the component is fitted to."""
        return (RIDGE if self.ridge is None else self.ridge) * covariance.diagonal().mean()

    def ridged(self, covariance: Tensor) -> Tensor:
        """The covariance (C, C) with the ridge on its diagonal, in place."""
        covariance.diagonal().add_(self.ridge_of(covariance))
        return covariance


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


class Pivoted(NamedTuple):
    """A covariance pivoted on the channels ``in_base`` (C,) bool."""

    matrix: Tensor
    in_base: Tensor


class LeastSquares(Regression):
    """Kept channels absorb the least-squares prediction of the dropped ones; a bias keeps the mean."""

    paper: ClassVar[str] = "closed-form updates of OBC (NeurIPS 2022) and SlimGPT (NeurIPS 2024), for one whole cut"
    name: Literal["least_squares"] = "least_squares"
    per_batch: Literal["pivot", "solve", "usual"] = Field(
        default="pivot",
        description="where cuts are made per batch: pivot corrects the solution of the usual cut for the channels that "
        "differ, solve starts afresh (equal results); usual leaves the correction out",
    )

    def solve(self, covariance: Tensor, kept: Tensor, dropped: Tensor) -> Slope:
        return (_regression(self.ridged(covariance), kept, dropped),)

    def prepare(self, covariance: Tensor, usual: Tensor | None) -> Pivoted | Tensor:
        ridged = self.ridged(covariance)
        if self.per_batch == "solve":
            return ridged
        if usual is None and self.per_batch == "usual":
            raise SpecError("compensator least_squares: per_batch usual needs calibrated scores; use pivot")
        base = torch.arange(len(ridged), device=ridged.device) if usual is None else usual
        in_base = torch.zeros(len(ridged), dtype=torch.bool, device=ridged.device).index_fill_(0, base, True)
        return Pivoted(pivot(ridged, base), in_base)

    def prepared_from(self, tensors: tuple[Tensor, ...]) -> Pivoted | Tensor:
        return tensors[0] if self.per_batch == "solve" else Pivoted(*tensors)

    def slope(self, prepared: Any, kept: Tensor, dropped: Tensor) -> Slope:
        if self.per_batch == "solve":
            return (_regression(prepared, kept, dropped),)
        return (regression_on(kept, dropped, prepared.matrix, prepared.in_base, self.per_batch == "pivot"),)

    def working_bytes(self, channels: int, dropped: int, per_batch: bool = False) -> int:
        kept = channels - dropped
        if not per_batch or self.per_batch == "solve":
            return 4 * (channels * kept + max(2 * kept * kept, kept * kept + 3 * dropped * kept))
        corner = max(kept * kept, dropped * (channels + dropped), 3 * dropped * dropped)
        return 4 * (channels * channels + kept * kept + 2 * kept * dropped + corner)


def _regression(covariance: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
    """The regression of dropped on kept channels by Cholesky's factor; (C, C), (k,), (d,) -> (d, k)."""
    columns = covariance[:, kept]
    factor = torch.linalg.cholesky(columns[kept])
    return torch.cholesky_solve(columns[dropped].T, factor).T
