"""The checks of scorers, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..roles.fitting import FittedScorer
from ..roles.gradients import GradientScorer, GroupPart, MatrixGradient
from ..roles.parts import Scorer, SparsityAllocator, missing_argument
from ..sites import Site
from .fitting import fitted_at
from .parts import (
    UNIT_SIZE,
    UNITS,
    alike,
    both_kinds,
    draw,
    expect,
    expect_tensor,
    expect_unchanged,
    reordered,
    some_site,
    tensors_in,
)


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


def check_channel_order(scorer: Scorer) -> None:
    """The score of a channel or unit follows it to another place: it does not depend on numbers, or on other sites."""
    for site in both_kinds():
        units, channels = reordered(site)
        given, weight = _shown(scorer, site)[0], draw(20, site.channels)
        scores = scorer.score(_prepared(scorer, weight, site), given)
        scores = expect_tensor(scores, scorer, "channel scores", (site.channels,)).clone()
        turned = scorer.score(_prepared(scorer, weight[:, channels], site, order=channels), _turned(given, site))
        expect(
            alike(turned, scores[channels]),
            scorer,
            "scores by the number of a channel, or by weights that it remembers: where channels are in another order, "
            "they get other scores",
        )
        of_units = scorer.unit_scores(scores, site.unit_size).clone()
        expect(
            alike(scorer.unit_scores(scores[channels], site.unit_size), of_units[units]),
            scorer,
            "scores by the number of a unit or of a channel in it: where they are in another order, units get other "
            "scores; view(-1, unit_size) has a row for each unit",
        )


def _turned(given: Any, site: Site) -> Any:
    """What ``score`` gets where units and channels are in the order of :func:`reordered`."""
    units, channels = reordered(site)
    if isinstance(given, tuple):
        return tuple(replace(part, values=part.values[units]) for part in given)
    return None if given is None else given[channels]


def _prepared(scorer: Scorer, weight: Tensor, site: Site, inputs: int = 16, order: Tensor | None = None) -> Any:
    """What the scorer prepares, from the producers' weights, too, where it asks for them, with rows in this order."""
    prepare: Any = scorer.prepare
    if isinstance(scorer, FittedScorer):
        prepare = partial(prepare, fitted=fitted_at(scorer, site, order))
    if not scorer.uses_producers:
        return prepare(weight, site)
    rows = slice(None) if order is None else order
    given = [draw(site.channels, inputs, seed=seed)[rows] for seed, _ in enumerate(site.producers, start=3)]
    prepared = prepare(weight, site, [producer.clone() for producer in given])
    again = prepare(weight, site, given)
    for seed, producer in enumerate(given, start=3):
        expect_unchanged(scorer, "producers' weights", draw(site.channels, inputs, seed=seed)[rows], producer)
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
