"""The checks of allocators, on made-up sites; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..roles.parts import SiteScores, SparsityAllocator
from ..sites import Site
from ..tensors.blocks import BlockStatistic
from ..tensors.weights import LayerWeight, WeightStatistic
from .parts import draw, expect, expect_tensor, expect_unchanged, some_site

RATIOS = (0.0, 0.1, 0.2, 0.4, 0.5, 0.9, 0.99)


def check_allocation(allocator: SparsityAllocator) -> None:
    """Counts are whole numbers of the site's units, the same every time; ratio 0 keeps all, a larger one never more.

    Scores stay unchanged.
    With ``whole_blocks`` every count is 0 or all units; with ``nested`` no site keeps more at a larger ratio. An
    allocator may raise :class:`SpecError` for a ratio above one half. One that measures gets made-up losses.
    """
    expect(
        not (allocator.whole_blocks and (allocator.needs_scores or allocator.uses_scores)),
        allocator,
        "has whole_blocks true, where no site is calibrated for scores: needs_scores and uses_scores must be false",
    )
    expect(
        allocator.needs_scores or allocator.whole_blocks or not allocator.measures,
        allocator,
        "measures, so its needs_scores must be true: units are cut by their scores",
    )
    for scores in _some_scores(allocator):
        _check_counts(allocator, scores)


def _some_scores(allocator: SparsityAllocator) -> Iterator[list[SiteScores]]:
    """What the allocator may get: sites with calibrated scores, without, or both."""
    layers = range(8 if allocator.whole_blocks else 2)  # of whole blocks the first and last ones may have to stay
    sites = [some_site(kind, layer) for layer in layers for kind in ("attention", "mlp")]
    plain = [SiteScores(site) for site in sites]
    if allocator.weight_statistic is not None:
        plain = [replace(s, weight_statistic=2.0 + s.site.layer) for s in plain]
    if allocator.block_statistic is not None:
        plain = [
            replace(s, block_statistic=0.1 + 0.2 * n, layer_statistic=0.4 / (1 + s.site.layer))
            for n, s in enumerate(plain)
        ]
    if allocator.needs_scores or allocator.uses_scores:
        yield [_calibrated(scores, seed) for seed, scores in enumerate(plain)]
    if not allocator.needs_scores:
        yield plain


def _check_counts(allocator: SparsityAllocator, scores: list[SiteScores]) -> None:
    sites, most, before = [each.site for each in scores], math.inf, [each.site.units for each in scores]
    for ratio in RATIOS if allocator.takes_ratio else RATIOS[:1]:
        counts = _allocated(allocator, scores, ratio)
        if counts is None:
            expect(ratio > 0.5, allocator, f"refuses ratio {ratio}")
            continue
        expect(len(counts) == len(sites), allocator, f"gives {len(counts)} counts for {len(sites)} sites")
        for site, count in zip(sites, counts, strict=True):
            fits = isinstance(count, int) and 0 <= count <= site.units
            expect(fits, allocator, f"keeps {count!r} of {site.units} units at ratio {ratio}")
            in_part = allocator.whole_blocks and count not in (0, site.units)
            expect(not in_part, allocator, f"has whole_blocks true, and keeps {count!r} of {site.units} units")
        again = _allocated(allocator, scores, ratio)
        expect(counts == again, allocator, f"gives {counts} and then {again} for the same sites; draw with a seed")
        if ratio == 0 and allocator.takes_ratio:
            expect(counts == [site.units for site in sites], allocator, f"keeps {counts} where nothing is to be cut")
        kept = sum(count * site.unit_parameters for site, count in zip(sites, counts, strict=True))
        expect(kept <= most, allocator, f"keeps more at ratio {ratio} than at a smaller one")
        most = kept
        grown = [site.label for site, old, new in zip(sites, before, counts, strict=True) if new > old]
        expect(
            not (allocator.nested and grown),
            allocator,
            f"has nested true, and keeps more of {grown[:1]} at ratio {ratio} than at a smaller one",
        )
        before = counts


def check_budget(allocator: SparsityAllocator) -> None:
    """The sites lose the ratio of all parameters, or of all units, within one unit a site.

    Sites of groups in ``spares`` do not count. With ``granularity`` it is so many units. None is empty up to a ratio
    of one half, except with ``whole_blocks``.
    """
    for scores in _some_scores(allocator) if allocator.takes_ratio else []:
        sites = [each.site for each in scores if each.site.group not in allocator.spares]
        for ratio in RATIOS:
            counts = _allocated(allocator, scores, ratio)
            if counts is None:
                continue
            counts = [c for each, c in zip(scores, counts, strict=True) if each.site.group not in allocator.spares]
            lost = [site.units - count for site, count in zip(sites, counts, strict=True)]
            steps = [min(site.units, allocator.granularity(site)) for site in sites]
            misses = []
            for sizes in ([site.unit_parameters for site in sites], [1] * len(sites)):
                whole, cut, slack = (
                    sum(size * number for size, number in zip(sizes, numbers, strict=True))
                    for numbers in ([site.units for site in sites], lost, steps)
                )
                misses.append((abs(cut - ratio * whole) / slack, cut / whole))
            miss, share = min(misses)
            expect(
                miss <= 1 + 1e-6,
                allocator,
                f"is to cut {ratio} and cuts {share:.3g}: more than one unit a site apart; refuse a ratio that is out "
                "of reach with SpecError, and override granularity where units go several at a time",
            )
            empty = [site.label for site, count in zip(sites, counts, strict=True) if not count]
            expect(
                ratio > 0.5 or allocator.whole_blocks or not empty,
                allocator,
                f"keeps no unit of {', '.join(empty)} at ratio {ratio}; without whole_blocks every site keeps one",
            )


def _allocated(allocator: SparsityAllocator, scores: list[SiteScores], ratio: float) -> list[int] | None:
    """The counts; None where the allocator refuses the ratio. The scores must stay what they are."""
    allocate: Any = allocator.allocate
    extra = [_MadeUpLosses([each.site for each in scores])] if allocator.measures else []
    before = [(each.channels.clone(), each.units.clone()) for each in scores]
    try:
        return allocate(scores, ratio, *extra)
    except SpecError:
        return None
    finally:
        for each, (channels, units) in zip(scores, before, strict=True):
            expect_unchanged(allocator, "scores", channels, each.channels)
            expect_unchanged(allocator, "scores", units, each.units)


class _MadeUpLosses:
    """Losses of cuts that hurt most in the first layer, and more than in proportion."""

    def __init__(self, sites: Sequence[Site]):
        self._sites = sites

    def __call__(self, candidates: Sequence[Sequence[int]], tokens: int, **how: Any) -> list[float]:
        return [2 + sum(map(self._share, self._sites, counts)) for counts in candidates]

    @staticmethod
    def _share(site: Site, count: int) -> float:
        return (1 - count / site.units) ** 2 / (1 + site.layer)

    @staticmethod
    def record(**entry: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def progress(items: Iterable, label: str, total: int) -> Iterable:
        return items


def _calibrated(plain: SiteScores, seed: int) -> SiteScores:
    channels = draw(plain.site.channels, seed=seed).square()
    return replace(plain, channels=channels, units=channels.view(plain.site.units, -1).sum(1))


def check_block_statistic(allocator: SparsityAllocator) -> None:
    """Its block statistic, if any, is (N,) float32 and looks at each token alone."""
    statistic = allocator.block_statistic
    if statistic is None:
        return
    expect(isinstance(statistic, BlockStatistic), allocator, f"must have a BlockStatistic or None, found {statistic!r}")
    entering, leaving = draw(6, 16), draw(6, 16, seed=1)
    found = statistic.measure(entering, leaving)
    found = expect_tensor(found, statistic, "the statistic of tokens", (6,)).clone()
    expect_unchanged(statistic, "residual stream", draw(6, 16), entering)
    expect_unchanged(statistic, "residual stream", draw(6, 16, seed=1), leaving)
    alone = statistic.measure(entering[:2], leaving[:2])
    expect(torch.allclose(alone, found[:2], atol=1e-6), statistic, "depends on other tokens")


def check_weight_statistic(allocator: SparsityAllocator) -> None:
    """Its weight statistic, if any, is a finite number, the same every time, and leaves the weights unchanged."""
    statistic = allocator.weight_statistic
    if statistic is None:
        return
    expect(
        isinstance(statistic, WeightStatistic), allocator, f"must have a WeightStatistic or None, found {statistic!r}"
    )
    shapes = {"mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    for scale in (1.0, 0.0):
        weights = {path: draw(*shape, seed=seed) * scale for seed, (path, shape) in enumerate(shapes.items())}
        norms = {path: draw(shape[1], seed=9).abs() for path, shape in shapes.items()}
        given = [
            LayerWeight(path, partial(Tensor.float, weight), *([norms[path]] if statistic.uses_inputs else []))
            for path, weight in weights.items()
        ]
        found = statistic.measure(given)
        fits = isinstance(found, (int, float)) and math.isfinite(found)
        expect(fits, statistic, f"must measure a layer as a finite number, found {found!r}")
        expect(found == statistic.measure(given), statistic, "measures the same weights differently")
        for seed, (path, shape) in enumerate(shapes.items()):
            expect_unchanged(statistic, "weights", draw(*shape, seed=seed) * scale, weights[path])
        if statistic.uses_inputs:
            for path, shape in shapes.items():
                expect_unchanged(statistic, "norms", draw(shape[1], seed=9).abs(), norms[path])
