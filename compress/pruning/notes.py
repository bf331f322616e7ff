"""How compensation went: a record for results, and notes on too little text and on sites that fell back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from ...registry import Compensator, NoCompensation, Site
from ..engine.compensation import SiteCompensation
from ..output.formatting import extent

ENOUGH = 2
"""Tokens for each channel; with fewer, least squares has gained little over the mean alone (docs/compensation.md)."""


def about_compensation(compensator: Compensator, sites: Sequence[SiteCompensation]) -> dict[str, Any] | None:
    """The compensator with its options, tokens and ridges of the covariances, sites that fell back; None: none."""
    if isinstance(compensator, NoCompensation):
        return None
    tokens = [here.tokens for here in sites if here.tokens is not None]
    return {
        "compensator": compensator.model_dump(mode="json", serialize_as_any=True),
        "tokens": min(tokens, default=None),
        "ridge": _ridge([here for here in sites if here.tokens is not None]),
        "fell_back": [here.site.label for here in sites if here.fell_back],
    }


def notes_on(sites: Sequence[SiteCompensation]) -> tuple[str, ...]:
    """One note where covariances rest on too few tokens, and one where sites fell back to the mean alone."""
    known = [(here.tokens, here) for here in sites if here.tokens is not None]
    short = [here for tokens, here in known if tokens < ENOUGH * here.site.channels]
    fallen = [here for here in sites if here.fell_back]
    notes = []
    if short:
        tokens, compensator = min(tokens for tokens, here in known if here in short), short[0].compensator
        ridge = _ridge(short)
        solved = f"it was solved with a ridge of {extent(ridge)} times the mean variance; " if ridge else ""
        notes.append(
            f"compensator {compensator.name}: the covariance was computed from {tokens:,} tokens, fewer than {ENOUGH} "
            f"for each channel at {_places(short, with_channels=True)}; {solved}calibrate with more text"
        )
    if fallen:
        notes.append(
            f"compensator {fallen[0].compensator.name}: the covariance could not be solved at {_places(fallen)}, where "
            "the mean alone is compensated"
        )
    return tuple(notes)


def _ridge(sites: Iterable[SiteCompensation]) -> dict[str, float] | None:
    """The smallest and the largest ridge of all sites, as shares of the mean variance; None: none reported."""
    known = [here.diagnostics["ridge"] for here in sites if "ridge" in here.diagnostics]
    return {"least": min(known), "largest": max(known)} if known else None


def _places(sites: Iterable[SiteCompensation], with_channels: bool = False) -> str:
    """Such as "layers 1 to 7 mlp (172 channels) and layers 0, 2 attention (64 channels)"."""

    def key(here: SiteCompensation) -> tuple:
        return here.site.kind, here.site.channels if with_channels else None

    places = []
    for (kind, channels), group in groupby(sorted(sites, key=key), key):
        layers = _runs(here.site for here in group)
        places.append(f"{layers} {kind}" + (f" ({channels:,} channels)" if with_channels else ""))
    return " and ".join(places)


def _runs(sites: Iterable[Site]) -> str:
    """Layer numbers in words: "layer 3", "layers 0 to 4, 6"."""
    layers = sorted({site.layer for site in sites})
    runs = [[number for _, number in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(ranges)}"
