"""Checks of groupings: whole groups of rows, the same every time, whatever the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..roles.grouping import Grouping
from .parts import draw, expect

ROWS = (1, 2, 3, 8, 33)


def check_most(grouping: Grouping) -> None:
    """The most groups of a batch are a whole number, from 1 to its rows; 1 where it does not split batches."""
    for rows in ROWS:
        most = grouping.most(rows)
        whole = isinstance(most, int) and not isinstance(most, bool) and 1 <= most <= rows
        expect(whole, grouping, f"most({rows}) must be a whole number from 1 to {rows}, found {most!r}")
        expect(grouping.splits or most == 1, grouping, f"splits is False, and most({rows}) is {most}")


def check_groups(grouping: Grouping) -> None:
    """Every row has one group, of at most ``most``: the same twice, and for rows in another order."""
    for rows in ROWS:
        scores = draw(rows, 12, seed=rows).abs()
        given = scores.clone()
        found = grouping.groups(scores)
        right = isinstance(found, Tensor) and found.dtype == torch.int64 and found.shape == (rows,)
        expect(right, grouping, f"groups must return int64 ({rows},), found {_shown(found)}")
        expect(torch.equal(scores, given), grouping, "changes the scores that it is given")
        inside = int(found.min()) >= 0 and int(found.max()) < grouping.most(rows)
        expect(inside, grouping, f"puts {rows} rows in groups {found.tolist()}; they are 0 to most({rows}) - 1")
        expect(torch.equal(grouping.groups(given), found), grouping, "answers the same question differently")
        turned = grouping.groups(given.flip(0)).flip(0)
        alike = torch.equal(found[:, None] == found, turned[:, None] == turned)
        expect(alike, grouping, "puts rows in other groups when they come in another order")


def check_dead_rows(grouping: Grouping) -> None:
    """Rows without any score, such as padding alone, and equal rows fall in a group, too."""
    for scores in (torch.zeros(5, 12), torch.cat([torch.zeros(2, 12), draw(1, 12).abs().expand(3, -1)])):
        found = grouping.groups(scores)
        inside = found.shape == (5,) and int(found.min()) >= 0 and int(found.max()) < grouping.most(5)
        expect(inside, grouping, f"puts 5 equal or empty rows in groups {_shown(found)}")


def _shown(found: object) -> str:
    return f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


GROUPING_CHECKS = [check_most, check_groups, check_dead_rows]
"""Each a function of one component."""
