"""Statistics of blocks: what a block does to the residual stream that passes it.

Letters: N tokens, D hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor
from torch.nn import functional

from ..component import Component


class BlockStatistic(Component):
    """A number of every token, from the residual stream that enters a block and the one that leaves it.

    A block is a site's (norm, attention or MLP, and the addition), or a whole decoder layer. Its mean over the tokens
    of the calibration text is given to an allocator that asks for it.
    """

    @abstractmethod
    def measure(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """The statistic of each token; entering (N, D) and leaving (N, D) float32 -> (N,) float32."""


class BlockInfluence(BlockStatistic):
    """One minus the cosine between what enters a block and what leaves it (ShortGPT, arXiv 2403.03853)."""

    name: Literal["block_influence"] = "block_influence"

    def measure(self, entering: Tensor, leaving: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(entering, leaving, dim=-1)
