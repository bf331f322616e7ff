"""Whether what a batch decided and learnt by was finite: looked at once, when the batch has gone through.

Looking at a value makes an accelerator wait for it, at every site of every batch if it were done on the spot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import NonFiniteError, Site
from ...registry.errors import FINITE_REMEDY

SCORES = (
    "the scores of {consumer} are NaN or infinite, so nothing can be decided; the activations here, or the weights "
    "before, are not finite."
)
LEARNT = "NaN or infinity in what entered {consumer} in this batch; history keeps what it knew before."
PROBED = "NaN or infinity in what the probe of this batch saw enter {consumer}."


class FiniteChecks:
    """Tensors of sites to be checked, with what to say where one is not finite."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, str, Site]] = []

    def add(self, tensor: Tensor, said: str, site: Site) -> None:
        """Check ``tensor`` at :meth:`settle`, and say ``said`` of the site if it is not finite."""
        self._waiting.append((tensor.sum(), tensor, said, site))

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting.clear()

    def settle(self) -> None:
        """Raise :class:`NonFiniteError` for the first tensor with NaN or infinity, and forget them all.

        A user's own graph around the whole decoder looks at nothing.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting or torch.compiler.is_compiling():
            return
        sums = [total for total, *_ in waiting]
        if len({total.device for total in sums}) > 1:
            sums = [total.cpu() for total in sums]
        finite = torch.stack([total.float() for total in sums]).isfinite().cpu()
        if bool(finite.all()):
            return
        for (_, tensor, said, site), fine in zip(waiting, finite.tolist(), strict=True):
            if not fine and not bool(torch.isfinite(tensor).all()):  # a sum may overflow where no number does
                raise not_finite(said, site)


def not_finite(said: str, site: Site) -> NonFiniteError:
    """The error that says so of a site."""
    return NonFiniteError(f"{site.label}: {said.format(consumer=site.consumer)} {FINITE_REMEDY}")
