"""What allocators share whose ratio is a share of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..registry import Site, SpecError

WORST = 1e6
"""Nats per token that stand for an infinite loss."""

EXACT = 1 + 1e-9
"""A budget this close to whole units pays for them."""


def parameters_to_cut(
    allocator: str, sites: Sequence[Site], most: Sequence[int], ratio: float, minimum_units: int
) -> float:
    """The share ``ratio`` of the parameters of all units of ``sites``.

    ``most``: how many units each site can lose, with ``minimum_units`` kept. Raises :class:`SpecError` if these are too
    few.
    """
    total = sum(site.units * site.unit_parameters for site in sites)
    reachable = sum(units * site.unit_parameters for site, units in zip(sites, most, strict=True))
    if ratio * total > reachable * EXACT:
        raise SpecError(
            f"allocator {allocator}: a ratio of {ratio:.4g} of these layers' parameters is out of reach: every site "
            f"keeps minimum_units: {minimum_units}, so {math.floor(reachable / total * 1e4) / 1e4:.4g} can be cut; "
            "lower the ratio or minimum_units"
        )
    return ratio * total * EXACT
