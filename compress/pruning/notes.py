"""How pruning went, in sentences: how much was cut, what is gone, and how compensation went."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any

from ...registry import Compensator, NoCompensation, Policy, Site, SiteGroup, SiteScores, SpecError, Strategy
from ..calibration.experts import unreached_experts
from ..engine.choosing import Choice
from ..engine.compensation import SiteCompensation
from ..engine.site_cut import SiteCut
from ..output.formatting import achieved, extent, ranges, share
from ..output.records import MatchFacts, Ratio
from .matching import Counts

FAR = 0.02
"""Difference of the requested and the achieved cut from which it is worth a note."""


def ratio_of(
    sites: Sequence[Site],
    counts: Counts,
    asked: float | None,
    decoder: float,
    matched: MatchFacts | None,
    parameters: int,
    left: str,
) -> Ratio:
    """The cut as requested and as achieved, over all sites of the model, those of skipped layers too.

    ``decoder`` is the share of the decoder's parameters that is cut, ``parameters`` the number of the whole model's,
    ``left`` what large part of the layers no site cuts.
    """
    known: dict[str, Any] = {} if matched is None else {"matched": matched}
    known |= {"left_whole": left} if left else {}
    kept = {site: counts.get((site.layer, site.kind), site.units) for site in sites}
    lost = sum((site.units - kept[site]) * site.unit_parameters for site in sites)
    return Ratio(
        asked=asked,
        units_cut=round(sum(1 - kept[site] / site.units for site in sites) / len(sites), 6),
        prunable_parameters_cut=round(lost / sum(site.units * site.unit_parameters for site in sites), 6),
        decoder_parameters_cut=round(decoder, 6),
        model_parameters_cut=round(lost / parameters, 6),
        **known,
    )


def notes_on_cut(strategy: Strategy, sites: Sequence[Site], counts: Counts, ratio: Ratio) -> list[str]:
    """Notes on sites of a kind that all keep everything, and on a cut far from what was requested."""
    if not ratio.asked:
        return []
    layers, inside = len({site.layer for site in sites}), [s for s in sites if (s.layer, s.kind) in counts]
    cut = strategy.site_ratio(ratio.asked, layers, layers - len({site.layer for site in inside}))
    notes = []
    # Where scores distribute the ratio, a site that keeps everything is their decision, not a rounding.
    for alike in [] if strategy.allocator.looks_at_model else _alike(inside):
        if alike[0].group in strategy.allocator.spares:
            continue
        if all(counts[site.layer, site.kind] == site.units for site in alike):
            least = _least(strategy, sites, inside, alike)
            notes.append(_rounding(alike[0], len(alike), cut, least))
    far = min(abs(found - ratio.asked) for found in (ratio.units_cut, ratio.prunable_parameters_cut)) > FAR
    if far and not ratio.matched:  # a matched cost takes what share of the units it takes
        notes.append(achieved(ratio))
    return notes


def notes_on_what_is_left(ratio: Ratio) -> list[str]:
    """One note where no site cuts a large part of the layers."""
    if ratio.left_whole is None:
        return []
    shares = (ratio.units_cut, ratio.parameters_cut, ratio.model_parameters_cut or 0.0)
    units, decoder, model = (f"{100 * cut:.1f}%" for cut in shares)
    remedy = "" if ratio.matched else "; with of: decoder the ratio is a share of the decoder's parameters"
    return [
        f"left whole: {ratio.left_whole}. The cut is {units} of the units, {decoder} of the decoder's parameters and "
        f"{model} of the model's{remedy}"
    ]


def notes_on_policy(policy: Policy) -> list[str]:
    """One note where prompts, and with them all scores of given texts, are those of the dense model."""
    if policy.prunes_prompt:
        return []
    return [
        f"policy {policy.name}: the prompt runs with all units, so perplexity and multiple-choice scores are those of "
        "the dense model; only decode steps are pruned"
    ]


def notes_on_blocks(sites: Sequence[Site], counts: Counts, partly: Collection[int] = ()) -> list[str]:
    """One note on the whole layers, attentions and MLPs of which nothing is left.

    Of the layers ``partly`` something is left in any case.
    """
    gone = {site for site in sites if counts.get((site.layer, site.kind)) == 0}
    routed = {site.layer for site in sites if site.routed}
    left = {s.layer for s in sites if s not in gone or (s.norm_serves_others and s.layer not in routed)}
    whole = {site.layer for site in gone} - left - set(partly)
    found = []
    for what, kind in (("layers", None), ("attentions", "attention"), ("MLPs", "mlp")):
        where = whole if kind is None else {site.layer for site in gone if site.kind == kind} - whole
        total = len({site.layer for site in sites if kind in (None, site.kind)})
        if where:
            found.append(f"{len(where)} of {total} {what} ({_runs(where)})")
    return [f"gone: {', '.join(found)}"] if found else []


def notes_on_experts(cuts: Sequence[SiteCut]) -> list[str]:
    """One note that names the routed experts that calibration has reached by no token."""
    found: dict[int, list[int]] = {}
    for cut in cuts:
        for number in unreached_experts(cut):
            found.setdefault(cut.site.layer, []).append(number)
    if not found:
        return []
    many = {layer: "expert" if len(numbers) == 1 else "experts" for layer, numbers in found.items()}
    places = [f"layer {layer} {many[layer]} {ranges(numbers)}" for layer, numbers in sorted(found.items())]
    if len(places) > MOST_RUNS:
        places[MOST_RUNS:] = [f"and {len(places) - MOST_RUNS} more layers"]
    done = "count as unused" if any(cut.site.router for cut in cuts) else "have their channels scored by weights alone"
    return [
        f"no token of calibration reached these experts, which {done}: {'; '.join(places)}. Calibrate with more text"
    ]


def _alike(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites of the same kind and the same units, in groups."""
    groups: dict[tuple[SiteGroup, int, bool], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.group, site.units, is_grouped(site)), []).append(site)
    return list(groups.values())


