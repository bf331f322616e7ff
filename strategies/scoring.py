"""What several scorers share: FLAP's habit of squaring attention scores."""

from __future__ import annotations

from pydantic import Field, PrivateAttr
from torch import Tensor
from typing_extensions import Self

from ..registry import Scorer, Site


class AttentionPower(Scorer):
    """A scorer whose channel scores can be squared at attention sites."""

    square_attention: bool = Field(default=False, description="square the channel scores of attention, as FLAP does")

    _squared: bool = PrivateAttr(False)

    def at(self, site: Site) -> Self:
        if not (self.square_attention and site.kind == "attention"):
            return self
        here = self.model_copy()
        here._squared = True
        return here

    def powered(self, scores: Tensor) -> Tensor:
        """Scores (C,), squared where this site asks for it."""
        return scores.square() if self._squared else scores
