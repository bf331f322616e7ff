"""A site of which every row of a batch has its own units: rows with the same units compute together.

The block's own code runs once, over all rows. Only its linear layers take the groups one after the other, each with the
weights of its units. All rows keep equally many, so that tensors between these layers, and the key/value cache, have
the shapes of one smaller site. Letters: B rows, L positions, k kept units of each row, c their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ...registry import DataError
from .batch import Batch
from .open_cut import OpenCut, Shared, Weights
from .site_state import SiteState


class GroupedCut(OpenCut):
    """The units (B, k) of each row, and a cut for every group of rows with the same ones."""

    def __init__(self, state: SiteState, shared: Shared, kept: Tensor, stays: bool):
        super().__init__(state, shared, kept[0], stays)
        self.kept = kept
        self.columns = torch.stack([state.binding.site.columns(units) for units in kept])
        different, group = kept.unique(dim=0, return_inverse=True)
        self.parts = [OpenCut(state, shared, units, stays) for units in different]
        """By group."""
        self.rows_of = [(group == number).nonzero()[:, 0] for number in range(len(different))]
        """(rows of the group,) int64, by group."""
        self._place = torch.cat(self.rows_of).argsort()

    def groups(self) -> Iterator[tuple[Tensor, OpenCut]]:
        """The rows of every group, and its cut."""
        return zip(self.rows_of, self.parts, strict=True)

    def linear(self, x: Tensor, batch: Batch | None, weights_of: Callable[[OpenCut], Weights]) -> Tensor:
        """The product of every row with the weights of its group; x (B, L, ...) or (B * L, ...), the same layout."""
        rows = len(self.kept)
        if batch is None or batch.shape[0] != rows:
            raise DataError(
                f"{self.state.binding.site.label}: a batch of {batch and batch.shape[0]} rows continues a key/value "
                f"cache of {rows}, each of which has its own units; start with an empty cache, or use group_by: batch"
            )
        by_row = x.reshape(rows, -1, x.shape[-1])
        made = [functional.linear(by_row.index_select(0, own), *weights_of(part)) for own, part in self.groups()]
        return torch.cat(made).index_select(0, self._place).reshape(*x.shape[:-1], -1)

    def forget_copies(self) -> None:
        for part in self.parts:
            part.forget_copies()

    def copies(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.copies()
