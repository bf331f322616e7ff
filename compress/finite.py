"""Whether what a batch decided and learnt by was finite: looked at once, when the batch has gone through.

Looking at a value makes an accelerator wait for it, at every site of every batch if it were done on the spot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import NonFiniteError


class FiniteChecks:
    """Tensors to be checked, with what to say where one is not finite."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Callable[[], str]]] = []

    def add(self, tensor: Tensor, message: Callable[[], str]) -> None:
        """Check ``tensor`` at :meth:`settle`; not while torch compiles."""
        if not torch.compiler.is_compiling():
            self._waiting.append((tensor.sum(), tensor, message))

    @property
    def waiting(self) -> bool:
        """Whether anything is to be checked."""
        return bool(self._waiting)

    def forget(self) -> None:
        """Drop what waits."""
        self._waiting.clear()

    def settle(self) -> None:
        """Raise :class:`NonFiniteError` for the first tensor with NaN or infinity, and forget them all."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sums = [total for total, _, _ in waiting]
        if len({total.device for total in sums}) > 1:
            sums = [total.cpu() for total in sums]
        finite = torch.stack([total.float() for total in sums]).isfinite().cpu()
        if bool(finite.all()):
            return
        for (_, tensor, message), fine in zip(waiting, finite.tolist(), strict=True):
            if not fine and not bool(torch.isfinite(tensor).all()):  # a sum may overflow where no number does
                raise NonFiniteError(message())
