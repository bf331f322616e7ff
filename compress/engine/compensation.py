"""How one site gives back what it drops: the slope of its cut, folded into the consumer's weight, and a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...registry import ChannelMoments, Compensator, NonFiniteError, SingularError, Site, Slope, complement
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import unautocast

Solved = TypeVar("Solved")


@dataclass(eq=False)
class SiteCompensation:
    """A site's compensator with everything that it has learnt there."""

    site: Site
    compensator: Compensator
    moments: ChannelMoments | None = None
    """While calibration gathers the covariance."""
    prepared: Any = None
    """Of the covariance, where cuts are made per batch."""
    fixed: Slope | None = None
    """Where the cut is made once."""
    fell_back: bool = False
    """Whether the covariance could not be solved, so that the mean alone is given back."""
    tokens: int | None = None
    """Tokens that the covariance was gathered from."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to give back."""
        return self.compensator.keeps_mean

    @property
    def has_slope(self) -> bool:
        """Whether kept channels absorb anything of the dropped ones."""
        return bool(self.fixed) or self.prepared is not None

    @property
    def bytes(self) -> int:
        """Memory of what is held: moments, the prepared part, the slope."""
        products = None if self.moments is None else self.moments.products
        tensors = [products, *(self.fixed or ()), *(self.prepared if isinstance(self.prepared, tuple) else ())]
        if isinstance(self.prepared, Tensor):
            tensors.append(self.prepared)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def learn(self, x: Tensor, valid: Tensor | None) -> None:
        """Take a calibration batch x (B, T, C) into the moments."""
        if self.moments is None:
            self.moments = ChannelMoments(self.site.channels, x.device)
        with unautocast(x):
            self.moments.observe(x, valid)

    def settle(self, kept: Tensor | None, usual: Tensor | None) -> None:
        """Make of the moments what cuts need, and let the covariance go.

        ``kept`` (k,) are the channels of a cut made once, else None; ``usual`` (k,) what calibration alone would
        keep. Raises :class:`NonFiniteError` and :class:`SingularError`, naming the site.
        """
        moments, self.moments = self.moments, None
        self.tokens = moments.tokens
        covariance = moments.take_covariance()
        if not bool(torch.isfinite(covariance.diagonal()).all()):
            if self.compensator.falls_back:
                self.fell_back = True
                return
            raise NonFiniteError(
                f"{self.site.label}: the covariance of what enters {self.site.consumer} is NaN or infinite, so the "
                f"activations here are, or their squares; {self._mean_alone}. {FINITE_REMEDY}"
            )
        with unautocast(covariance):
            self.compensator = self.compensator.fitted(covariance, self.tokens)
            if kept is None:
                self.prepared = self._solved(lambda: self.compensator.prepare(covariance, usual))
            elif len(kept):
                dropped = complement(kept, self.site.channels)
                self.fixed = self._solved(lambda: self.compensator.solve(covariance, kept, dropped))
            else:
                self.fixed = ()

    def weight(self, whole: Tensor, cut: Tensor, kept: Tensor) -> Tensor:
        """The consumer's weight with the slope folded in: ``W_kept + W_cut @ slope``, in the dtype of W.

        whole (O, C); cut is the weight cut to kept (k,): (O, k), or (O, C) where dropped columns are only zeroed.
        """
        dropped = complement(kept, self.site.channels)
        with torch.no_grad():
            slope = self._slope(kept, dropped)
        if not slope:
            return cut
        added = whole.index_select(1, dropped).float()
        for factor in slope:
            added = added @ factor
        if cut.shape[1] != len(kept):
            return cut.float().index_add(1, kept, added).to(cut.dtype)
        return (cut.float() + added).to(cut.dtype)

    def check_folded(self, whole: Tensor, kept: Tensor) -> None:
        """Raise :class:`NonFiniteError` where the weight (O, C) with the slope of kept (k,) overflows its dtype."""
        if self.has_slope and not bool(torch.isfinite(self.weight(whole, whole[:, kept], kept)).all()):
            raise NonFiniteError(
                f"{self.site.label}: the weight of {self.site.consumer} overflows {str(whole.dtype)[6:]} with what "
                f"compensator {self.compensator.name} folds into it; load the model in bfloat16 or float32, or raise "
                "the ridge"
            )

    def _slope(self, kept: Tensor, dropped: Tensor) -> Slope:
        if self.fixed is not None:
            return self.fixed
        return self._solved(lambda: self.compensator.slope(self.prepared, kept, dropped)) or ()

    def _solved(self, solve: Callable[[], Solved]) -> Solved | None:
        try:
            return solve()
        except torch.linalg.LinAlgError as error:
            if self.compensator.falls_back:
                self.fell_back = True
                return None
            raise SingularError(
                f"{self.site.label}: compensator {self.compensator.name} cannot solve the covariance of what enters "
                f"{self.site.consumer} ({' '.join(str(error).split())}); calibrate with more text, raise its ridge, or "
                f"{self._mean_alone}"
            ) from error

    @property
    def _mean_alone(self) -> str:
        """The remedy that is left where a covariance is of no use."""
        name = self.compensator.name
        if "singular" in type(self.compensator).model_fields:
            return f"give back the mean alone at such sites (compensate: {{name: {name}, singular: mean}})"
        return "give back the mean alone (compensate: mean)"

    def bias(self, linear: nn.Linear, weight: Tensor, kept: Tensor, mean: Tensor, whole: Tensor) -> Tensor:
        """``bias + W @ mean - W' @ mean[kept]`` (O,): with it the mean output is what it was before the cut.

        weight is W' (O, k), or (O, C) where dropped columns are zeroed; whole is ``W @ mean`` (O,) float32.
        """
        there = mean if weight.shape[1] == self.site.channels else mean[kept]
        bias = whole - weight.float() @ there
        return (bias if linear.bias is None else bias + linear.bias).to(linear.weight.dtype)
