"""Checks of policies: they answer the same every time, and their memory can be copied and stored with a cache."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor

from ..roles.policies import Policy
from .parts import draw, expect


def check_reads(policy: Policy) -> None:
    """What it prunes and how many tokens it reads follow from its options."""
    for name in ("prunes_prompt", "prunes_steps"):
        found = getattr(policy, name)
        expect(isinstance(found, bool), policy, f"{name} must be True or False, found {found!r}")
    reads = policy.reads
    whole = isinstance(reads, int) and not isinstance(reads, bool) and reads >= 0
    expect(whole, policy, f"reads must be a number of tokens, 0 or more, found {reads!r}")
    expect(policy.prunes_prompt or policy.prunes_steps, policy, "prunes neither prompts nor steps")
    again = reads > 0 and not policy.prunes_steps
    expect(not again, policy, "reads tokens of steps to choose units again, and runs steps with all units")
    unread = reads == 0 and any(policy.again(since, {}) is True for since in (1, 10, 10_000))
    expect(not unread, policy, "chooses units again, and reads 0 tokens to do it; set reads")


def check_steps(policy: Policy) -> None:
    """A long generation: its answers and its memory are the same twice, and memory is plain data."""
    outputs, memory, since = [draw(16, seed=seed) for seed in range(40)], dict[str, Any](), 0
    for number, output in enumerate(outputs):
        since += 1
        decided = number == 0
        if number:
            decided = policy.again(since, memory)
            expect(isinstance(decided, bool), policy, f"again must return True or False, found {decided!r}")
            expect(policy.again(since, memory) == decided, policy, "answers the same question differently")
        before, given = copy.deepcopy(memory), output.clone()
        made = policy.watch(memory, output, decided)
        expect(isinstance(made, dict), policy, f"watch must return a dict, found {type(made).__name__}")
        expect(_same(memory, before), policy, "changes the memory that it is given; return a new one")
        expect(torch.equal(output, given), policy, "changes the output that it is given")
        expect(_same(made, _stored(policy, made)), policy, "remembers what changes when it is stored")
        expect(_same(made, policy.watch(before, given, decided)), policy, "remembers the same call differently")
        memory, since = made, 0 if decided else since


def _stored(policy: Policy, memory: dict[str, Any]) -> Any:
    """The memory as another process reads it."""
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:
        what = "numbers, texts, tensors, lists and mappings"
        raise AssertionError(f"{type(policy).__name__} remembers more than {what} ({error})") from error


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and [*first] == [*second] and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return isinstance(second, (list, tuple)) and len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


POLICY_CHECKS = [check_reads, check_steps]
"""Each a function of one component."""
