"""The checks of groupings can fail: each broken rule is named, and what keeps the rules passes."""

from typing import Literal

import pytest
import torch
from prunekit.registry import Grouping, OneForAll
from prunekit.registry.checks import check_component
from prunekit.strategies.grouping import ByLikeness, ByRow


class Loudest(Grouping):
    """The loudest row of a batch decides apart."""

    name: Literal["loudest"] = "loudest"

    def most(self, rows):
        return min(rows, 2)

    def groups(self, scores):
        sums = scores.sum(1)
        return (sums == sums.max()).long() if len(sums) > 1 else torch.zeros(1, dtype=torch.long)


@pytest.mark.parametrize("grouping", [Loudest(), OneForAll(), ByRow(), ByLikeness(), ByLikeness(clusters=1)])
def test_what_keeps_the_rules_passes(grouping):
    check_component(grouping)


def drawn(self, scores):
    return torch.randint(2, (len(scores),)).clamp(max=len(scores) - 1)


BROKEN = {
    r"most\(1\) must be a whole number from 1 to 1, found 2": {"most": lambda self, rows: 2},
    r"must be a whole number from 1 to 1, found 1.0": {"most": lambda self, rows: 1.0},
    r"splits is False, and most\(2\) is 2": {"splits": False},
    r"groups must return int64 \(1,\), found torch.float32": {"groups": lambda self, scores: scores.sum(1)},
    r"groups must return int64 \(1,\), found list": {"groups": lambda self, scores: [0] * len(scores)},
    "changes the scores": {"groups": lambda self, scores: scores.mul_(2).sum(1).long() * 0},
    r"in groups \[0, 1, 2\]; they are 0 to most\(3\) - 1": {"groups": lambda self, scores: torch.arange(len(scores))},
    "answers the same question differently": {"groups": drawn},
    "in other groups when they come in another order": {
        "groups": lambda self, scores: (torch.arange(len(scores)) > 0).long()
    },
    "puts 5 equal or empty rows in groups": {
        "groups": lambda self, scores: Loudest.groups(self, scores) + 5 * (scores.sum(1) == 0).all()
    },
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_grouping_is_named(words):
    class Broken(Loudest):
        """Breaks one rule."""

    for name, value in BROKEN[words].items():
        setattr(Broken, name, value)
    with pytest.raises(AssertionError, match=f"^Broken .*{words}"):
        check_component(Broken())
