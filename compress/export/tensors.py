"""An exported model's weights, named as in transformers' state dict, each made only when it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Its values: contiguous, on the CPU, of this shape and dtype."""

    @property
    def bytes(self) -> int:
        """Size in a file."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        for length in self.shape:
            size *= length
        return size


Tensors = dict[str, PlannedTensor]
"""By their names in transformers' state dict; tied weights are there once."""