def is_grouped(site: Site) -> bool:
    """Whether a unit is a key/value group with several query heads."""
    return site.kind == "attention" and len({rows.per_unit for p in site.producers for rows in p.segments}) > 1


def _least(strategy: Strategy, sites: Sequence[Site], inside: Sequence[Site], alike: Sequence[Site]) -> float | None:
    """The smallest ratio, in whole percent, at which the allocator cuts any unit of the sites ``alike``; None: none."""
    layers = len({site.layer for site in sites})
    skipped = layers - len({site.layer for site in inside})
    scores = [SiteScores(site) for site in inside]
    for percent in range(1, 100):
        ratio = strategy.site_ratio(percent / 100, layers, skipped)
        if ratio >= 1:
            return None
        try:
            kept = strategy.allocator.allocate(scores, ratio)
        except SpecError:  # an allocator may refuse large ratios
            return None
        if any(count < site.units for site, count in zip(inside, kept, strict=True) if site in alike):
            return percent / 100
    return None


def _rounding(site: Site, layers: int, cut: float, least: float | None) -> str:
    """The note on ``layers`` sites like ``site`` that lose nothing; ``least`` is the smallest ratio that cuts any."""
    heads_of = "key/value groups" if is_grouped(site) else "attention heads"
    names = {"attention": heads_of, "mlp": "MLP channels", "expert": "channels of an expert", "experts": "experts"}
    many = names[site.group]
    heads = "attention_unit: query_head" if is_grouped(site) else ""
    larger = "" if least is None else f"a ratio of at least {least:g}"
    remedies = [heads, "a smaller multiple" if cut * site.units >= 1 else "", larger]
    use = " or ".join(filter(None, remedies))
    return (
        f"{share(cut)} of {site.units} {many} rounds to none, so all are kept in {layers} "
        f"{'expert' if site.group == 'expert' else 'layer'}{'s' * (layers > 1)}"
        f"{'; use ' if use else ''}{use}"
    )


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


def notes_on(sites: Sequence[SiteCompensation], choices: Sequence[Choice] = ()) -> tuple[str, ...]:
    """One note where covariances rest on too few tokens, and one where sites fell back to the mean alone.

    A covariance serves the compensator and the chooser, and is noted once.
    """
    fallen = [here for here in sites if here.fell_back]
    notes = []
    if short := _short(sites):
        notes.append(_few_tokens(f"compensator {sites[0].compensator.name}", short))
    elif short := _short(choices):
        notes.append(_few_tokens(f"scorer {choices[0].chooser.name}", short))
    if fallen:
        notes.append(
            f"compensator {fallen[0].compensator.name}: the covariance could not be solved at {_places(fallen)}, where "
            "the mean alone is compensated"
        )
    return tuple(notes)


Solved = SiteCompensation | Choice
"""Where a covariance was solved."""


def _short(sites: Iterable[Solved]) -> list[tuple[int, Solved]]:
    """The sites whose covariance rests on too few tokens, with their number."""
    known = [(here.tokens, here) for here in sites if here.tokens is not None]
    return [(tokens, here) for tokens, here in known if tokens < ENOUGH * here.site.channels]


def _few_tokens(part: str, short: Sequence[tuple[int, Solved]]) -> str:
    """The note on these sites; ``part`` is what solved their covariance."""
    sites = [here for _, here in short]
    ridge = _ridge(sites)
    solved = f"it was solved with a ridge of {extent(ridge)} times the mean variance; " if ridge else ""
    return (
        f"{part}: the covariance was computed from {min(tokens for tokens, _ in short):,} tokens, fewer than {ENOUGH} "
        f"for each channel at {_places(sites, with_channels=True)}; {solved}calibrate with more text"
    )


def _ridge(sites: Iterable[Solved]) -> dict[str, float] | None:
    """The smallest and the largest ridge of all sites, as shares of the mean variance; None: none reported."""
    known = [here.diagnostics["ridge"] for here in sites if "ridge" in here.diagnostics]
    return {"least": min(known), "largest": max(known)} if known else None


def _places(sites: Iterable[Solved], with_channels: bool = False) -> str:
    """Such as "layers 1 to 7 mlp (172 channels) and layers 0, 2 attention (64 channels)"."""

    def key(here: Solved) -> tuple:
        return here.site.group, here.site.channels if with_channels else None

    places = []
    for (name, channels), group in groupby(sorted(sites, key=key), key):
        layers = _runs(here.site.layer for here in group)
        places.append(f"{layers} {name}" + (f" ({channels:,} channels)" if with_channels else ""))
    return " and ".join(places)


MOST_RUNS = 10
"""Runs of layers that a note lists; of further layers it has the number."""


def _runs(numbers: Iterable[int]) -> str:
    """Layer numbers in words: "layer 3", "layers 0 to 4, 6"."""
    layers = sorted(set(numbers))
    runs = [[number for _, number in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:MOST_RUNS]]
    if more := sum(map(len, runs[MOST_RUNS:])):
        ranges.append(f"and {more} more")
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(ranges)}"
