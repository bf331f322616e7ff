"""Rows that decide apart, steps that repeat the step before, and policies: together they give what each gives alone."""

import copy
from typing import ClassVar, Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine.steady import Steady
from prunekit.registry import Policy, SpecError
from prunekit.strategies.policies import EveryN

from tests.policy_models import prompts, small_model
from tests.test_grouping import pruned_by, units_of_rows
from tests.test_policies import OPTIONS, generated, steps
from tests.test_steady import repeated, start  # noqa: F401 - a fixture

CLUSTERS = {"name": "cluster", "clusters": 2}


@pytest.fixture(scope="module")
def dense():
    return small_model()


@torch.no_grad()
@pytest.mark.parametrize("name", ["pp, query heads", "pp, decode_only", "pp, mean"])
def test_rows_of_a_long_generation_equal_rows_alone(dense, repeated, name):  # noqa: F811
    """Alone, steps repeat; where rows differ they do not, also when the same prompts come again."""
    model, ids = copy.deepcopy(dense), prompts(3)
    with pruned_by(model, name, "row") as pruned:
        found = [generated(model, ids, max_new_tokens=20) for _ in range(2)]
        kept = units_of_rows(pruned, 3)
        assert any(len(set(map(tuple, rows.values()))) == 3 for rows in kept.values())
    assert not any(repeated)
    with pruned_by(model, name, "batch"):
        for row in range(3):
            expected, wanted = generated(model, ids[row : row + 1], max_new_tokens=20)
            for tokens, logits in found:
                assert torch.equal(tokens[row], expected[0])
                torch.testing.assert_close(logits[:, row], wanted[:, 0], rtol=1e-3, atol=1e-3)
    assert len(repeated) - repeated.count(0) == 3 * 18


@torch.no_grad()
@pytest.mark.parametrize("group_by", ["row", CLUSTERS])
@pytest.mark.parametrize("name", ["pp, query heads", "pp, decode_only"])
def test_conversations_with_other_groups_take_turns(dense, repeated, name, group_by):  # noqa: F811
    """One whose rows differ, one whose rows are alike and repeat steps, and one with other groups."""
    model, more = copy.deepcopy(dense), prompts(3, 20, seed=8)
    first, other = prompts(3), prompts(3, seed=9)[torch.tensor([0, 1, 0])]
    texts = first, first[:1].expand(3, -1), other
    order = [0, 1, 1, 1, 0, 0, 2, 2, 1, 1, 0, 2, 1, 1, 1, 2, 0, 1, 2]
    with pruned_by(model, name, group_by):
        alone = [steps(model, start(model, ids), more[:, : order.count(place)]) for place, ids in enumerate(texts)]
        caches, found = [start(model, ids) for ids in texts], [[], [], []]
        repeated.clear()
        for place in order:
            at = len(found[place])
            found[place] += steps(model, caches[place], more[:, at : at + 1])
        assert len(repeated) - repeated.count(0) == 5, "the steps of rows that are alike repeat, and no others"
    for expected, both in zip(alone, found, strict=True):
        assert all(map(torch.equal, expected, both))
    assert not torch.allclose(alone[0][0], alone[1][0], atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pp", "pp, decode_only"])
def test_weights_that_change_between_the_steps_of_rows(dense, name):
    """The next step computes with the new ones, for every row."""
    model, ids, found = copy.deepcopy(dense), prompts(3), []
    up, down = model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj
    with pruned_by(model, name, "row") as pruned:
        for forget in (False, True):
            cache, before = start(model, ids), [copy.deepcopy(each.weight) for each in (up, down)]
            logits = steps(model, cache, ids[:, :2])
            up.weight.mul_(1.5)
            down.weight = torch.nn.Parameter(down.weight * 0.5, False)
            if forget:
                pruned.refresh()
            found.append([*logits, *steps(model, cache, ids[:, 2:4])])
            up.weight, down.weight = before
        old = steps(model, start(model, ids), ids[:, :3])
    assert all(map(torch.equal, *found))
    assert (found[0][2] - old[2]).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("turns", ["keep", "decide"])
@pytest.mark.parametrize("group_by", ["row", "cluster"])
def test_turns_of_rows_are_refused(dense, group_by, turns):
    words = rf"group_by: {group_by} excludes turns: {turns}, .*; use turns: refuse"
    options = dict(ratio=0.5, allocator="mlp_only", policy="per_prompt", calibration=iter([]))
    with pytest.raises(SpecError, match=words):
        prune(copy.deepcopy(dense), "pp", group_by=group_by, turns=turns, **options)


# Policies that choose again


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["pruned", "dense"])
def test_repeated_steps_of_a_cropped_cache_equal_steps_that_look_everything_up(dense, repeated, monkeypatch, prompt):  # noqa: F811
    """Cropped after a step that repeats, after one that does not, and to a decision; as if it were never longer."""
    model, ids, more, found = copy.deepcopy(dense), prompts(2), prompts(2, 24, seed=8), []
    with prune(model, "pp", policy=EveryN(n=4, prompt=prompt), **OPTIONS) as pruned:
        straight = start(model, ids)
        steps(model, straight, more[:, [0, 1, 4, 5, 6, 8, 9, 10]])
        wanted = torch.cat(steps(model, straight, more[:, 12:21]))
        for looks_up in (False, True):
            if looks_up:
                assert len(repeated) - repeated.count(0) > 5
                monkeypatch.setattr(Steady, "after", lambda *_: None)
            repeated.clear()
            cache, logits, before = start(model, ids), [], len(pruned.trace)
            for at, count, gone in ((0, 3, 1), (3, 1, 1), (4, 4, 1), (8, 4, 1), (12, 9, 0)):
                logits += steps(model, cache, more[:, at : at + count])
                cache.crop(-gone) if gone else None
            found.append((torch.cat(logits), [record["positions"] for record in pruned.trace[before:]]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0][-len(wanted) :], wanted)
    assert found[0][1] == found[1][1]
    assert found[0][1][::4] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23], [24, 25, 26, 27]]


# Other people's policies


class Counts(Policy):
    """Chooses again after three steps, which it counts in its memory, from the last two tokens."""

    watches: ClassVar[bool] = True
    name: Literal["counts"] = "counts"
    reads: ClassVar[int] = 2

    def again(self, since, memory):
        return memory.get("steps", 0) >= 3

    def watch(self, memory, output, decided):
        return {"steps": 0 if decided else memory["steps"] + 1, "sum": memory.get("sum", 0) + float(output.sum())}


@torch.no_grad()
def test_a_policy_that_watches_sees_every_step(dense):
    model, ids, more, sums = copy.deepcopy(dense), prompts(2), prompts(2, 9, seed=8), []
    attention = model.model.layers[1].self_attn.o_proj
    with prune(model, "pp", policy=Counts(), **OPTIONS) as pruned:
        cache = start(model, ids)
        before = cache.prunekit["memory"]["sum"]
        handle = attention.register_forward_hook(lambda _, args, output: sums.append(output.mean(0).sum(1)))
        steps(model, cache, more)
        handle.remove()
        memory, records = cache.prunekit["memory"], pruned.trace[4:]
    assert [record["positions"] for record in records] == [[14, 15]] * 4 + [[18, 19]] * 4
    own = [float(each) for each in sums if each.numel() == 1]  # without the probes
    assert (memory["steps"], memory["positions"], len(own)) == (1, 21, 9)
    assert memory["sum"] - before == pytest.approx(sum(own), rel=1e-3)
