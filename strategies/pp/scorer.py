"""PPsp, the structured score of Probe Pruning."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ...registry import Scorer, Site


class PPsp(Scorer):
    """Mean square activation times the L2 norm of the squared weights (PP)."""

    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618, metric PPsp"

    name: Literal["ppsp"] = "ppsp"

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        """``sqrt(sum_o W[o,c]^4)``; (O, C) -> (C,)."""
        return weight.square().square().sum(0).sqrt()

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        """Equals the L2 norm over outputs of ``statistic[c] * W[o,c]^2``; (C,), (C,) -> (C,)."""
        return statistic * prepared

    def unit_scores(self, scores: Tensor, unit_size: int) -> Tensor:
        """L2 norm of a unit's channel scores; (C,) -> (U,)."""
        return scores if unit_size == 1 else scores.view(-1, unit_size).norm(dim=1)
