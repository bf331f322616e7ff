"""A second turn in a filled cache, and a prompt in pieces: the units are kept, or chosen again from the new tokens."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import SpecError
from transformers import DynamicCache, StaticCache

from tests.policy_models import ByCall, prompts, small_model
from tests.test_policies import OPTIONS, POLICIES, generated


@pytest.fixture(scope="module")
def dense():
    return small_model()


TURNS = {
    "per_prompt": ("keep", {}),
    "per_prompt, key/value heads": ("keep", {"attention_unit": "kv_group"}),
    "decode_only": ("keep", {}),
    "prefill_only": ("keep", {}),
    "per_prompt, decided": ("decide", {"allocator": "mlp_only"}),
    "decode_only, decided": ("decide", {}),
    "prefill_only, decided": ("decide", {"allocator": "mlp_only"}),
    "every_n, decided": ("decide", {"allocator": "mlp_only"}),
    "every_n, dense prompt, decided": ("decide", {}),
    "drift, decided": ("decide", {"allocator": "mlp_only"}),
}


def conversation(model, ids, more, kind):
    """Logits of a prompt, two steps, a second turn of five tokens, and three steps."""
    cache = DynamicCache(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=40)
    parts = ids, *more[:, :2].split(1, 1), more[:, 2:7], *more[:, 7:10].split(1, 1)
    found = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, DynamicCache) for name in TURNS), ("per_prompt", StaticCache), ("decode_only, decided", StaticCache)],
)
def test_a_second_turn(dense, name, kind):
    """Kept, the turn runs like steps with the same units; decided, like a prompt: what it kept is checked, too."""
    turns, more_options = TURNS[name]
    policy = POLICIES[name.removesuffix(", decided").removesuffix(", key/value heads")]
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    with prune(model, "pp", policy=policy, turns=turns, **{**OPTIONS, **more_options}) as pruned:
        found = conversation(model, ids, more, kind)
        records, later = pruned.trace, {}
    for record in records:
        first = record["batch"] == records[0]["batch"]
        position = max(record["positions"])
        call = 0 if first else position - 11 if position < 14 else 3 if position < 19 else position - 15
        later.setdefault(call, {})[record["layer"], record["kind"]] = record["kept"]
    kept, now = [], {}
    for call in range(7):
        now = {**now, **later.get(call, {})}
        prompt = call == 0 or (call == 3 and turns == "decide")
        kept.append(now if (policy.prunes_prompt if prompt else policy.prunes_steps) else {})
    assert (3 in later) == (turns == "decide")
    if turns == "decide":
        assert later[3] != later[0], "the turn must choose other units, or the check proves little"
    oracle = ByCall(dense, pruned.sites, kept)
    wanted = conversation(oracle.model, ids, more, kind)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    kept[3] = {} if kept[3] else later[0]
    assert (conversation(ByCall(dense, pruned.sites, kept).model, ids, more, kind) - wanted).abs().max() > 5e-3
    if turns == "decide":  # the units of the turn are those of its own tokens, computed with all units of the site
        for (layer, what), units in later[3].items():
            if what == "mlp":
                weight = dense.model.layers[layer].mlp.down_proj.weight
                scores = oracle.seen[3, layer, "mlp"].flatten(0, 1).square().sum(0) * weight.pow(4).sum(0).sqrt()
                assert units == scores.topk(len(units)).indices.sort().values.tolist()


@torch.no_grad()
@pytest.mark.parametrize("turns", ["keep", "decide"])
@pytest.mark.parametrize("name", ["per_prompt", "decode_only"])
def test_a_prompt_in_pieces_of_rows_that_are_padded(dense, name, turns):
    """The first piece decides for all, or every piece for what follows it."""
    model, ids, mask = copy.deepcopy(dense), prompts(2), torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
    how = dict(attention_mask=mask, prefill_chunk_size=8)
    with prune(model, "pp", policy=name, turns=turns, **{**OPTIONS, "allocator": "mlp_only"}) as pruned:
        tokens, logits = generated(model, ids, **how)
    assert len(pruned.trace) == (2 if turns == "keep" else 4)
    first, last = [{(r["layer"], "mlp"): r["kept"] for r in part} for part in (pruned.trace[:2], pruned.trace[-2:])]
    dense_prompt = name == "decode_only"
    kept = [{} if dense_prompt else first, {} if dense_prompt and turns == "decide" else last, last]
    expected, wanted = generated(ByCall(dense, pruned.sites, kept).model, ids, **how)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, generated(dense, ids, **how)[1], atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("turns", ["keep", "decide"])
@pytest.mark.parametrize("name", ["per_prompt", "decode_only"])
def test_history_learns_from_first_turns_alone(dense, name, turns):
    model, calibration = copy.deepcopy(dense), [{"input_ids": prompts(4, 24, seed=3)}]
    options = OPTIONS | {"allocator": "mlp_only", "merger": "importance_scaled", "calibration": calibration}
    with prune(model, "pp", policy=name, turns=turns, **options) as pruned:
        tables = [[cut.history.table.clone() for cut in pruned.cuts]]
        cache = DynamicCache(config=model.config)
        for part in (prompts(2), prompts(2, 5, seed=8)):
            model(part, past_key_values=cache, use_cache=True)
            tables.append([cut.history.table.clone() for cut in pruned.cuts])
    calibrated, first, second = tables
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, calibrated[1::2], first[1::2]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            "policy per_prompt, turns: decide: layer 0 attention keeps 1 of 2 .*policy: per_prompt with turns: keep",
        ),
        (
            {"attention_unit": "query_head"},
            "a probe of a turn does not see the cache .* allocator: mlp_only, policy: deco",
        ),
        ({"turns": "keep", "policy": "every_n"}, "turns: keep: policy every_n .* use turns: decide"),
        ({"use": "wanda_sp"}, "turns: decide is for strategies that choose units for every prompt"),
    ],
)
def test_turns_that_cannot_be_right_are_refused(dense, options, words):
    options = {"use": "pp", "turns": "decide", **options}
    with pytest.raises(SpecError, match=words):
        prune(copy.deepcopy(dense), options.pop("use"), ratio=0.5, calibration=iter([]), **options)
