"""Made-up sites for allocators that measure."""

import itertools
from dataclasses import replace

from prunekit.registry import SiteScores
from prunekit.registry.checks.parts import some_site

HEAD, CHANNEL = 160, 40
"""Parameters of a head and of a channel."""


def places(layers, heads=6, channels=24, head=HEAD, channel=CHANNEL):
    sites = []
    for layer, (kind, units, parameters) in itertools.product(
        range(layers), (("attention", heads, head), ("mlp", channels, channel))
    ):
        sites.append(SiteScores(replace(some_site(kind, layer), units=units, unit_parameters=parameters)))
    return sites


def freed(sites, counts):
    return sum((s.site.units - count) * s.site.unit_parameters for s, count in zip(sites, counts, strict=True))
