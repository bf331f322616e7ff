"""Evolutionary allocation: a search that moves units from site to site, and keeps what the model bears best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ..registry import Evaluate, Objective, Site, SiteScores, SparsityAllocator, hookimpl
from .allocation import Uniform, kept_width
from .budget import MeasuringAllocator, not_finite, parameters_to_cut

DRAWS = 100
"""Draws of a switch before a parent counts as one that cannot be changed."""

Counts = tuple[int, ...]
"""Kept units of every site."""


class Evolutionary(MeasuringAllocator):
    """Begins with equal shares; each generation measures offspring that lose more at one site and less at another.

    Offspring make the smaller of two drawn numbers of switches, each of which keeps the parameters equal. Survivors
    are found in stages on more and more text. The parent joins the last stage, so that it is replaced only by
    something better. With ``rounds`` the search is repeated from where it ended, with half of the step. A larger
    number of measurements finds better allocations, and fits them to the calibration text.

    The ratio is a share of the parameters, as with ``global_adaptive``, and is met within the cheapest unit in every
    generation.
    """

    paper: ClassVar[str] = "EvoPress, ICML 2025, arXiv 2410.14649; Tyr-the-Pruner, NeurIPS 2025, arXiv 2503.09657"
    name: Literal["evolutionary"] = "evolutionary"
    objective: Objective = Field(
        default="kl",
        description="kl: divergence from the dense model's prediction of the next token; loss: of the next token",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the offspring")
    generations: int = Field(default=20, ge=1, description="generations of a round")
    offspring: int = Field(default=16, ge=1, description="different offspring of a generation")
    stages: tuple[tuple[int, int], ...] = Field(
        default=((4, 256),),
        description="stages before the last: how many survive, and the tokens that they are measured on; in the last, "
        "on `tokens`, one survives",
    )
    switches: int = Field(default=3, ge=1, description="most switches of an offspring")
    step: float = Field(default=0.125, gt=0, le=1, description="share of a site's units in a switch of the first round")
    rounds: int = Field(default=1, ge=1, le=20, description="searches, each with half of the step of the one before")
    reach: int = Field(
        default=0,
        ge=0,
        description="most steps of a site from its count at the beginning of the round; 0: any number",
    )
    across_kinds: bool = Field(default=True, description="whether attention and MLP may exchange parameters")

    @field_validator("stages")
    @classmethod
    def _narrowing(cls, stages: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        survivors, tokens = [stage[0] for stage in stages], [stage[1] for stage in stages]
        if survivors != sorted(survivors, reverse=True) or min([*survivors, 1]) < 1 or min([*tokens, 2]) < 2:
            raise ValueError(
                "stages are pairs of survivors, 1 or more, not rising from stage to stage, and of tokens, 2 or more; "
                f"found {[list(stage) for stage in stages]!r:.100}"
            )
        return stages

    def allocate(self, sites: Sequence[SiteScores], ratio: float, evaluate: Evaluate | None = None) -> list[int]:
        """Kept units of every site.

        Raises :class:`SpecError` if ``minimum_units`` makes the ratio impossible, and :class:`NonFiniteError` if no cut
        of a generation has a finite objective.
        """
        evaluate = self._measuring(evaluate)
        space = Space.of([scores.site for scores in sites], self)
        whole = [scores.site.units for scores in sites]
        most = [units - least for units, least in zip(whole, space.least, strict=True)]
        budget = parameters_to_cut(self.name, space.sites, most, ratio, self.minimum_units)
        if not budget:
            return whole
        uniform = Uniform(mlp_multiple=self.mlp_multiple).allocate(sites, ratio)
        return list(self._searched(space, space.settled(uniform, budget), budget, evaluate))

    def _searched(self, space: Space, parent: Counts, budget: float, evaluate: Evaluate) -> Counts:
        """The best counts that the search finds; every generation is recorded."""
        random, origin, best = np.random.default_rng(self.seed), parent, math.inf
        total = self.rounds * self.generations
        for number in evaluate.progress(range(total), "searching, generations", total):
            round_, generation = divmod(number, self.generations)
            if generation == 0:
                origin = parent
            step = self.step / 2**round_
            offspring = self._offspring(space, parent, budget, step, origin, random)
            parent, best, measured = self._best(parent, offspring, evaluate)
            evaluate.record(
                round=round_ + 1, generation=generation + 1, step=step, measured=measured, objective=self.objective,
                tokens=self.tokens, best=best,
            )  # fmt: skip
            if not math.isfinite(best):
                raise not_finite(self.name, self.objective)
        return parent

    def _offspring(
        self, space: Space, parent: Counts, budget: float, step: float, origin: Counts, random: np.random.Generator
    ) -> list[Counts]:
        """Different counts, none of them the parent's, in the order in which they were drawn."""
        found: dict[Counts, None] = {}
        for _ in range(4 * self.offspring):
            counts = parent
            for _ in range(int(random.integers(1, self.switches + 1, size=2).min())):
                counts = space.switched(counts, budget, step, origin, random)
            if counts != parent:
                found[counts] = None
            if len(found) == self.offspring:
                break
        return list(found)

    def _best(self, parent: Counts, offspring: list[Counts], evaluate: Evaluate) -> tuple[Counts, float, int]:
        """What survives of parent and offspring, its objective, and how many cuts were measured."""
        pool, measured = offspring, 0
        for survivors, tokens in self.stages:
            measured += len(pool)
            pool = [counts for _, counts in self._ranked(pool, tokens, evaluate)[:survivors]]
        ranked = self._ranked([parent, *pool], self.tokens, evaluate)
        loss, counts = ranked[0]
        return counts, loss, measured + len(ranked)

    def _ranked(self, pool: Iterable[Counts], tokens: int, evaluate: Evaluate) -> list[tuple[float, Counts]]:
        """Objectives and counts, the best first; of equal ones the first."""
        measured = [(evaluate([counts], tokens, **self._how)[0], counts) for counts in pool]
        finite = [(loss if math.isfinite(loss) else math.inf, counts) for loss, counts in measured]
        return sorted(finite, key=lambda pair: pair[0])


