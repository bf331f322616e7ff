"""Joint choice at one site: its chooser orders the units by the covariance of their channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Chooser, NonFiniteError, SingularError, Site, SiteCovariance
from ...registry.errors import FINITE_REMEDY, LinAlgError
from ...registry.tensors.devices import unautocast


@dataclass(frozen=True, eq=False)
class Choice:
    """In which order the units of a site go, and from what."""

    site: Site
    chooser: Chooser
    channels: Tensor
    """(C,) float32: the scores of the units, repeated for their channels."""
    units: Tensor
    """(U,) float32: scores, all different; the lowest goes first."""
    tokens: int | None
    """Tokens that the covariance was computed from; None where none reached the site."""
    diagnostics: dict[str, float]
    """Numbers that the chooser has reported."""


def choice_of(chooser: Chooser, site: Site, covariance: SiteCovariance, weight: Tensor) -> Choice:
    """Order the units of a site; weight (O, C) is the consumer's.

    Raises :class:`NonFiniteError` and :class:`SingularError`, naming the site.
    """
    if not bool(torch.isfinite(covariance.matrix.diagonal()).all()):
        raise NonFiniteError(
            f"{site.label}: the covariance of what enters {site.consumer} is NaN or infinite, so the activations here "
            f"are, or their squares; nothing was pruned. {FINITE_REMEDY}"
        )
    try:
        with torch.no_grad(), unautocast(covariance.matrix):
            channels = chooser.score(chooser.prepare(weight.detach().float(), site), covariance)
    except LinAlgError as error:
        raise SingularError(
            f"{site.label}: scorer {chooser.name} cannot solve the covariance of what enters {site.consumer} "
            f"({' '.join(str(error).split())}); calibrate with more text, raise its ridge, or use another scorer"
        ) from error
    units = chooser.unit_scores(channels, site.unit_size)
    return Choice(site, chooser, channels, units, covariance.tokens, covariance.diagnostics)
