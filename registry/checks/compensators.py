"""The checks of compensators, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..roles.compensation import Compensator, Slope
from ..roles.parts import ProbeSelector
from ..sites import complement
from .parts import both_kinds, check_selection, draw, expect, expect_tensor, expect_unchanged, tensors_in

CHANNELS = 24
BLOWN_UP = 1e3
"""Slopes that grow by more than this with the covariance's scale: regressions do not depend on it."""
OVERSTATED = 1.1
"""Prepared parts that take this much of what was stated, or more, are not what memory was reckoned with."""


def some_covariance(scale: float = 1.0, constant: bool = False) -> Tensor:
    """A covariance of 24 channels with a good deal in common; ``constant``: every third channel never varies."""
    loadings = draw(CHANNELS, 6)
    if constant:
        loadings[::3] = 0
    specific = loadings.square().sum(1) / 4
    return (loadings @ loadings.T + specific.diag()) * scale


def some_cuts() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Kept and dropped channels, and those that calibration alone would keep: some of them, none, all, not known."""
    shuffled = draw(CHANNELS).argsort()
    for count, moved in ((12, 5), (1, 1), (CHANNELS - 1, 0), (12, None)):
        kept = shuffled[:count].sort().values
        usual = None if moved is None else shuffled[moved : count + moved].sort().values
        yield kept, complement(kept, CHANNELS), usual


def check_mean(compensator: Compensator) -> None:
    """The mean is (C,) float32 and finite, the same every time, and both that it is made of stay unchanged."""
    for site in both_kinds():
        calibrated, probe = draw(site.channels), draw(site.channels, seed=1)
        given = calibrated.clone(), probe.clone() if compensator.uses_probe else None
        mean = compensator.mean(*given)
        expect_tensor(mean, compensator, "the mean", (site.channels,))
        expect_unchanged(compensator, "calibrated mean", calibrated, given[0])
        if given[1] is not None:
            expect_unchanged(compensator, "probe's mean", probe, given[1])
        expect(
            torch.equal(mean.clone(), compensator.mean(*given)), compensator, "gives another mean for the same input"
        )


def check_demands(compensator: Compensator) -> None:
    """What it says that it needs fits together: probe, covariance, memory."""
    memory, probing = compensator.memory, compensator.probes_with
    fits = memory is None or (type(memory) is int and memory > 0)
    expect(fits, compensator, f"must have a memory of at least one byte, or None, found {memory!r}")
    expect(isinstance(compensator.falls_back, bool), compensator, "must say by falls_back True or False")
    asks = compensator.uses_probe or compensator.needs_covariance
    expect(
        compensator.keeps_mean or not asks,
        compensator,
        "asks for a probe or a covariance although its keeps_mean is false: nothing would be given back",
    )
    if compensator.uses_probe:
        expect(
            isinstance(probing, ProbeSelector),
            compensator,
            f"looks at a probe (uses_probe), so probes_with must be a ProbeSelector for strategies that probe nothing; "
            f"found {probing!r}",
        )
    if isinstance(probing, ProbeSelector):
        check_selection(probing)


def check_stated_bytes(compensator: Compensator) -> None:
    """The bytes that it states are whole numbers, and its prepared part takes no more than stated."""
    held = compensator.held_bytes(CHANNELS)
    stated = [("held_bytes", held)]
    for dropped in (1, 12, CHANNELS):
        stated += [("working_bytes", compensator.working_bytes(CHANNELS, dropped, often)) for often in (False, True)]
    for what, size in stated:
        fits = type(size) is int and size >= 0
        expect(fits, compensator, f"must state {what} as an int of 0 or more, found {size!r}")
    if compensator.needs_covariance:
        prepared = compensator.prepare(some_covariance(), torch.arange(12))
        taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(prepared))
        expect(
            taken <= held * OVERSTATED,
            compensator,
            f"prepares {taken} bytes of {CHANNELS} channels, and says by held_bytes that they are {held}",
        )


def check_solve(compensator: Compensator) -> None:
    """The slope of a cut made once is (d, k), float32, finite, the same every time and at any scale."""
    if not compensator.needs_covariance:
        never = type(compensator).solve is Compensator.solve and type(compensator).slope is Compensator.slope
        expect(never, compensator, "has a slope although its needs_covariance is false: it would never be asked")
        return
    for kept, dropped, _ in some_cuts():

        def solved(covariance: Tensor, kept=kept, dropped=dropped) -> Slope:
            return compensator.solve(covariance, kept, dropped)

        _check_slope(compensator, "solve", solved, kept, dropped)


def check_slope(compensator: Compensator) -> None:
    """The slope of a batch's cut keeps the same rules, and leaves what was prepared as it is."""
    if not compensator.needs_covariance:
        return
    for kept, dropped, usual in some_cuts():
        try:
            compensator.prepare(some_covariance(), usual)
        except SpecError:
            expect(usual is None, compensator, "refuses to prepare although it is told the usual channels")
            continue

        def sloped(covariance: Tensor, kept=kept, dropped=dropped, usual=usual) -> Slope:
            return _sloped(compensator, compensator.prepare(covariance, usual), kept, dropped)

        _check_slope(compensator, "slope", sloped, kept, dropped)
        alike = bool(compensator.solve(some_covariance(), kept, dropped)) == bool(sloped(some_covariance()))
        expect(alike, compensator, "has a slope only for cuts made once, or only per batch; write solve and slope")


