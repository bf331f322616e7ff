"""The role of scorers that read gradients of the loss instead of activations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..sites import Site
from ..tensors.statistics import Statistic
from .parts import Scorer


@dataclass(frozen=True, eq=False)
class MatrixGradient:
    """A matrix of a site's group with its gradient.

    Its R rows belong to the units: those that a producer computes, or the channels that the consumer reads. The loss
    is that of the next token in nats, the mean over the predicted tokens of the calibration text.
    """

    path: str
    """The linear layer's module name from the model's root."""
    weight: Tensor
    """(R, I) float32: a producer's weight, or the consumer's transposed."""
    gradient: Tensor
    """(R, I) float32: the gradient of the loss."""
    squares: Tensor | None
    """(R, I) float32: the mean over the text's sequences of the squared gradient of each sequence's own loss (the
    diagonal of the Fisher information); None where the scorer does not need it."""
    reads: bool
    """Whether it is the consumer."""


@dataclass(frozen=True, eq=False)
class GroupPart:
    """What a scorer made of one matrix of a site's group. Query, key and value that one layer computes one after the
    other are three parts."""

    path: str
    values: Tensor
    """(U, r) float32: what :meth:`GradientScorer.reduce` returned for each unit's r rows of the matrix."""
    entries: int
    """Entries of the matrix that belong to one unit."""
    reads: bool
    """Whether it is of the consumer."""


class GradientScorer(Scorer):
    """Scores units by the gradient of the loss at every matrix of the site's group: all producers and the consumer.

    Every matrix is reduced to one number for each row as soon as its gradient is known, and the gradient is freed. A
    group has the same matrices as a cut: with ``attention_unit: query_head`` under grouped-query attention they are the
    query and the output projection. Biases have no part in it. Only for strategies that decide once.
    """

    statistic: ClassVar[Statistic | None] = None

    gradient_checkpointing: bool = Field(
        default=False,
        description="compute every layer again in the backward pass instead of keeping its activations: less memory, "
        "a third more time, the same gradients",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="memory for sums of gradients over several batches, in GiB; with less than all matrices need, the "
        "text is read several times. null: 80% of what is free",
    )

    @property
    def needs_squares(self) -> bool:
        """Whether :attr:`MatrixGradient.squares` are needed; the backward pass then takes one sequence at a time."""
        return False

    @property
    def additive(self) -> bool:
        """Whether the reduction of a sum is the sum of the reductions.

        If so, what each batch contributes to ``gradient`` and ``squares`` is reduced alone, and no sum of gradients is
        kept. If not, a float32 sum of each matrix is kept, unless the text is one batch.
        """
        return False

    @abstractmethod
    def reduce(self, matrix: MatrixGradient) -> Tensor:
        """One number for each row of a matrix; (R, I) -> (R,) float32."""

    @abstractmethod
    def combine(self, parts: Sequence[GroupPart], site: Site) -> Tensor:
        """Scores of a site's units (U,) float32; the parts are in the order of the producers, the consumer last."""

    def prepare(self, weight: Tensor, site: Site) -> Any:
        """The site: the weights have entered with the gradients."""
        return site

    def score(self, prepared: Any, statistic: Any) -> Tensor:
        """The score of a channel is that of its unit; the site's parts, its :class:`Site` -> (C,) float32."""
        return self.combine(statistic, prepared).repeat_interleave(prepared.unit_size)

    def unit_scores(self, scores: Tensor, unit_size: int) -> Tensor:
        """Scores of whole units; (C,) -> (U,)."""
        return scores[::unit_size]
