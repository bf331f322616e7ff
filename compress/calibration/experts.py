"""Routed experts that calibration reached by no token: they exist in real models, and have no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...registry import ChannelMoments
from ..engine.site_cut import SiteCut


def score_unreached(cuts: Sequence[SiteCut]) -> None:
    """Have experts that no token has reached scored by weights alone.

    Each of their channels gets the mean statistic of the layer's other experts, or 1 where there is none, so that its
    rank depends on the weights. Nothing of them is compensated.
    """
    experts = [cut for cut in cuts if cut.site.expert is not None]
    for _, group in groupby(experts, lambda cut: cut.site.layer):
        layer = list(group)
        reached = [cut for cut in layer if cut.history.positions or cut.history.tokens]
        known = [cut.history.summed().mean() for cut in reached if cut.history.positions]
        for cut in layer:
            cut.state.unreached, history = cut not in reached, cut.history
            if cut in reached:
                continue
            if cut.state.statistic is not None:
                history.grow(1)
                history.table += torch.stack(known).mean() if known else 1.0
            if cut.compensation.wanted or (cut.state.statistic is not None and cut.state.statistic.tracks_mean):
                history.mean = torch.zeros(history.channels, device=history.device)


def unit_moments(channels: int, device: torch.device) -> ChannelMoments:
    """Moments with which units are chosen by weights alone: channels of variance 1 that are not correlated."""
    return ChannelMoments(channels, device, 1, torch.zeros(channels, device=device), torch.eye(channels, device=device))


def unreached_experts(cut: SiteCut) -> list[int]:
    """The numbers of a site's experts that calibration has reached by no token."""
    if cut.site.expert is not None:
        return [cut.site.expert] if cut.state.unreached else []
    if cut.site.router is None or len(cut.history.table) != 2:
        return []
    share: Tensor = cut.history.table[1]
    return (share == 0).nonzero().flatten().tolist()
