"""What a pruned decoder costs, and the search for the ratio that gives the cost asked for.

The cost is counted, not measured: parameters of the linear layers of all decoder layers, skipped ones included; or the
operations of these layers and of the attention scores, for a token of a prefill of T positions. The output layer and
the embeddings are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from ...evaluators.cost import linears_of_block, tensors_of_units, weights_of_block, weights_of_unit
from ...registry import Site, SiteKind, SpecError, expert_linears
from ...registry.tensors.linears import is_linear, sizes_of
from ..output.formatting import share
from ..output.records import MatchFacts, What

NEAR = 0.005
"""How far the cost may be from what was asked, as a share of the dense decoder's."""

STEPS = 1_000_000
"""Ratios are tried in steps of one millionth."""

Counts = Mapping[tuple[int, SiteKind], int]
"""Kept units by layer and kind; sites of skipped layers are not among them."""


@dataclass(frozen=True)
class Match:
    """What a decoder is to cost: the share ``1 - ratio`` of the dense decoder's parameters or operations."""

    what: What
    length: int = 0
    """Positions T of the prefill whose operations count."""
    batch_size: int = 0
    """Rows B of the batch whose probe counts."""
    added: float = 0.0
    """Operations of a probe and of compensation per batch, as a share of the dense decoder's."""

    def found(self, cost: DecoderCost, counts: Counts, ratio: float) -> MatchFacts:
        """How near ``counts``, those of ``ratio``, come."""
        batch = {} if self.what == "parameters" else {"length": self.length, "batch_size": self.batch_size}
        kept = 1 - cost.lost(counts) + self.added
        return MatchFacts(what=self.what, ratio=ratio, cost=round(kept, 6), added=round(self.added, 6), **batch)


@dataclass(frozen=True)
class DecoderCost:
    """What the dense decoder costs, and each unit of its sites."""

    dense: float
    units: Mapping[tuple[int, SiteKind], tuple[int, float, float]]
    """Number of units of a site, the cost of one, and of the whole block: more where biases or heads are shared."""

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[nn.Module], sites: Sequence[Site], match: Match) -> DecoderCost:
        """The cost that ``match`` counts; ``sites`` are all of the model."""
        layers = list(layers)
        linears: list[Any] = [m for layer in layers for m in layer.modules() if is_linear(m)]
        of_experts = {place: expert_linears(layer) for place, layer in enumerate(layers)}
        linears += [linear for each in of_experts.values() for linear in each]
        weights: float = sum(prod(sizes_of(linear)) for linear in linears)
        if match.what == "parameters":
            biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)
            biases += sum(tensor.numel() for site in sites for tensor in tensors_of_units(model, site))
            units = {(s.layer, s.kind): (s.units, float(s.unit_parameters), _parameters(model, s)) for s in sites}
            return cls(float(weights + biases), units)
        scores = {(site.layer, site.kind): 4 * match.length * (site.kind == "attention") for site in sites}
        reached = {site.layer: site.reached for site in sites if site.routed}
        for place, each in of_experts.items():  # a token reaches only some of them
            if each and place not in reached:
                raise SpecError(
                    "match: how many operations the routed experts take is not known where they are left out (experts: "
                    "keep); match parameters instead"
                )
            weights -= sum(linear.weight.numel() for linear in each) * (1 - reached.get(place, 0))
        dense = 2 * weights + sum(scores[site.layer, site.kind] * site.channels for site in sites)
        found = {}
        for s in sites:
            of_scores = scores[s.layer, s.kind]
            unit = 2 * s.reached * weights_of_unit(model, s) + of_scores * s.unit_size
            block = 2 * s.reached * weights_of_block(model, s) + of_scores * s.channels
            found[s.layer, s.kind] = s.units, float(unit), float(block)
        return cls(float(dense), found)

    def lost(self, counts: Counts) -> float:
        """The share of the dense cost that goes with the units that are not among ``counts``."""
        units = ((*self.units[place], count) for place, count in counts.items())
        return sum((total - kept) * each if kept else block for total, each, block, kept in units) / self.dense


def _parameters(model: Any, site: Site) -> float:
    """Parameters of the linear layers of a whole block, and of its other tensors with entries of units."""
    if site.router is not None:
        return float(site.units * site.unit_parameters)
    tensors = [p for linear in linears_of_block(model, site) for p in linear.parameters()]
    return float(sum(tensor.numel() for tensor in (*tensors, *tensors_of_units(model, site))))


def nearest(match: Match, cost: DecoderCost, counts_at: Callable[[float], Counts], asked: float) -> MatchFacts:
    """The ratio whose counts cost nearest to ``1 - asked``, by bisection; ``asked`` itself where none is nearer,
    or where it is ten times as near as it must be.

    ``counts_at`` raises :class:`SpecError` for a ratio that is out of reach. So does this, where no ratio is in reach.
    """
    tried: list[MatchFacts] = []

    def is_too_small(ratio: float) -> bool:
        try:
            tried.append(match.found(cost, counts_at(ratio), ratio))
        except SpecError:
            return False
        return tried[-1].cost > 1 - asked

    is_too_small(asked)
    if tried and abs(tried[0].cost - (1 - asked)) <= NEAR / 10:
        return tried[0]  # allocators that count parameters, of which some measure the model for every ratio
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_too_small(middle / STEPS) else (low, middle)
    if not tried:
        counts_at(asked)
    return min(tried, key=lambda found: (abs(found.cost - (1 - asked)), abs(found.ratio - asked)))


def check_reachable(cost: DecoderCost, sites: Sequence[Site], asked: float, left: str) -> None:
    """Raise :class:`SpecError`, before anything is computed, for more parameters than ``sites`` have.

    They are those of layers that are not skipped. ``left``: what large part of the layers no site cuts.
    """
    most = cost.lost({(site.layer, site.kind): site.least for site in sites})
    if asked > most + NEAR:
        why = f"; left whole: {left}" if left else ""
        raise SpecError(
            f"match: a ratio of {asked:g} of the decoder's parameters is out of reach: {100 * most:.1f}% of them are "
            f"in blocks that can be cut{why}. Ask for less, or skip fewer layers"
        )


def is_near(found: MatchFacts, asked: float) -> bool:
    """Whether the cost is what was asked, within :data:`NEAR`."""
    return abs(found.cost - (1 - asked)) <= NEAR


def unmatched(name: str, found: MatchFacts, asked: float) -> SpecError:
    """The error for a strategy that cannot cost what was asked."""
    probe = f", {share(found.added)} of it for probe and compensation" if found.added else ""
    return SpecError(
        f"match: {name} at ratio {asked:g} cannot be matched: its decoder is to cost {share(1 - asked)} of the dense "
        f"decoder's {found.counted}, and the nearest is {100 * found.cost:.1f}%{probe} (at a ratio of "
        f"{found.ratio:.4g}); within {share(NEAR)} counts as equal. Choose another ratio, "
        "fewer skip_layers, or smaller units; or leave this strategy out"
    )
