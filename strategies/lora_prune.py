"""LoRAPrune's score: weight times gradient, as low-rank adapters see the gradient (Zhang et al., 2023)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import (
    GradientScorer,
    GroupPart,
    MaskApplier,
    MatrixGradient,
    Scorer,
    Site,
    SparsityAllocator,
    Strategy,
    hookimpl,
)
from .allocation import Uniform
from .application import Slice

PAPER = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, 2023, arXiv 2305.18403"


class LoRAPruneScorer(GradientScorer):
    """Weight times gradient over a unit; every matrix of the group weighs the same (LoRAPrune).

    Each matrix's sums of |W G| by unit are divided by their L2 norm, and added. LoRAPrune reads the gradient from
    adapters B A. Before any training B is zero, and what they show of G is G A^T A, with a random A of rank 8.
    """

    paper: ClassVar[str] = PAPER
    exempt: ClassVar[Mapping[str, str]] = {"check_row_order": "the random adapter draws for every row"}

    name: Literal["lora_prune"] = "lora_prune"
    adapter_rank: int | None = Field(
        default=8,
        ge=1,
        description="rank of the random adapter that the gradient is seen through; null: exact gradient",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the adapters")

    def reduce(self, matrix: MatrixGradient) -> Tensor:
        return (matrix.weight * self._seen(matrix)).abs_().sum(1)

    def _seen(self, matrix: MatrixGradient) -> Tensor:
        """The gradient (R, I) as the adapter of this matrix shows it, up to a factor."""
        gradient = matrix.gradient
        if self.adapter_rank is None:
            return gradient
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {matrix.path}".encode()))
        inputs = gradient.shape[0 if matrix.reads else 1]
        drawn = torch.rand(self.adapter_rank, inputs, generator=generator).mul_(2).sub_(1).to(gradient.device)
        # The adapter acts on a layer's inputs; the consumer's are its rows here.
        return drawn.t() @ (drawn @ gradient) if matrix.reads else (gradient @ drawn.t()) @ drawn

    def combine(self, parts: Sequence[GroupPart], site: Site) -> Tensor:
        by_unit = torch.stack([part.values.sum(1) for part in parts])
        return (by_unit / (by_unit.norm(dim=1, keepdim=True) + 1e-8)).sum(0)


class LoRAPrune(Strategy):
    """LoRAPrune without training: its score with adapters as they begin, once; the same share in every layer.

    The published code leaves the first tenth of the layers and the last one whole (skip_layers), and repeats scores and
    masks while it trains.
    """

    paper: ClassVar[str] = PAPER

    name: Literal["lora_prune"] = "lora_prune"
    scorer: Scorer = LoRAPruneScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [LoRAPruneScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [LoRAPrune]
