"""The quick checks of what a pipeline uses of other people's plugins."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ...registry import Component
from ...registry.catalog import is_foreign, named
from ...registry.checks import check_strategy_parts, checks_of, found
from ..files.spec import PipelineSpec
from ..output import printing

LIMIT = 1.0
"""Seconds after which the checks of a component end."""


class Checked(NamedTuple):
    """What the quick checks say of one component."""

    name: str
    passed: int
    left: int
    """Checks that there was no time for."""
    flaws: tuple[str, ...]


def foreign(spec: PipelineSpec) -> list[Component]:
    """The strategy, its parts and the evaluators that do not come from prunekit itself."""
    parts = [part for _, part in spec.prune if isinstance(part, Component)]
    return [part for part in (spec.prune, *parts, *spec.evaluate) if is_foreign(part)]


KNOWN: dict[tuple[type[Component], str], Checked] = {}
"""What has been checked, by the component's identity."""


def quickly_checked(component: Component) -> Checked:
    """Run a component's checks on made-up tensors once, for a second at most; torch's random state stays what it is."""
    if component.identity not in KNOWN:
        KNOWN[component.identity] = _check(component)
    return KNOWN[component.identity]


def _check(component: Component) -> Checked:
    # The parts of a strategy are checked one by one, where they are foreign, too.
    checks = [check for check in checks_of(component) if check is not check_strategy_parts]
    began, flaws, done = time.perf_counter(), [], 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for check in checks:
            if time.perf_counter() - began > LIMIT:
                break
            done += 1
            finding = found(check, component)
            if finding.result == "failed":
                flaws.append(f"{named(component)}: {finding.message}")
    return Checked(named(component), done - len(flaws), len(checks) - done, tuple(flaws))


def flaws_of(spec: PipelineSpec) -> list[str]:
    """The rules that the components of other people break, one sentence each, for notes."""
    return [
        f"{flaw}; results may be wrong, and prunekit check shows all rules"
        for part in foreign(spec)
        for flaw in quickly_checked(part).flaws
    ]


def announce(specs: Iterable[PipelineSpec]) -> list[str]:
    """Check what comes from other people: one line on what was checked, and a warning for each flaw, which it returns.

    Nothing is printed where everything comes from prunekit.
    """
    specs = list(specs)
    checked = dict.fromkeys(quickly_checked(part) for spec in specs for part in foreign(spec))
    if checked:
        printing.Bars().say(f"checked {', '.join(map(_line, checked))}")
    flaws = list(dict.fromkeys(flaw for spec in specs for flaw in flaws_of(spec)))
    for flaw in flaws:
        printing.warning(flaw)
    return flaws


def _line(checked: Checked) -> str:
    parts = [f"{checked.passed} rules hold"]
    parts += [f"{len(checked.flaws)} broken"] * bool(checked.flaws)
    parts += [f"{checked.left} left out after {LIMIT:g} s"] * bool(checked.left)
    return f"{checked.name} ({', '.join(parts)})"
