"""The grouping's role: which rows of a batch share a decision, in strategies that decide per batch.

Letters: B rows of a batch, U units.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..component import Component


class Grouping(Component):
    """Divides the rows of a batch into groups, site by site.

    A group chooses its units like a batch that has its rows alone. All groups keep equally many.
    """

    splits: ClassVar[bool] = True
    """Whether a batch may have several groups."""

    @abstractmethod
    def most(self, rows: int) -> int:
        """Most groups of a batch with so many rows: 1 to ``rows``. Only between the two :meth:`groups` is asked."""

    @abstractmethod
    def groups(self, scores: Tensor) -> Tensor:
        """The group of every row; scores (B, U) float32 on the CPU: those of the units by each row alone.

        Returns (B,) int64, from 0 to ``most(B) - 1``. Equal scores give equal groups: it draws nothing at random.
        """


class OneForAll(Grouping):
    """One decision a batch."""

    splits: ClassVar[bool] = False
    name: Literal["batch"] = "batch"

    def most(self, rows: int) -> int:
        return 1

    def groups(self, scores: Tensor) -> Tensor:
        return torch.zeros(len(scores), dtype=torch.int64)
