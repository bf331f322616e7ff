"""The checks of statistics, on made-up activations; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..roles.parts import Scorer
from ..tensors.statistics import ChannelHistory, ExpertStatistic, Statistic
from .parts import alike, draw, expect, expect_tensor, expect_unchanged


def check_statistic(scorer: Scorer) -> None:
    """Its statistic, if any, keeps float32 tables per position and ignores padding."""
    statistic = scorer.statistic
    if statistic is None:
        return
    expect(isinstance(statistic, Statistic), scorer, f"must have a Statistic or None, found {statistic!r}")
    if isinstance(statistic, ExpertStatistic):
        check_expert_statistic(statistic)
        return
    history = ChannelHistory(3, torch.device("cpu"))
    for seed, dtype in enumerate((torch.float32, torch.float16)):
        statistic.observe(history, draw(4, 5, 3, seed=seed).to(dtype), None)
    expect_tensor(history.table, statistic, "history", (5, 3))
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    x = draw(2, 5, 3)
    measured = statistic.measure(x, valid, history.mean)
    expect_tensor(measured, statistic, "measure", (5, 3))
    expect(bool((measured >= 0).all()), statistic, "measures something negative")
    again = statistic.measure(x.masked_fill(~valid[..., None], 1e4), valid, history.mean)
    expect(torch.equal(measured, again), statistic, "looks at padded tokens")


def check_observation(scorer: Scorer) -> None:
    """History after one batch is what ``measure`` gives of it, padded or not, and batches add up."""
    statistic = scorer.statistic
    if statistic is None or isinstance(statistic, ExpertStatistic):
        return
    lengths = torch.tensor([5, 2, 4, 1, 5, 3])[:, None]
    for valid in (None, torch.arange(5) < lengths, torch.arange(5) >= 5 - lengths):
        x = draw(6, 5, 3)
        history = _observed(statistic, [x], valid)
        expect_unchanged(statistic, "activations", draw(6, 5, 3), x)
        if valid is not None:
            other = _observed(statistic, [x.masked_fill(~valid[..., None], 1e4)], valid)
            expect(torch.equal(other.table, history.table), statistic, "looks at padded tokens when it observes")
        measured = statistic.measure(x, valid, history.mean)
        expect_unchanged(statistic, "activations", draw(6, 5, 3), x)
        rule = "measures a batch otherwise than it observes it: history after one batch must be what measure gives"
        expect(alike(measured, history.table), statistic, rule)
        if valid is not None:
            continue
        in_parts = statistic.summed(_observed(statistic, x.split(2), valid))
        expect(
            alike(in_parts, statistic.summed(history)),
            statistic,
            "gives something else where a text is read in several batches",
        )


def _observed(statistic: Statistic, batches: Sequence[Tensor], valid: Tensor | None) -> ChannelHistory:
    """A history of batches; ``valid`` is of all together."""
    history, before = ChannelHistory(3, torch.device("cpu")), 0
    for x in batches:
        statistic.observe(history, x, None if valid is None else valid[before : before + len(x)])
        before += len(x)
    return history


def check_expert_statistic(statistic: ExpertStatistic) -> None:
    """It values every expert by its own column alone, and a text in two batches gives what it gives in one."""
    x = torch.stack([draw(12, 3, seed=1).abs(), draw(12, 3, seed=2).square()], 1)
    x[torch.arange(12), :, torch.arange(12) % 3] = 0  # a token does not reach every expert
    whole, parts = (ChannelHistory(3, torch.device("cpu")) for _ in range(2))
    statistic.observe(whole, x, None)
    for part in x.split(5):
        statistic.observe(parts, part, None)
    found = expect_tensor(statistic.summed(whole), statistic, "summed", (3,))
    same = torch.allclose(found, statistic.summed(parts), rtol=1e-4, atol=1e-6)
    expect(same, statistic, "gives something else where a text is read in two batches")
    turned = ChannelHistory(3, torch.device("cpu"))
    statistic.observe(turned, x.flip(2), None)
    same = torch.allclose(found, statistic.summed(turned).flip(0), rtol=1e-4, atol=1e-6)
    expect(same, statistic, "values an expert by its number or by other experts: turned around, they get other values")
