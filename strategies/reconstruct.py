"""Reconstruction: cut once, layer by layer, compensated by least squares and a probed bias."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..registry import Compensator, MaskApplier, Scorer, SparsityAllocator, Strategy, hookimpl
from .allocation import Uniform
from .application import Slice
from .compensation.least_squares import LeastSquares
from .pp.scorer import PPsp


class Reconstruct(Strategy):
    """Reconstruction: PP's score once, kept channels absorb the dropped by least squares, the bias probed per batch.

    Every layer is calibrated on the outputs of the layers before it, cut and compensated. The weights are cut once; a
    spread probe of every batch changes the bias. With ``compensate: {probe: 0}`` nothing is computed per batch.
    Heads that are not whole are made up for by channels. Among the cuts that are made once it was the best on two small
    models (docs/results/compensation), and on a real one where the calibration text is like that of its use
    (docs/choosing.md).
    """

    paper: ClassVar[str] = (
        "PPsp (PP, ICLR 2025), least-squares reconstruction (He et al., ICCV 2017; SlimGPT, NeurIPS 2024), bias (FLAP)"
    )

    name: Literal["reconstruct"] = "reconstruct"
    scorer: Scorer = PPsp()
    allocator: SparsityAllocator = Uniform(rounding="to_channels")
    applier: MaskApplier = Slice()
    compensate: Compensator = LeastSquares(probe=0.5)
    sequential: bool = Field(default=True, description=Strategy.model_fields["sequential"].description)


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Reconstruct]
