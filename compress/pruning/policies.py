"""Policies and groupings that a cut does not allow."""

from __future__ import annotations

from collections.abc import Sequence

from ...registry import Site, SpecError, Strategy
from .notes import is_grouped


def check_policy(strategy: Strategy, counts: Sequence[tuple[Site, int]]) -> None:
    """Raise :class:`SpecError` where a policy cannot be right for sites that keep so many units."""
    policy, decides = strategy.policy, strategy.turns == "decide"
    for site, count in counts if decides or not policy.is_plain else ():
        if count == site.units:
            continue
        others = "policy: per_prompt" + (" with turns: keep" if decides else "")
        if site.routed:
            why, others = "routed experts are chosen with the prompt alone", f"experts: keep, or {others}"
        elif not count:
            why = "a block that keeps nothing is gone in all calls"
        elif site.kind == "attention" and strategy.applier.resizes and not site.query_heads_per_kv:
            why = "key/value heads that are cut in one call are missing in the cache of the next"
            heads = "attention_unit: query_head, " if is_grouped(site) else ""
            others = f"allocator: mlp_only, {heads}or {others}"
        elif policy.reads and site.kind == "attention" and (site.unit_arguments or site.position_tables):
            why = f"{site.entry} adds terms of positions to its scores, which a probe of a step does not know"
            others = f"allocator: mlp_only, policy: decode_only, or {others}"
        elif decides and policy.prunes_prompt and site.kind == "attention":
            why = "a probe of a turn does not see the cache before it"
            others = f"allocator: mlp_only, policy: decode_only, or {others}"
        else:
            continue
        name = policy.name + (", turns: decide" if decides else "")
        raise SpecError(
            f"policy {name}: {site.label} keeps {count} of {site.units} units, and {why}; nearest: {others}"
        )


def check_grouping(strategy: Strategy, counts: Sequence[tuple[Site, int]]) -> None:
    """Raise :class:`SpecError` where rows cannot have units of their own at sites that keep so many."""
    for site, count in counts if strategy.group_by.splits else ():
        along = [each.name for each in site.unit_tensors] + [each.name for each in site.unit_arguments]
        along += [producer.path for producer in site.selected]
        if count in (0, site.units):
            continue
        if site.routed:
            why, others = "a routed expert reads tokens of all rows together", "experts: keep"
        elif site.position_tables:
            why, others = f"{site.entry} adds terms of positions to its scores", "allocator: mlp_only"
        elif along and strategy.applier.resizes:
            why, others = f"{along[0]} is cut for all rows alike", "applier: zero"
            others = f"allocator: mlp_only, {others}" if site.kind == "attention" else others
        else:
            continue
        raise SpecError(f"group_by: {strategy.group_by.name}: {site.label}: {why}; nearest: {others}, group_by: batch")
