"""Decisions for groups of rows: a group chooses units like a batch that has its rows alone.

Positions where all rows of a group are padding are left out of its probe, so that a row chooses the same units in every
batch. Random selectors draw anew for every group, for the same reason. Letters: B rows of the batch, T positions, C
channels, U units; k kept units; n positions of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Decision
from .decider import Decider
from .probing import Prober, SiteInput, chosen_arguments, pick_tokens
from .shapes import checked
from .site_cut import SiteCut


class Scored(NamedTuple):
    """The scores (U,) of a group, and its probe's rows and positions in the batch."""

    units: Tensor
    rows: Tensor
    positions: Tensor


@torch.no_grad()
def decide_in_groups(
    decider: Decider, prober: Prober, cut: SiteCut, given: SiteInput, entered: Tensor | None = None
) -> Decision:
    """The units (B, k) of every row; (k,) where all keep the same.

    entered (B, T, C): what enters the consumer, where it is known without a probe.
    """
    grouping, rows = decider.strategy.group_by, len(given.residual)
    every = torch.arange(rows, device=given.residual.device)
    most, alone = grouping.most(rows), list[Scored]()
    if 1 < most < rows:
        alone = [_scored(decider, prober, cut, given, row[None], entered) for row in every]
        scores = torch.stack([one.units for one in alone]).float().cpu()
        found = grouping.groups(scores)
        group = checked(found, (rows,), "groups", "grouping", grouping, cut.binding.site).to(every.device)
    else:
        group = every if most == rows else torch.zeros_like(every)
    parts: list[tuple[Tensor, Decision]] = []
    for number in group.unique():
        own = every[group == number]
        known = len(own) == 1 and alone
        one = alone[int(own)] if known else _scored(decider, prober, cut, given, own, entered)
        with decider.stages.score:
            chosen = decider.chosen(cut, one.units)
        parts.append((own, Decision(chosen, one.rows, one.positions)))
    first = parts[0][1]
    if len(parts) == 1:
        return first
    kept = first.kept.new_empty(rows, cut.count)
    for own, decision in parts:
        kept[own] = decision.kept
    same = bool((kept == kept[0]).all())
    return first._replace(kept=kept[0] if same else kept, groups=tuple(parts))


def _scored(
    decider: Decider, prober: Prober, cut: SiteCut, given: SiteInput, members: Tensor, entered: Tensor | None
) -> Scored:
    """The scores of a group of rows, ``members`` (b,) int64 ascending."""
    own, places = part_of(cut, given, members, with_arguments=entered is None)
    own.generator = torch.Generator().manual_seed(decider.strategy.seed + cut.number)
    rows, positions = prober.select(cut, own)
    reached = None
    if entered is not None:
        reached = pick_tokens(pick_tokens(entered, members, places), rows, positions)
    probe = prober.probe(cut, own, (rows, positions), reached)
    with decider.stages.score:
        units = decider.units(cut, own, probe)
    return Scored(units, members[rows], places[positions])


def part_of(cut: SiteCut, given: SiteInput, members: Tensor, with_arguments: bool = True) -> tuple[SiteInput, Tensor]:
    """What some rows of a batch read, as a batch of their own, and the positions (n,) of the batch that it has."""
    valid, places = None, torch.arange(given.residual.shape[1], device=members.device)
    if given.valid is not None:
        valid = given.valid.index_select(0, members)
        real = valid.any(0)
        places = places[real] if bool(real.any()) else places
        valid = None if bool(valid[:, places].all()) else valid[:, places]
    residual = pick_tokens(given.residual, members, places)
    hidden = None if given.hidden is None else pick_tokens(given.hidden, members, places)
    arguments = given.arguments
    if arguments and with_arguments:
        arguments = chosen_arguments(cut.binding.site, given, members, places, places)
    return SiteInput(given.batch, residual, hidden, valid, arguments), places
