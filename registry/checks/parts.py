"""The checks of each role, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..component import Component
from ..errors import SpecError
from ..roles.gradients import GradientScorer, GroupPart, MatrixGradient
from ..roles.parts import (
    Architecture,
    HistoryMerger,
    MaskApplier,
    ProbeSelector,
    Scorer,
    Selection,
    SiteScores,
    SparsityAllocator,
    missing_argument,
)
from ..sites import Producer, Rows, Site, SiteKind
from ..tensors.blocks import BlockStatistic
from ..tensors.statistics import ChannelHistory, ExpertStatistic, Statistic
from ..tensors.weights import LayerWeight, WeightStatistic

UNITS, UNIT_SIZE = 6, 4


def expect(condition: bool, component: Any, message: str) -> None:
    """Raise :class:`AssertionError` naming the component unless ``condition`` holds."""
    if not condition:
        name = component.__name__ if isinstance(component, type) else type(component).__name__
        raise AssertionError(f"{name} {message}")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_site(kind: SiteKind, layer: int = 0) -> Site:
    """A site of 24 channels: six heads of four, or 24 MLP channels."""
    units, size = (UNITS, UNIT_SIZE) if kind == "attention" else (UNITS * UNIT_SIZE, 1)
    producer = Producer("up", (Rows(0, size),))
    return Site(layer, kind, "norm", kind, (producer,), "down", units, size, unit_parameters=40 * size, outputs=20)


def both_kinds() -> tuple[Site, Site]:
    """A site of either kind."""
    return some_site("attention"), some_site("mlp")


def expect_tensor(
    value: Any, component: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """``value``, which must be a finite tensor of this shape and dtype."""
    expect(isinstance(value, Tensor), component, f"must return {what} as a tensor, found {value!r}")
    found = f"found {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    wanted = f"{str(dtype).removeprefix('torch.')} {shape}"
    expect(value.shape == shape and value.dtype == dtype, component, f"must return {what} as {wanted}, {found}")
    expect(bool(value.isfinite().all()), component, f"returns {what} with NaN or infinity for finite input")
    return value


def expect_unchanged(component: Any, what: str, before: Tensor, after: Tensor) -> None:
    expect(torch.equal(before, after), component, f"changes the {what} it was given")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def check_arguments(part: Scorer | SparsityAllocator) -> None:
    """Its methods take what it asks for."""
    wrong = missing_argument(part)
    expect(wrong is None, part, f"asks for more than it takes: {wrong}")


def check_scores(scorer: Scorer) -> None:
    """Channel scores are (C,) float32 and finite, unit scores (U,), the same every time."""
    for site in both_kinds():
        for given in _shown(scorer, site):
            weight = draw(20, site.channels)
            prepared = _prepared(scorer, weight, site)
            expect_unchanged(scorer, "weight", draw(20, site.channels), weight)
            before = [tensor.clone() for tensor in tensors_in(given)]
            scores = scorer.score(prepared, given)
            expect_tensor(scores, scorer, "channel scores", (site.channels,))
            for old, new in zip(before, tensors_in(given), strict=True):
                expect_unchanged(scorer, "statistic", old, new)
            first = scores.clone()
            expect(torch.equal(first, scorer.score(prepared, given)), scorer, "scores the same input differently")
            units = scorer.unit_scores(scores, site.unit_size)
            expect_tensor(units, scorer, "unit scores", (site.units,))


def _prepared(scorer: Scorer, weight: Tensor, site: Site, inputs: int = 16) -> Any:
    """What the scorer prepares, from the producers' weights, too, where it asks for them."""
    prepare: Any = scorer.prepare
    if not scorer.uses_producers:
        return prepare(weight, site)
    given = [draw(site.channels, inputs, seed=seed) for seed, _ in enumerate(site.producers, start=3)]
    prepared = prepare(weight, site, [producer.clone() for producer in given])
    again = prepare(weight, site, given)
    for seed, producer in enumerate(given, start=3):
        expect_unchanged(scorer, "producers' weights", draw(site.channels, inputs, seed=seed), producer)
    same = [torch.equal(a, b) for a, b in zip(tensors_in(prepared), tensors_in(again), strict=True)]
    expect(all(same), scorer, "prepares the same weights differently")
    return prepared


