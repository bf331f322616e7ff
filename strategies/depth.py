"""Depth pruning: whole decoder layers, or whole attentions and MLPs, go; the others stay as they are.

The ratio is a share of the parameters of all units. Blocks are put in an order that does not depend on the ratio, and
as many of the first ones go as come nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..registry import (
    MEASURED_LENGTH,
    BlockInfluence,
    BlockStatistic,
    Evaluate,
    MaskApplier,
    Scorer,
    SiteScores,
    SparsityAllocator,
    SpecError,
    Strategy,
    hookimpl,
)
from .application import Slice
from .budget import not_finite
from .magnitude import MagnitudeScorer

Block = tuple[int, ...]
"""Places of the sites that are removed together, in the allocator's order: one site, or all sites of a layer."""


class DepthAllocator(SparsityAllocator):
    """An allocator that removes whole blocks."""

    whole_blocks: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    keep_first: int = Field(default=0, ge=0, description="layers at the beginning that stay in any case")
    keep_last: int = Field(default=0, ge=0, description="layers at the end that stay in any case")

    def _removable(self, sites: Sequence[SiteScores], by_site: bool) -> list[Block]:
        """The blocks that may go: sites, or the sites of a layer together."""
        layers = sorted({scores.site.layer for scores in sites})
        inside = layers[self.keep_first : max(0, len(layers) - self.keep_last)]
        places = [[place for place, each in enumerate(sites) if each.site.layer == layer] for layer in inside]
        return [(place,) for layer in places for place in layer] if by_site else [tuple(layer) for layer in places]

    def _without(self, sites: Sequence[SiteScores], ratio: float, order: Iterator[Block]) -> list[int]:
        """Kept units of every site without as many of the first blocks in ``order`` as come nearest to the ratio."""
        sizes = [scores.site.units * scores.site.unit_parameters for scores in sites]
        counts, left = [scores.site.units for scores in sites], ratio * sum(sizes)
        while left > 0:
            block = next(order, None)
            size = 0 if block is None else sum(sizes[place] for place in block)
            if block is None:
                raise SpecError(
                    f"allocator {self.name}: a ratio of {ratio:.4g} of these layers' parameters is out of reach with "
                    f"keep_first: {self.keep_first} and keep_last: {self.keep_last}; lower the ratio or these"
                )
            if size - left >= left:  # nearer without it
                break
            for place in block:
                counts[place] = 0
            left -= size
        return counts


class LowestInfluence(DepthAllocator):
    """Removes the layers that turn the residual stream least, all at once."""

    paper: ClassVar[str] = "ShortGPT (Men et al., Findings of ACL 2025), arXiv 2403.03853"
    name: Literal["lowest_influence"] = "lowest_influence"

    @property
    def block_statistic(self) -> BlockStatistic | None:
        return BlockInfluence()

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """Kept units of every site; raises :class:`SpecError` if the removable layers are too few for the ratio."""

        def influence(block: Block) -> float:
            first = sites[block[0]]
            # A layer with one site may have another mixer, which stays: the site's own influence is what goes.
            return first.block_statistic if len(block) == 1 else first.layer_statistic

        return self._without(sites, ratio, iter(sorted(self._removable(sites, by_site=False), key=influence)))


class BlockByBlock(DepthAllocator):
    """Removes one block after the other: each time the one without which the measured loss is smallest."""

    measures: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "SLEB (Song et al., ICML 2024), arXiv 2402.09025; BlockPruner (Zhong et al., Findings of ACL 2025), arXiv "
        "2406.10594"
    )
    name: Literal["block_by_block"] = "block_by_block"
    blocks: Literal["layers", "sites"] = Field(
        default="layers", description="layers, or sites: attentions and MLPs one by one"
    )
    tokens: int = Field(default=1024, ge=2, description="tokens of the calibration text that every cut is measured on")
    length: int = Field(default=MEASURED_LENGTH, ge=2, description="most tokens of a row that are measured")

    def allocate(self, sites: Sequence[SiteScores], ratio: float, evaluate: Evaluate | None = None) -> list[int]:
        """Kept units of every site.

        Raises :class:`SpecError` if the removable blocks are too few for the ratio, and :class:`NonFiniteError` if no
        further block can go with a finite loss.
        """
        if evaluate is None:
            raise SpecError(f"allocator {self.name} measures the model, and is called without a way to; fix the caller")
        losses: dict[Block, float] = {}
        counts = self._without(sites, ratio, self._order(sites, evaluate, losses))
        for block, loss in losses.items():
            if not counts[block[0]]:  # the last one may be too large
                gone = [sites[place].site.label for place in block]
                evaluate.record(gone=", ".join(gone), objective="loss", tokens=self.tokens, best=loss)
        return counts

    def _order(self, sites: Sequence[SiteScores], evaluate: Evaluate, found: dict[Block, float]) -> Iterator[Block]:
        """The blocks, the first to go at the beginning; ``found`` gets the loss without each and all before it."""
        counts = [scores.site.units for scores in sites]
        alive = self._removable(sites, by_site=self.blocks == "sites")
        while alive:
            candidates = [[0 if place in block else n for place, n in enumerate(counts)] for block in alive]
            losses = evaluate(candidates, self.tokens, length=self.length)
            best = min(range(len(alive)), key=losses.__getitem__)
            if not math.isfinite(losses[best]):
                raise not_finite(self.name, "loss")
            counts, found[alive[best]] = candidates[best], losses[best]
            yield alive.pop(best)


class ShortGPT(Strategy):
    """ShortGPT: the layers with the lowest block influence go, all at once."""

    paper: ClassVar[str] = "ShortGPT (Men et al., Findings of ACL 2025), arXiv 2403.03853"
    name: Literal["shortgpt"] = "shortgpt"
    scorer: Scorer = MagnitudeScorer()
    allocator: SparsityAllocator = LowestInfluence()
    applier: MaskApplier = Slice()


class Sleb(Strategy):
    """SLEB: layers go one by one, each time the one without which the measured loss is smallest."""

    paper: ClassVar[str] = "SLEB (Song et al., ICML 2024), arXiv 2402.09025"
    name: Literal["sleb"] = "sleb"
    scorer: Scorer = MagnitudeScorer()
    allocator: SparsityAllocator = BlockByBlock(keep_first=1, keep_last=1)
    applier: MaskApplier = Slice()


class BlockPruner(Strategy):
    """BlockPruner: attentions and MLPs go one by one, each time the one without which the measured loss is smallest."""

    paper: ClassVar[str] = "BlockPruner (Zhong et al., Findings of ACL 2025), arXiv 2406.10594"
    name: Literal["block_pruner"] = "block_pruner"
    scorer: Scorer = MagnitudeScorer()
    allocator: SparsityAllocator = BlockByBlock(blocks="sites")
    applier: MaskApplier = Slice()


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [LowestInfluence, BlockByBlock]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [ShortGPT, Sleb, BlockPruner]
