"""The checks of policies can fail: each broken rule is named, and what keeps the rules passes."""

import random
from typing import ClassVar, Literal

import pytest
import torch
from prunekit.registry import Policy
from prunekit.registry.checks import check_component
from prunekit.strategies.policies import Drift, EveryN


class Loud(Policy):
    """Chooses units again after an output that is longer than all before it."""

    watches: ClassVar[bool] = True
    name: Literal["loud"] = "loud"

    @property
    def reads(self):
        return 8

    def again(self, since, memory):
        return memory.get("louder", False)

    def watch(self, memory, output, decided):
        norm, most = float(output.norm()), memory.get("most", 0.0)
        return {"most": max(norm, most), "louder": norm > most, "last": [output]}


@pytest.mark.parametrize("policy", [Loud(), EveryN(n=3), Drift(tokens=1, pressure=1, margin=0.01)])
def test_what_keeps_the_rules_passes(policy):
    check_component(policy)


BROKEN = {
    "reads must be a number of tokens, 0 or more, found True": {"reads": property(lambda self: True)},
    "prunes_steps must be True or False, found 'no'": {"prunes_steps": property(lambda self: "no")},
    "prunes neither prompts nor steps": {
        "prunes_prompt": property(lambda self: False),
        "prunes_steps": property(lambda self: False),
        "reads": property(lambda self: 0),
        "again": Policy.again,
    },
    "runs steps with all units": {"prunes_steps": property(lambda self: False)},
    "reads 0 tokens to do it; set reads": {
        "reads": property(lambda self: 0),
        "again": lambda self, since, memory: since > 9,
    },
    "again must return True or False, found 1": {"again": lambda self, since, memory: 1},
    "answers the same question differently": {"again": lambda self, since, memory: random.random() < 0.5},
    "watch must return a dict, found NoneType": {"watch": lambda self, memory, output, decided: None},
    "changes the memory that it is given": {"watch": lambda self, memory, output, decided: memory.update(a=1) or {}},
    "changes the output that it is given": {"watch": lambda self, memory, output, decided: {"o": output.add_(1)}},
    "remembers the same call differently": {
        "watch": lambda self, memory, output, decided: {"draw": torch.rand(()).item()}
    },
    "remembers more than numbers": {"watch": lambda self, memory, output, decided: {"how": torch.nn.Identity()}},
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_policy_is_named(words):
    class Broken(Loud):
        """Breaks one rule."""

    for name, value in BROKEN[words].items():
        setattr(Broken, name, value)
    with pytest.raises(AssertionError, match=f"^Broken .*{words}"):
        check_component(Broken())