def _sloped(compensator: Compensator, prepared: Any, kept: Tensor, dropped: Tensor) -> Slope:
    """The slope, held against what was prepared before and after."""
    before = [tensor.clone() for tensor in tensors_in(prepared)]
    slope = compensator.slope(prepared, kept, dropped)
    for one, other in zip(before, tensors_in(prepared), strict=True):
        expect_unchanged(compensator, "prepared part", one, other)
    return slope


def _check_slope(
    compensator: Compensator, method: str, made: Callable[[Tensor], Slope], kept: Tensor, dropped: Tensor
) -> None:
    given = kept.clone(), dropped.clone()
    first = made(some_covariance())
    size = _largest(compensator, method, first, len(dropped), len(kept))
    expect_unchanged(compensator, "kept channels", given[0], kept)
    expect_unchanged(compensator, "dropped channels", given[1], dropped)
    again = made(some_covariance())
    same = len(first) == len(again) and all(torch.equal(*both) for both in zip(first, again, strict=False))
    expect(same, compensator, f"gives another slope ({method}) for the same input; seed what draws at random")
    for scale in (1e-6, 1e6):
        found = _largest(compensator, method, made(some_covariance(scale)), len(dropped), len(kept))
        blown = f"blows up: {method} of a covariance times {scale:g} has {found:.3g} in it, instead of {size:.3g}"
        expect(found <= BLOWN_UP * max(size, 1), compensator, blown)
    for covariance in (some_covariance(constant=True), torch.zeros(CHANNELS, CHANNELS)):
        try:
            slope = made(covariance)
        except torch.linalg.LinAlgError:
            continue  # that it cannot be solved is an answer, too: the run then names the site
        _largest(compensator, method, slope, len(dropped), len(kept))


def _largest(compensator: Compensator, method: str, slope: Slope, dropped: int, kept: int) -> float:
    """The largest number in the product of the slope's matrices, which must be (d, k); 0 where there are none."""
    what = f"the slope ({method})"
    expect(isinstance(slope, tuple), compensator, f"must return {what} as a tuple of matrices, found {slope!r}")
    inner = dropped
    for number, factor in enumerate(slope, 1):
        flat = isinstance(factor, Tensor) and factor.dim() == 2
        width = kept if number == len(slope) else (factor.shape[1] if flat else 0)
        expect_tensor(factor, compensator, f"matrix {number} of {what}", (inner, width))
        inner = width
    if not slope:
        return 0.0
    return float(reduce(torch.matmul, slope).abs().max())


COMPENSATOR_CHECKS = [check_demands, check_mean, check_solve, check_slope, check_stated_bytes]
"""Each a function of one component."""
