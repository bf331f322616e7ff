"""The covariance of one site, and its compensation: the slope of its cut, folded into the weight, and a bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ...registry import (
    ChannelMoments,
    Compensator,
    NoCompensation,
    NonFiniteError,
    Prepared,
    SingularError,
    Site,
    SiteCovariance,
    Slope,
    SpecError,
    complement,
)
from ...registry.errors import FINITE_REMEDY, LinAlgError
from ...registry.tensors.devices import unautocast
from ...registry.tensors.moments import CrossMoments, PartedMoments, merged

Solved = TypeVar("Solved")

NO_PROBE = {"probe": 0.0, "check": False}
"""The options with which a compensator reads no probe."""


@dataclass(eq=False)
class SiteCompensation:
    """A site's compensator with everything that calibration has found for it."""

    site: Site
    compensator: Compensator
    moments: ChannelMoments | PartedMoments | None = None
    """While calibration computes the covariance, and until it is solved."""
    cross: CrossMoments | None = None
    """The same of the dense model's inputs with these, where dense outputs are fitted."""
    shift: Tensor | None = None
    """(C,) float32: the dense model's mean less the pruned one's, where dense outputs are fitted; (C + O,) with the
    mean lag where the dense residual stream is."""
    prepared: Prepared | None = None
    """What slopes are computed from, where cuts are made per batch."""
    fixed: Slope | None = None
    """The slope of a cut made once."""
    fell_back: bool = False
    """Whether the covariance could not be solved, so that the mean alone is compensated."""
    rows: int = 0
    """Rows of the calibration text."""
    tokens: int | None = None
    """Tokens that the covariance was computed from."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Numbers that the compensator has reported of the solution."""

    wanted: bool = field(init=False)
    """Whether anything is compensated."""

    def __post_init__(self) -> None:
        self.wanted = not isinstance(self.compensator, NoCompensation)

    @property
    def has_slope(self) -> bool:
        """Whether kept channels take over anything of the dropped ones."""
        return bool(self.fixed) or self.prepared is not None

    @property
    def bytes(self) -> int:
        """Memory of the moments, the prepared part and the slope."""
        prepared = (self.prepared,) if isinstance(self.prepared, Tensor) else self.prepared
        tensors = [*(self.fixed or ()), *(prepared or ())]
        held = sum(moments.bytes for moments in (self.moments, self.cross) if moments is not None)
        return held + sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def use(self, compensator: Compensator) -> None:
        """Compensate with this component from now on, with the results of the same calibration."""
        self.compensator = compensator
        self.wanted = not isinstance(compensator, NoCompensation)

    def expect(self, rows: int) -> None:
        """The calibration text has so many rows."""
        self.rows = rows

    def take(self, moments: ChannelMoments) -> None:
        """Use moments of this site that were computed before."""
        self.moments = moments

    def restore(
        self,
        fixed: Slope | None,
        prepared: Prepared | None,
        fell_back: bool,
        tokens: int | None,
        diagnostics: dict[str, float],
        shift: Tensor | None = None,
    ) -> None:
        """Use the results of an earlier calibration."""
        self.shift = shift
        self.fixed, self.prepared, self.fell_back = fixed, prepared, fell_back
        self.tokens, self.diagnostics = tokens, diagnostics

    def learn(self, x: Tensor, valid: Tensor | None, dense: Tensor | None = None) -> None:
        """Add a calibration batch x (B, T, C) to the moments.

        dense (B, T, C): the same of the dense model; (B, T, C + O) with the lag of the residual stream.
        """
        if self.moments is None:
            parts = [ChannelMoments(self.site.channels, x.device) for _ in range(self.compensator.covariance_parts)]
            self.moments = parts[0] if len(parts) == 1 else PartedMoments(parts, self.rows)
        with unautocast(x):
            self.moments.observe(x, valid)
            if dense is not None:
                self.cross = self.cross or CrossMoments(dense.shape[-1], self.site.channels, x.device)
                self.cross.observe(dense, x, valid)

    def forget(self) -> None:
        """Drop the moments."""
        self.moments = self.cross = None

    def covariance(self) -> SiteCovariance:
        """The covariance in memory of its own, for a chooser; the moments stay."""
        assert self.moments is not None  # calibration has just computed them
        together, _ = _together(self.moments)
        cross = None if self.cross is None else self.cross.covariance()
        return SiteCovariance(
            together.covariance(), together.tokens, None, once=True, mean=together.mean.clone(), cross=cross
        )

    def finalize(self, kept: Tensor | None, calibrated: Tensor | None, weight: Tensor) -> None:
        """Compute from the moments what cuts need, and drop the covariance.

        ``kept`` (k,) are the channels of a cut made once, else None; ``calibrated`` (k,) those that calibration
        alone keeps; weight (O, C) is the consumer's.
        Raises :class:`NonFiniteError` and :class:`SingularError`, naming the site.
        """
        gathered, cross = self.moments, self.cross
        self.forget()
        if gathered is None:
            return
        moments, parts = _together(gathered)
        self.tokens = moments.tokens
        usual = calibrated if kept is None else kept
        covariance = SiteCovariance(
            moments.take_covariance(), moments.tokens, usual, kept is not None, parts, weight.detach(), moments.mean
        )
        if cross is not None:
            self.shift = torch.cat([cross.dense[: len(cross.pruned)] - cross.pruned, cross.dense[len(cross.pruned) :]])
            covariance.cross = cross.take_covariance()
        if kept is not None and not len(kept):
            self.fixed = ()
            return
        finite = bool(torch.isfinite(covariance.matrix.diagonal()).all())
        with unautocast(covariance.matrix), self._few_tokens():
            prepared = self._solved(lambda: self.compensator.prepare(covariance), finite)
            self.diagnostics = covariance.diagnostics
            if prepared is None:
                self.fell_back = True
            elif not finite:
                raise NonFiniteError(self._not_finite)
            elif kept is None:
                self.prepared = prepared
            else:
                self.fixed = self._slope_of(prepared, kept, complement(kept, self.site.channels))

    def folded(self, whole: Tensor, kept: Tensor) -> Tensor | None:
        """What the slope adds to the kept columns: ``W_cut @ slope`` (O, k) float32; None: nothing.

        ``W @ slope`` where dense outputs are fitted; where the dense residual stream is, with what the slope predicts
        of the lag. whole (O, C) is the consumer's weight; kept (k,).
        """
        dropped = complement(kept, self.site.channels)
        with torch.no_grad():
            slope = self._slope(kept, dropped)
        if not slope:
            return None
        first, *others = slope
        if self.compensator.fits_dense_outputs:
            of_channels, of_lag = first.tensor_split([whole.shape[1]])
            added = whole.float() @ of_channels
            added = added + of_lag if len(of_lag) else added
        else:
            added = whole.index_select(1, dropped).float() @ first
        for factor in others:
            added = added @ factor
        return added

    def weight(self, cut: Tensor, kept: Tensor, added: Tensor | None, shares: Tensor | None = None) -> Tensor:
        """The consumer's weight with a share of the slope: ``W_kept + share * W_cut @ slope``, in the dtype of W.

        cut is the weight cut to kept (k,): (O, k), or (O, C) where dropped columns are only zeroed. added (O, k) is of
        :meth:`folded`, shares (2,) of :meth:`best_shares`; None: the whole slope.
        """
        if added is None:
            return cut
        if shares is not None:
            added = added * shares[1]
        if cut.shape[1] != len(kept):
            return cut.float().index_add(1, kept, added).to(cut.dtype)
        return (cut.float() + added).to(cut.dtype)

    def best_shares(
        self, whole: Tensor, kept: Tensor, added: Tensor | None, states: Tensor, real: Tensor | None, mean: Tensor
    ) -> Tensor:
        """The shares of mean and slope, each 0 to 1, with the least squared error of the output on a probe's tokens.

        whole (O, C) is the consumer's weight; kept (k,); added (O, k) of :meth:`folded`; states (b, t, C), of which
        ``real`` (b, t) count; mean (C,) is the compensated one. -> (2,) float32
        """
        dropped = complement(kept, self.site.channels)
        tokens, lost = states.float(), whole.index_select(1, dropped).float()
        missing = tokens[..., dropped] @ lost.T
        constant = (lost @ mean[dropped]).expand_as(missing)
        predicted = torch.zeros_like(missing) if added is None else (tokens - mean)[..., kept] @ added.T
        outputs = torch.stack([constant, predicted, missing])
        if real is not None:
            outputs = outputs.masked_fill(~real[..., None], 0)
        constant_and_predicted, missing = outputs.flatten(1).split([2, 1])
        return least_squares_in_box(constant_and_predicted, missing[0])

    def check_folded(self, whole: Tensor, kept: Tensor) -> None:
        """Raise :class:`NonFiniteError` where the weight (O, C) with the slope of kept (k,) overflows its dtype."""
        if not self.has_slope:
            return
        weight = self.weight(whole[:, kept], kept, self.folded(whole, kept))
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"{self.site.label}: the weight of {self.site.consumer} overflows {str(whole.dtype)[6:]} with what "
                f"compensator {self.compensator.name} folds into it; load the model in bfloat16 or float32, or raise "
                "the ridge"
            )

    def _slope(self, kept: Tensor, dropped: Tensor) -> Slope:
        if self.fixed is not None:
            return self.fixed
        return () if self.prepared is None else self._slope_of(self.prepared, kept, dropped)

    def _slope_of(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        slope: Slope = ()
        with self._few_tokens():
            slope = self._solved(lambda: self.compensator.slope(prepared, kept, dropped))
        self.fell_back = self.fell_back or not slope
        return slope

    @contextmanager
    def _few_tokens(self) -> Iterator[None]:
        """Within it a routed expert whose covariance cannot be solved falls back to the mean: few tokens reach some."""
        try:
            yield
        except SingularError:
            if self.site.expert is None:
                raise
            self.fell_back = True

    def _solved(self, solve: Callable[[], Solved], finite: bool = True) -> Solved:
        try:
            return solve()
        except LinAlgError as error:
            if not finite:
                raise NonFiniteError(self._not_finite) from error
            raise SingularError(
                f"{self.site.label}: compensator {self.compensator.name} cannot solve the covariance of what enters "
                f"{self.site.consumer} ({' '.join(str(error).split())}); calibrate with more text, raise its ridge, or "
                f"{self._mean_alone}"
            ) from error

    @property
    def _not_finite(self) -> str:
        return (
            f"{self.site.label}: the covariance of what enters {self.site.consumer} is NaN or infinite, so the "
            f"activations here are, or their squares; {self._mean_alone}. {FINITE_REMEDY}"
        )

    @property
    def _mean_alone(self) -> str:
        """The remedy where a covariance cannot be used."""
        name = self.compensator.name
        if "singular" in type(self.compensator).model_fields:
            return f"compensate the mean alone at such sites (compensate: {{name: {name}, singular: mean}})"
        return "compensate the mean alone (compensate: mean)"

    def target_mean(self, mean: Tensor) -> Tensor:
        """The means (C,) whose output through the whole weight is kept: those of the dense model where its outputs are
        fitted; mean (C,) is that of the inputs."""
        return mean if self.shift is None else mean + self.shift[: len(mean)]

    @property
    def lag(self) -> Tensor | None:
        """The mean (O,) of the lag of the residual stream, which the site adds; None: nothing."""
        of_lag = None if self.shift is None else self.shift[self.site.channels :]
        return None if of_lag is None or not len(of_lag) else of_lag

    def bias(self, weight: Tensor, kept: Tensor, mean: Tensor, whole: Tensor) -> Tensor:
        """``W @ mean - W' @ mean[kept]`` (O,) float32: with it the mean output is what it was before the cut.

        weight is W' (O, k), or (O, C) where dropped columns are zeroed; whole is ``W @ mean`` (O,) float32.
        """
        there = mean if weight.shape[1] == self.site.channels else mean[kept]
        return whole - weight.float() @ there

    def share_of_bias(self, bias: Tensor, added: Tensor | None, there: Tensor, shares: Tensor) -> Tensor:
        """The bias (O,) with a share of the mean: the share 1 gives ``bias``, the share 0 that of the slope alone.

        added (O, k) is of :meth:`folded`; there (k,) is the mean of the kept channels; shares (2,).
        """
        of_slope = torch.zeros_like(bias) if added is None else -shares[1] * (added @ there)
        return torch.lerp(of_slope, bias, shares[0])


def _together(moments: ChannelMoments | PartedMoments) -> tuple[ChannelMoments, list[ChannelMoments]]:
    """The moments of all tokens, and those of the parts, if they were gathered apart."""
    if isinstance(moments, ChannelMoments):
        return moments, []
    parts = [part for part in moments.parts if part.tokens]  # a part may be padding alone
    return merged(parts), parts


def least_squares_in_box(x: Tensor, y: Tensor) -> Tensor:
    """The weights w in [0, 1]^2 with the least ``(w @ x - y)^2``; x (2, n), y (n,) -> (2,).

    They lie inside the square or on one of its edges, where the other weight is a quotient. A weight that changes
    nothing is 0, and both are where a product is not finite.
    """
    gram, cross = x @ x.T, x @ y
    (a, b), (_, c), (d, e) = *gram.unbind(), cross
    zero, one, determinant = torch.zeros_like(a), torch.ones_like(a), a * c - b * b
    edges = (zero, e / c), (d / a, zero), (one, (e - b) / c), ((d - b) / a, one)
    inside = (c * d - b * e) / determinant, (a * e - b * d) / determinant
    points = torch.stack([torch.stack(point) for point in (*edges, inside)]).nan_to_num(0, 0, 0).clamp(0, 1)
    errors = ((points @ gram) * points).sum(1) - 2 * points @ cross
    best = points.index_select(0, errors.argmin(0, keepdim=True))[0]
    return torch.where(gram.isfinite().all() & cross.isfinite().all(), best, 0)


def without_probe(compensator: Compensator) -> Compensator:
    """The same compensator with its option ``probe`` at 0 and ``check`` false, for cuts made once and exported.

    Raises :class:`SpecError` for one that still uses a probe then.
    """
    options = {name: off for name, off in NO_PROBE.items() if name in type(compensator).model_fields}
    without = compensator.model_copy(update=options)
    if without.uses_probe:
        raise SpecError(
            f"compensator {compensator.name} reads a probe of every batch, and a model that is cut once has none; use "
            "compensate: mean, or export the strategy as it is (--profile dynamic)"
        )
    return without