def _shown(scorer: Scorer, site: Site) -> list[Any]:
    """What ``score`` may get: a statistic, reduced gradients, or None."""
    if isinstance(scorer, GradientScorer):
        return [some_parts(scorer, site, scale) for scale in (1.0, 0.0)]
    if scorer.statistic is None:
        return [None]
    return [draw(site.channels, seed=1).square(), torch.zeros(site.channels)]


def some_matrices(scorer: GradientScorer, site: Site, scale: float = 1.0, seed: int = 0) -> list[MatrixGradient]:
    """Two producers and a consumer; at attention the second producer has half as many rows, as under grouped-query
    attention."""
    found = []
    for place, rows in enumerate((site.channels, max(site.units, site.channels // 2), site.channels)):
        gradient = scale * draw(rows, 20, seed=seed + place)
        squares = gradient.square() if scorer.needs_squares else None
        weight = draw(rows, 20, seed=seed + place + 5)
        found.append(MatrixGradient(("query", "key", "output")[place], weight, gradient, squares, reads=place == 2))
    return found


def some_parts(scorer: GradientScorer, site: Site, scale: float = 1.0) -> tuple[GroupPart, ...]:
    """What the scorer makes of :func:`some_matrices`."""
    found = []
    for matrix in some_matrices(scorer, site, scale):
        rows = matrix.weight.shape[0]
        values = expect_tensor(scorer.reduce(matrix), scorer, "the reduction", (rows,))
        found.append(GroupPart(matrix.path, values.view(site.units, -1), rows // site.units * 20, matrix.reads))
    return tuple(found)


def check_score_cost(scorer: Scorer) -> None:
    """A decision costs O(C): the prepared part does not grow with the number of outputs."""
    sizes = []
    for outputs in (20, 80):
        prepared = _prepared(scorer, draw(outputs, UNITS * UNIT_SIZE), some_site("mlp"), inputs=outputs)
        sizes.append(sum(tensor.numel() for tensor in tensors_in(prepared)))
    expect(
        sizes[0] == sizes[1],
        scorer,
        "prepares something as large as the weight, so that every decision costs O(O x C); reduce over outputs first",
    )


def check_statistic(scorer: Scorer) -> None:
    """Its statistic, if any, keeps float32 tables per position and ignores padding."""
    statistic = scorer.statistic
    if statistic is None:
        return
    expect(isinstance(statistic, Statistic), scorer, f"must have a Statistic or None, found {statistic!r}")
    if isinstance(statistic, ExpertStatistic):
        check_expert_statistic(statistic)
        return
    history = ChannelHistory(3, torch.device("cpu"))
    for seed, dtype in enumerate((torch.float32, torch.float16)):
        statistic.observe(history, draw(4, 5, 3, seed=seed).to(dtype), None)
    expect_tensor(history.table, statistic, "history", (5, 3))
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    x = draw(2, 5, 3)
    measured = statistic.measure(x, valid, history.mean)
    expect_tensor(measured, statistic, "measure", (5, 3))
    expect(bool((measured >= 0).all()), statistic, "measures something negative")
    again = statistic.measure(x.masked_fill(~valid[..., None], 1e4), valid, history.mean)
    expect(torch.equal(measured, again), statistic, "looks at padded tokens")


def check_expert_statistic(statistic: ExpertStatistic) -> None:
    """It values every expert by its own column alone, and a text in two batches gives what it gives in one."""
    x = torch.stack([draw(12, 3, seed=1).abs(), draw(12, 3, seed=2).square()], 1)
    x[torch.arange(12), :, torch.arange(12) % 3] = 0  # a token does not reach every expert
    whole, parts = (ChannelHistory(3, torch.device("cpu")) for _ in range(2))
    statistic.observe(whole, x, None)
    for part in x.split(5):
        statistic.observe(parts, part, None)
    found = expect_tensor(statistic.summed(whole), statistic, "summed", (3,))
    same = torch.allclose(found, statistic.summed(parts), rtol=1e-4, atol=1e-6)
    expect(same, statistic, "gives something else where a text is read in two batches")
    turned = ChannelHistory(3, torch.device("cpu"))
    statistic.observe(turned, x.flip(2), None)
    same = torch.allclose(found, statistic.summed(turned).flip(0), rtol=1e-4, atol=1e-6)
    expect(same, statistic, "values an expert by its number or by other experts: turned around, they get other values")


def padding_masks(batch: int, length: int) -> Iterator[Tensor | None]:
    """No padding, right, left, and all tokens but one."""
    yield None
    lengths = torch.arange(batch)[:, None] % length + 1
    places = torch.arange(length)
    yield places < lengths
    yield places >= length - lengths
    lonely = torch.zeros(batch, length, dtype=torch.bool)
    lonely[-1, -1] = True
    yield lonely


def check_selection(selector: ProbeSelector) -> None:
    """Rows and positions are int64, ascending, unique, in range and not empty, for batches of any shape."""
    for batch, length in ((1, 1), (1, 2), (2, 1), (1, 30), (3, 7), (20, 64)):
        for valid in padding_masks(batch, length):
            states = draw(batch, length, 8)
            chosen = selector.select(states, valid, torch.Generator().manual_seed(1))
            expect(isinstance(chosen, tuple) and len(chosen) == 2, selector, "must return (rows, positions)")
            for what, indices, count in (("rows", chosen[0], batch), ("positions", chosen[1], length)):
                where = f"of a batch of {batch} x {length}"
                by_row = what == "positions" and isinstance(indices, Tensor) and indices.dim() == 2
                shape = (len(chosen[0]), indices.shape[1]) if by_row else (indices.numel(),)
                expect_tensor(indices, selector, what, shape, torch.int64)
                inside = indices.numel() > 0 and int(indices.min()) >= 0 and int(indices.max()) < count
                expect(inside, selector, f"picks {what} {indices.tolist()} {where}")
                ascending = bool((indices.diff() > 0).all())
                expect(ascending, selector, f"must pick ascending, unique {what}, found {indices.tolist()} {where}")
            expect_unchanged(selector, "states", draw(batch, length, 8), states)
            again = selector.select(states, valid, torch.Generator().manual_seed(1))
            same = all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
            expect(same, selector, "picks differently with the same generator; draw from the one it is given")


def check_merge(merger: HistoryMerger) -> None:
    """The merged statistic is (t, C), float32, finite and not negative, and its inputs are unchanged."""
    for site in both_kinds():
        for scale in (1.0, 0.0, 1e-12, 1e12):
            probe, history = draw(5, 24).square() * scale, draw(5, 24, seed=1).square() * scale
            seen = (probe.clone() if merger.uses_probe else None, history.clone() if merger.uses_history else None)
            merged = merger.merge(*seen, site)
            expect_tensor(merged, merger, "the merged statistic", (5, 24))
            expect(bool((merged >= 0).all()), merger, "merges two statistics into something negative")
            for what, before, after in (("probe", probe, seen[0]), ("history", history, seen[1])):
                if after is not None:
                    expect_unchanged(merger, what, before, after)


def check_update(merger: HistoryMerger) -> None:
    """The updated history is (T, c), and there is one exactly if ``updates`` is true."""
    history, observed = draw(5, 10).square(), draw(5, 10, seed=1).square()
    updated = merger.update(history.clone(), observed.clone())
    if merger.updates:
        updated = expect_tensor(updated, merger, "the updated history", (5, 10))
        expect(not torch.equal(updated, history), merger, "has updates true, and leaves history as it was")
    else:
        unchanged = updated is None or torch.equal(updated, history)
        expect(unchanged, merger, "updates history although its property updates is false: it would never be called")


def check_application(applier: MaskApplier) -> None:
    """Producers and consumer cut alike: together they compute what the kept channels contribute."""
    weight, bias, consumer, x = draw(24, 16), draw(24, seed=1), draw(20, 24, seed=2), draw(16, seed=3)
    kept = torch.tensor([0, 3, 4, 11, 23])
    expected = consumer[:, kept] @ (weight @ x + bias)[kept]
    rows, row_bias = (_copied(part) for part in applier.producer(weight, bias, kept))
    columns = _copied(applier.consumer(consumer, kept))
    width = len(kept) if applier.resizes else 24
    rows = expect_tensor(rows, applier, "the producer's weight", (width, 16))
    row_bias = expect_tensor(row_bias, applier, "the producer's bias", (width,))
    columns = expect_tensor(columns, applier, "the consumer's weight", (20, width))
    same = torch.allclose(columns @ (rows @ x + row_bias), expected, rtol=1e-4, atol=1e-5)
    expect(same, applier, "computes something else than the kept channels' contribution")
    expect(applier.producer(weight, None, kept)[1] is None, applier, "makes a bias where the producer has none")
    expect_unchanged(applier, "weight", draw(24, 16), weight)
    expect_unchanged(applier, "weight", draw(20, 24, seed=2), consumer)


def _copied(part: Tensor | Selection | None) -> Tensor | None:
    return part.copied() if isinstance(part, Selection) else part


def check_allocation(allocator: SparsityAllocator) -> None:
    """Counts are whole numbers of the site's units; ratio 0 keeps all, and a larger ratio never keeps more.

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
        _check_counts(allocator, [_calibrated(scores, seed) for seed, scores in enumerate(plain)])
    if not allocator.needs_scores:
        _check_counts(allocator, plain)


def _check_counts(allocator: SparsityAllocator, scores: list[SiteScores]) -> None:
    sites, most, before = [each.site for each in scores], math.inf, [each.site.units for each in scores]
    allocate: Any = allocator.allocate
    extra = [_MadeUpLosses(sites)] if allocator.measures else []
    for ratio in (0.0, 0.1, 0.2, 0.4, 0.5, 0.9, 0.99) if allocator.takes_ratio else (0.0,):
        try:
            counts = allocate(scores, ratio, *extra)
        except SpecError:
            expect(ratio > 0.5, allocator, f"refuses ratio {ratio}")
            continue
        expect(len(counts) == len(sites), allocator, f"gives {len(counts)} counts for {len(sites)} sites")
        for site, count in zip(sites, counts, strict=True):
            fits = isinstance(count, int) and 0 <= count <= site.units
            expect(fits, allocator, f"keeps {count!r} of {site.units} units at ratio {ratio}")
            in_part = allocator.whole_blocks and count not in (0, site.units)
            expect(not in_part, allocator, f"has whole_blocks true, and keeps {count!r} of {site.units} units")
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


def check_model_types(architecture: Architecture) -> None:
    """It names the model types that it serves."""
    types = architecture.model_types
    expect(bool(types) and all(isinstance(t, str) for t in types), architecture, "names no config.model_type")


ROLE_CHECKS: dict[type[Component], list[Callable]] = {
    Scorer: [check_arguments, check_scores, check_score_cost, check_statistic],
    ProbeSelector: [check_selection],
    HistoryMerger: [check_merge, check_update],
    MaskApplier: [check_application],
    SparsityAllocator: [check_arguments, check_allocation, check_block_statistic, check_weight_statistic],
    Architecture: [check_model_types],
}
"""Role -> its checks, each a function of one component."""
