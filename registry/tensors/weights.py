"""Statistics of weights: a number of every decoder layer, from its linear layers and from what enters them.

Letters: O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..component import Component


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of one linear layer of a decoder layer."""

    path: str
    """Within the decoder layer, such as ``mlp.down_proj``."""
    read: Callable[[], Tensor]
    """Gives the weight (O, I) float32; not to be written to. Each call may make a copy."""
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    """(I,) float32: the L2 norm of every input over all real tokens of the calibration text; empty where the statistic
    does not use inputs."""


class WeightStatistic(Component):
    """A number of every decoder layer, for allocators, from the weights of its linear layers."""

    uses_inputs: ClassVar[bool] = False
    """Whether it needs the norms of what enters the linear layers, which takes a pass over the calibration text."""

    @abstractmethod
    def measure(self, weights: Sequence[LayerWeight]) -> float:
        """The number of a decoder layer; ``weights``: of all of its linear layers, in the order of the model."""
