"""The checks of compensators, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from ..errors import LinAlgError, SpecError
from ..roles.compensation import Compensator, SiteCovariance, Slope
from ..roles.parts import ProbeSelector
from ..sites import complement
from .parts import alike, both_kinds, draw, expect, expect_tensor, expect_unchanged, tensors_in
from .probes import check_selection

CHANNELS = 24
LAG = 8
"""Rows of the lag where the dense residual stream is fitted."""
BLOWN_UP = 1e3
"""Slopes that grow by more than this with the covariance's scale: regressions do not depend on it."""
OVERSTATED = 1.1
"""Prepared parts larger than this times what the memory plan states break it."""


def some_covariance(scale: float = 1.0, constant: bool = False) -> Tensor:
    """A covariance of 24 channels with a good deal in common; ``constant``: every third channel never varies."""
    loadings = draw(CHANNELS, 6)
    if constant:
        loadings[::3] = 0
    specific = loadings.square().sum(1) / 4
    return (loadings @ loadings.T + specific.diag()) * scale


def some_cuts() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Kept and dropped channels, and those that calibration alone keeps: some of them, none, all, not known."""
    shuffled = draw(CHANNELS).argsort()
    for count, moved in ((12, 5), (1, 1), (CHANNELS - 1, 0), (12, None)):
        kept = shuffled[:count].sort().values
        calibrated = None if moved is None else shuffled[moved : count + moved].sort().values
        yield kept, complement(kept, CHANNELS), calibrated


def check_mean(compensator: Compensator) -> None:
    """The mean is a finite (C,) float32 tensor, is deterministic, and leaves both its inputs unchanged."""
    for site in both_kinds():
        calibrated, probe = draw(site.channels), draw(site.channels, seed=1)
        given = calibrated.clone(), probe.clone() if compensator.uses_probe else None
        mean = compensator.mean(*given)
        expect_tensor(mean, compensator, "the mean", (site.channels,))
        expect_unchanged(compensator, "calibrated mean", calibrated, given[0])
        if given[1] is not None:
            expect_unchanged(compensator, "probe's mean", probe, given[1])
        same = torch.equal(mean.clone(), compensator.mean(*given))
        expect(same, compensator, "gives another mean for the same input")


def check_probe(compensator: Compensator) -> None:
    """A compensator's own selector is a sound one."""
    selector = getattr(compensator, "selector", None)
    if isinstance(selector, ProbeSelector):
        check_selection(selector)


def check_memory_plan(compensator: Compensator) -> None:
    """The bytes are whole numbers, and the prepared part takes no more than the plan states."""
    for dropped in (1, 12, CHANNELS):
        for per_batch in (False, True):
            plan = compensator.memory_plan(CHANNELS, dropped, per_batch)
            for what, size in plan._asdict().items():
                fits = (type(size) is int and size >= 0) or (what == "limit" and size is None)
                least = "an int of 0 or more" if what != "limit" else "an int of at least 1, or None"
                fits = fits and (what != "limit" or size != 0)
                expect(fits, compensator, f"must plan {what} as {least}, found {size!r}")
    if compensator.needs_covariance and not compensator.fits_dense_outputs:
        held = compensator.memory_plan(CHANNELS, 12, True).held
        prepared = compensator.prepare(SiteCovariance(some_covariance(), CHANNELS, torch.arange(12), once=False))
        taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(prepared))
        expect(
            taken <= held * OVERSTATED,
            compensator,
            f"prepares {taken} bytes for {CHANNELS} channels, and its memory_plan holds {held}",
        )


def check_slope(compensator: Compensator) -> None:
    """The slope of a cut is (d, k), float32, finite, deterministic and independent of the covariance's scale."""
    if not compensator.needs_covariance:
        never = type(compensator).slope is Compensator.slope
        expect(never, compensator, "has a slope although its needs_covariance is false: it would never be called")
        return
    for kept, dropped, calibrated in some_cuts():
        for once in (True,) if compensator.fits_dense_outputs else (True, False):
            known = kept if once else calibrated

            def sloped(
                matrix: Tensor,
                kept: Tensor = kept,
                dropped: Tensor = dropped,
                known: Tensor | None = known,
                once: bool = once,
            ) -> Slope:
                return _sloped(compensator, _given(compensator, matrix, known, once), kept, dropped)

            try:
                sloped(some_covariance())
            except SpecError:
                expect(known is None, compensator, "refuses to prepare although it gets the calibrated channels")
                continue
            _check_slope(compensator, "cut once" if once else "per batch", sloped, kept, dropped)


