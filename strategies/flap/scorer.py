"""FLAP's fluctuation score and the two recurrences its shipped codes really run."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import ChannelHistory, Fluctuation, Scorer, Site, Statistic, position_sums


class FlapShippedFluctuation(Fluctuation):
    """The recurrence of FLAP's own code: sequence by sequence, about the new mean only.

    The code keeps the running mean without a copy while updating it, so the deviation from the old and
    from the new mean are the same; the first sequence is ignored.
    """

    name: Literal["fluctuation_flap_shipped"] = "fluctuation_flap_shipped"

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        history.grow(x.shape[1])
        for b in range(x.shape[0]):
            row, seen = x[b : b + 1], history.tokens
            mean = row.float().mean((0, 1))
            history.mean = mean if seen == 0 else (history.mean * seen + mean) / (seen + 1)
            if seen:
                deviations, _ = position_sums(row, None, square=True, centre=history.mean)
                history.table[: x.shape[1]].mul_((seen - 1) / seen).add_(deviations, alpha=1 / (seen + 1))
            history.tokens = seen + 1


class PPShippedFluctuation(Fluctuation):
    """The recurrence of the FLAP baseline in PP's code: the batch mean is divided as if it were a sum."""

    name: Literal["fluctuation_pp_shipped"] = "fluctuation_pp_shipped"

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        history.grow(x.shape[1])
        seen, batch = history.tokens, x.shape[0]
        old = torch.zeros(x.shape[-1], device=x.device) if history.mean is None else history.mean
        new = (old * seen + x.float().mean((0, 1))) / (seen + batch)
        if seen:
            values = x.float()
            deviations = ((values - new) * (values - old)).sum(0)
            table = history.table[: x.shape[1]]
            table.mul_((seen - 1) / (seen + batch - 1)).add_(deviations, alpha=1 / (seen + batch))
        history.mean = new
        history.tokens = seen + batch


RECURRENCES: dict[str, Statistic] = {
    "published": Fluctuation(),
    "flap_shipped": FlapShippedFluctuation(),
    "pp_shipped": PPShippedFluctuation(),
}


class FluctuationScorer(Scorer):
    """Fluctuation of the channel about its mean times its squared weights (FLAP, WIFV)."""

    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, metric WIFV"

    name: Literal["fluctuation"] = "fluctuation"
    recurrence: Literal["published", "flap_shipped", "pp_shipped"] = Field(
        default="published",
        description="published is the paper's variance; flap_shipped and pp_shipped what the codes of FLAP and "
        "of PP's FLAP baseline compute",
    )
    square_attention: bool = Field(default=False, description="square the channel scores of attention, as FLAP does")
    weighted: bool = Field(default=True, description="false leaves the weights out (FLAP's IFV)")

    @property
    def statistic(self) -> Statistic:
        return RECURRENCES[self.recurrence]

    def prepare(self, weight: Tensor, site: Site) -> tuple[Tensor, int]:
        """``sum_o W[o,c]^2`` and the power of the score; (O, C) -> (C,), 1 or 2."""
        weights = weight.square().sum(0) if self.weighted else torch.ones(weight.shape[1], device=weight.device)
        return weights, 2 if self.square_attention and site.kind == "attention" else 1

    def score(self, prepared: tuple[Tensor, int], statistic: Tensor) -> Tensor:
        weights, power = prepared
        return (statistic * weights).pow(power)