@dataclass(frozen=True)
class Space:
    """The counts that sites may have, and the steps between them."""

    sites: Sequence[Site]
    multiples: Sequence[int]
    least: Sequence[int]
    reach: int
    across_kinds: bool

    @classmethod
    def of(cls, sites: Sequence[Site], options: Evolutionary) -> Space:
        """The space of an allocator's options."""
        multiples = [options.granularity(site) for site in sites]
        least = [
            min(site.units, math.ceil(options.minimum_units / multiple) * multiple)
            for site, multiple in zip(sites, multiples, strict=True)
        ]
        return cls(sites, multiples, least, options.reach, options.across_kinds)

    def freed(self, counts: Iterable[int]) -> int:
        """Parameters of the units that are cut."""
        return sum((site.units - count) * site.unit_parameters for site, count in zip(self.sites, counts, strict=True))

    def settled(self, counts: Iterable[int], budget: float) -> Counts:
        """``counts`` with so many units more or fewer, at the sites furthest from equal shares, that the budget is
        used up within the cheapest step."""
        kept = [max(count, least) for count, least in zip(counts, self.least, strict=True)]
        while self.freed(kept) > budget:
            more = [(site.unit_parameters, kept[n] / site.units, n) for n, site in enumerate(self.sites)]
            place = min(each for each in more if each[1] < 1)[2]
            kept[place] = self._near(place, kept[place] + 1)
        while True:
            rest = budget - self.freed(kept)
            fewer = [(n, self._near(n, kept[n] - self.multiples[n])) for n in range(len(kept))]
            fits = [
                (kept[n] / self.sites[n].units, -n, count)
                for n, count in fewer
                if self.least[n] <= count < kept[n] and (kept[n] - count) * self.sites[n].unit_parameters <= rest
            ]
            if not fits:
                return tuple(kept)
            _, place, count = max(fits)
            kept[-place] = count

    def switched(
        self, counts: Counts, budget: float, step: float, origin: Counts, random: np.random.Generator
    ) -> Counts:
        """``counts`` after one switch between two sites; unchanged where none is found.

        The site whose units are dearer changes by a step, and the other one uses up the budget.
        """
        for _ in range(DRAWS if len(counts) > 1 else 0):
            pair = random.choice(len(counts), size=2, replace=False)
            other, dear = sorted(map(int, pair), key=lambda n: self.sites[n].unit_parameters)
            if not self.across_kinds and self.sites[other].group != self.sites[dear].group:
                continue
            kept = list(counts)
            kept[dear] = self._near(dear, kept[dear] + int(random.choice((-1, 1))) * self._size(dear, step))
            kept[other] = self.sites[other].units
            units = (budget - self.freed(kept)) // self.sites[other].unit_parameters
            if units < 0:
                continue
            kept[other] = kept_width(self.sites[other].units, int(units), self.multiples[other])
            moved = (kept[dear] - counts[dear]) * (kept[other] - counts[other])
            if moved < 0 and all(self._allows(n, kept[n], step, origin[n]) for n in (dear, other)):
                return tuple(kept)
        return counts

    def _size(self, place: int, step: float) -> int:
        """Units of a step at a site."""
        multiple = self.multiples[place]
        return max(1, round(step * self.sites[place].units / multiple)) * multiple

    def _near(self, place: int, count: int) -> int:
        """The smallest count of at least ``count`` that a site may have."""
        return kept_width(self.sites[place].units, self.sites[place].units - count, self.multiples[place])

    def _allows(self, place: int, count: int, step: float, origin: int) -> bool:
        """Whether a site may keep ``count``, in this round."""
        near = not self.reach or abs(count - origin) <= self.reach * self._size(place, step)
        return near and self.least[place] <= count <= self.sites[place].units


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [Evolutionary]
