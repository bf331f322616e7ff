"""Who competes with whom in a study, who is left out, and whether an order is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from ..output.formatting import TIE, share
from .aggregate import BOUNDS, Table
from .columns import Column
from .configurations import Configuration, key
from .evidence import Evidence, evidence_of, shared_seeds, standard_error
from .findings import finite, named_text


@dataclass(frozen=True)
class Contest:
    """Configurations that compare, by one measure."""

    contenders: list[Configuration]
    """Those with a value for every planned seed; where there is none, all that have a value."""
    left_out: list[Configuration]
    """Those that lack a value for a planned seed, where others lack none."""
    unmeasured: list[str]
    """What was to compete, and of which no trial is finished."""
    complete: bool
    """Whether the contenders have a value for every planned seed."""


@dataclass(frozen=True)
class Tie:
    """A configuration that cannot be told from the best."""

    configuration: Configuration
    why: str
    noise: str
    """What it takes more of to tell them apart: 60 windows, 3 seeds; empty where that is not known."""


@dataclass(frozen=True)
class Compared:
    """The best configuration of a contest, the next one, and those that may be as good."""

    best: Configuration
    second: Configuration | None
    ties: tuple[Tie, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    """How sure the lead over the second is."""
    caution: str = ""

    @property
    def tied(self) -> str:
        """Why no order is allowed; empty where it is."""
        if len(self.ties) < 2:
            return self.ties[0].why if self.ties else ""
        noises = list(dict.fromkeys(tie.noise for tie in self.ties if tie.noise))
        if not noises:
            return f"they differ from the first by less than {share(TIE)}"
        verb = "is" if len(noises) == 1 and noises[0].startswith("1 ") else "are"
        return f"{' or '.join(noises)} {verb} too few to tell the others from the first"


def contests(table: Table, column: Column) -> list[Contest]:
    """Contenders that differ in how they are pruned (or, where that is fixed, in anything) but in no circumstance."""
    blocks = table.blocks()
    measured = [[c for c in block if finite(c.mean(column)) is not None] for block in blocks]
    saving = any(table.saves(c) for block in measured for c in block)
    found = []
    for block in blocks:
        able = [c for c in block if table.saves(c)] if saving else block
        whole = [c for c in able if c.cell(column).complete]
        partial = [c for c in able if not c.cell(column).complete]
        valued = [c for c in partial if finite(c.mean(column)) is not None]
        unmeasured = _unmeasured(table, block)
        if whole:
            found.append(Contest(whole, partial, unmeasured, True))
        elif valued:
            found.append(Contest(valued, [c for c in partial if c not in valued], unmeasured, False))
    return found


def compare_best(column: Column, group: list[Configuration]) -> Compared:
    """The group's best, the next, and all that what was repeated or sampled cannot tell from the best."""
    best, *others = ordered(column, group)
    if not others:
        return Compared(best, None)
    ties = tuple(Tie(other, *doubt) for other in others if (doubt := _doubt(column, best, other)))
    both = len(shared_seeds(column, best, others[0])) == 2 and any(c.cell(column).sd for c in (best, others[0]))
    caution = "both seeds agree, but two are too few to be sure" if both else ""
    return Compared(best, others[0], ties, tuple(evidence_of(column, best, others[0])), caution)


def ordered(column: Column, group: list[Configuration]) -> list[Configuration]:
    """The best mean first."""
    return sorted(group, key=lambda c: c.mean(column), reverse=column.better == "higher")


def leading(column: Column, found: list[Contest]) -> Contest:
    """The contest that holds the best of all, of those that are whole and in which anything competes."""
    several = [one for one in found if one.complete and len(one.contenders) > 1]
    several = several or [one for one in found if one.complete] or found
    best = ordered(column, [ordered(column, one.contenders)[0] for one in several])[0]
    return next(one for one in several if best in one.contenders)


def _doubt(column: Column, best: Configuration, other: Configuration) -> tuple[str, str] | None:
    """Why the two tie, and what there is too little of; None where an order is allowed."""
    evidence = evidence_of(column, best, other)
    for one in evidence:
        if not one.certain:
            return one.doubt, one.source
    gap, sources = abs(other.mean(column) - best.mean(column)), {one.of for one in evidence}
    sds = [cell.sd for cell in (best.cell(column), other.cell(column)) if cell.sd is not None]
    if sds and "seed" not in sources:
        shared = shared_seeds(column, best, other)
        if len(shared) == 2 and min(shared) <= 0:
            return "the two seeds disagree", "2 seeds"
        if gap <= sqrt(sum(sd * sd for sd in sds)):
            return "they differ by less than seeds do", "the seeds"
    error = None if "question" in sources else standard_error(column, best, other)
    if error is not None and gap <= 2 * error:
        return f"they differ by less than two standard errors ({200 * error:.1f} points)", "the questions"
    if not sds and not evidence and error is None and gap <= TIE * abs(best.mean(column)):
        return f"they differ by less than {share(TIE)}", ""
    return None


def _unmeasured(table: Table, block: list[Configuration]) -> list[str]:
    """What was to compete here, and of which no trial is finished; strategies that are bounds are never missed."""
    where, names = [name for name in table.axes if name not in table.methods], []
    here, known = block[0].settings, {_method(table, c.settings) for c in block}
    for trial in table.findings.trials:
        values = {name: trial.settings[name] for name in table.methods if trial.settings.get(name) is not None}
        same = all(key(trial.settings.get(name)) == key(here.get(name)) for name in where)
        bound = any(isinstance(value, str) and value in BOUNDS for value in values.values())
        if trial.status != "done" and same and values and not bound and _method(table, trial.settings) not in known:
            names.append(", ".join(named_text(name, value) for name, value in values.items()))
    return list(dict.fromkeys(names))


def _method(table: Table, settings: dict[str, Any]) -> str:
    return key([settings.get(name) for name in table.methods])
