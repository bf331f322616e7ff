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
from .parts import both_kinds, check_selection, draw, expect, expect_tensor, expect_unchanged, tensors_in

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
                cross = matrix.clone() if compensator.fits_dense_outputs else None
                if cross is not None and compensator.fits_dense_stream:
                    cross = torch.cat([cross, matrix[:LAG]])
                given = SiteCovariance(matrix, 10 * CHANNELS, known, once, cross=cross)
                return _sloped(compensator, given, kept, dropped)

            try:
                sloped(some_covariance())
            except SpecError:
                expect(known is None, compensator, "refuses to prepare although it gets the calibrated channels")
                continue
            _check_slope(compensator, "cut once" if once else "per batch", sloped, kept, dropped)


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


COMPENSATOR_CHECKS = [check_mean, check_slope, check_probe, check_memory_plan]
"""Each a function of one component."""
