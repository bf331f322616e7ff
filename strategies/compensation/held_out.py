"""The ridge, and the share of the slope, that predict best a part of the text which the slope was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...registry import ChannelMoments, complement
from ...registry.tensors.moments import merged

RIDGES = tuple(10 ** (power / 2) for power in range(-8, 5))
"""From 0.0001 to 100 times the mean variance."""


def best_held_out(
    parts: Sequence[ChannelMoments], weight: Tensor, kept: Tensor, ridges: Sequence[float] = RIDGES
) -> tuple[float, float]:
    """The ridge, a share of the mean variance, and the share of the slope, 0 to 1, with the least held-out error.

    Every part is predicted by the slope and the mean of all others. The error is the squared one of the consumer's
    output over all tokens. weight (O, C); kept (k,) are the channels of one cut.
    """
    crosses, squares = torch.zeros(2, len(ridges), device=weight.device)
    for number, part in enumerate(parts):
        others = merged([*parts[:number], *parts[number + 1 :]])
        cross, square = _held_out(others, part, weight, kept, torch.tensor(ridges, device=weight.device))
        crosses, squares = crosses + cross, squares + square
    share = (crosses / squares).nan_to_num(0, 0, 0).clamp(0, 1)
    best = int((share.square() * squares - 2 * share * crosses).argmin())
    return ridges[best], float(share[best])


def working_bytes(channels: int, dropped: int) -> int:
    """Memory that trying one part takes: products and covariance of the others, those about their mean, slices of kept
    and dropped channels, and decomposing the first."""
    kept = channels - dropped
    return 4 * (3 * channels * channels + kept * channels + 6 * kept * kept)


def _held_out(
    others: ChannelMoments, part: ChannelMoments, weight: Tensor, kept: Tensor, ridges: Tensor
) -> tuple[Tensor, Tensor]:
    """``<y, p>`` and ``<p, p>`` for every ridge, (R,) each, summed over a part's tokens.

    y is what the dropped channels contribute to the output about the mean of ``others``, p what the slope that was
    fitted on ``others`` predicts of it. The kept channels' covariance is decomposed once for all ridges.
    """
    dropped = complement(kept, others.channels)
    covariance, step = others.products / others.tokens, part.mean - others.mean
    held_out = part.products.addr(step, step, alpha=part.tokens)
    variances, basis = torch.linalg.eigh(covariance[kept][:, kept])
    damped = 1 / (variances.clamp(min=0) + ridges[:, None] * covariance.diagonal().mean())
    lost = weight[:, dropped].float()
    fitted, seen = (lost @ (matrix[dropped][:, kept] @ basis) for matrix in (covariance, held_out))
    squares = (fitted.T @ fitted) * (basis.T @ held_out[kept][:, kept] @ basis)
    return damped @ (fitted * seen).sum(0), ((damped @ squares) * damped).sum(1)