def check_prediction(compensator: Compensator) -> None:
    """What the slope predicts of all channels is nearer to them than without it, and follows channels to another place.

    The mean does, too.
    """
    order = draw(CHANNELS, seed=21).argsort()
    places = order.argsort()
    for site in both_kinds():
        calibrated, probe = draw(site.channels), draw(site.channels, seed=1) if compensator.uses_probe else None
        mean = compensator.mean(calibrated.clone(), probe)
        moved = compensator.mean(calibrated[order], None if probe is None else probe[order])
        expect(alike(moved, mean[order]), compensator, "gives a mean by the number of a channel")
    if not compensator.needs_covariance:
        return
    matrix = some_covariance()
    for kept, dropped, _ in some_cuts():
        predicted = _predicted(compensator, matrix, matrix[:LAG], kept, dropped)
        if predicted is None:
            continue
        plain = torch.zeros(CHANNELS, CHANNELS).index_fill_(0, kept, 1).diag().diag()
        loss, without = (_unexplained(matrix, each) for each in (predicted, plain))
        expect(
            loss <= without * (1 + 1e-4),
            compensator,
            f"predicts the dropped channels worse than no slope does: {loss:.3g} instead of {without:.3g} is left",
        )
        turned = _predicted(
            compensator,
            matrix[order][:, order],
            matrix[:LAG][:, order],
            places[kept].sort().values,
            places[dropped].sort().values,
        )
        fits = turned is not None and bool((turned - predicted[order][:, order]).norm() <= 1e-2 * predicted.norm())
        expect(fits, compensator, "predicts by the number of a channel: in another order, channels get another slope")


def _predicted(compensator: Compensator, matrix: Tensor, lag: Tensor, kept: Tensor, dropped: Tensor) -> Tensor | None:
    """What every channel is computed from in a cut made once; (C, C), 0 in columns of dropped ones. None: no slope."""
    slope = _sloped(compensator, _given(compensator, matrix.clone(), kept, True, lag), kept, dropped)
    if not slope:
        return None
    found = torch.eye(CHANNELS).index_fill_(1, dropped, 0)
    rows = torch.arange(CHANNELS) if compensator.fits_dense_outputs else dropped
    found[rows[:, None], kept] += reduce(torch.matmul, slope)[: len(rows)]
    return found


def _unexplained(matrix: Tensor, predicted: Tensor) -> float:
    """Variance that is left of all channels, of this covariance, without what is predicted of them."""
    rest = torch.eye(CHANNELS) - predicted
    return float((rest @ matrix @ rest.T).diagonal().sum())


def _given(
    compensator: Compensator, matrix: Tensor, kept: Tensor | None, once: bool, lag: Tensor | None = None
) -> SiteCovariance:
    """What a compensator prepares: nothing was cut before, so that the dense channels are those of the covariance."""
    cross = matrix.clone() if compensator.fits_dense_outputs else None
    if cross is not None and compensator.fits_dense_stream:
        cross = torch.cat([cross, matrix[:LAG] if lag is None else lag])
    return SiteCovariance(matrix, 10 * CHANNELS, kept, once, cross=cross)


def _sloped(compensator: Compensator, covariance: SiteCovariance, kept: Tensor, dropped: Tensor) -> Slope:
    """The slope; the prepared part is compared before and after."""
    prepared = compensator.prepare(covariance)
    if prepared is None:
        return ()
    before = [tensor.clone() for tensor in tensors_in(prepared)]
    slope = compensator.slope(prepared, kept, dropped)
    for one, other in zip(before, tensors_in(prepared), strict=True):
        expect_unchanged(compensator, "prepared part", one, other)
    return slope


def _check_slope(
    compensator: Compensator, when: str, made: Callable[[Tensor], Slope], kept: Tensor, dropped: Tensor
) -> None:
    rows = CHANNELS + LAG * compensator.fits_dense_stream if compensator.fits_dense_outputs else len(dropped)
    given = kept.clone(), dropped.clone()
    first = made(some_covariance())
    size = _largest(compensator, first, rows, len(kept))
    expect(bool(first), compensator, f"has no slope ({when}) for a covariance that can be solved")
    expect_unchanged(compensator, "kept channels", given[0], kept)
    expect_unchanged(compensator, "dropped channels", given[1], dropped)
    again = made(some_covariance())
    same = len(first) == len(again) and all(torch.equal(*both) for both in zip(first, again, strict=False))
    expect(same, compensator, f"gives another slope ({when}) for the same input; seed what draws at random")
    for scale in (1e-6, 1e6):
        found = _largest(compensator, made(some_covariance(scale)), rows, len(kept))
        blown = f"blows up: the slope of a covariance times {scale:g} has {found:.3g} in it, instead of {size:.3g}"
        expect(found <= BLOWN_UP * max(size, 1), compensator, blown)
    for covariance in (some_covariance(constant=True), torch.zeros(CHANNELS, CHANNELS)):
        try:
            slope = made(covariance)
        except LinAlgError:
            continue  # a valid answer, too: the run then names the site
        _largest(compensator, slope, rows, len(kept))


def _largest(compensator: Compensator, slope: Slope, dropped: int, kept: int) -> float:
    """The largest number in the product of the slope's matrices, which must be (d, k); 0 where there are none."""
    expect(isinstance(slope, tuple), compensator, f"must return the slope as a tuple of matrices, found {slope!r}")
    inner = dropped
    for number, factor in enumerate(slope, 1):
        flat = isinstance(factor, Tensor) and factor.dim() == 2
        width = kept if number == len(slope) else (factor.shape[1] if flat else 0)
        expect_tensor(factor, compensator, f"matrix {number} of the slope", (inner, width))
        inner = width
    if not slope:
        return 0.0
    return float(reduce(torch.matmul, slope).abs().max())


COMPENSATOR_CHECKS = [check_mean, check_slope, check_prediction, check_probe, check_memory_plan]
"""Each a function of one component."""
