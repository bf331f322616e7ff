"""Strategies that decide once: every way to generate gives the tokens of the dense model whose units are zeroed."""

import copy
import io

import pytest
import torch
from prunekit.compress import prune
from transformers import DynamicCache, StaticCache

from tests.policy_models import ByCall, prompts, small_model
from tests.test_policies import MASK, WAYS, generated, steps
from tests.test_steady import HYBRID, start
from tests.test_turns import conversation

CALIBRATION = [{"input_ids": prompts(4, 24, seed=3)}]
ALL_WAYS = WAYS | {
    "embeddings": {},
    "quantized cache": dict(cache_implementation="quantized", cache_config={"backend": "fp8"}),
    "no cache": dict(use_cache=False),
    "a prompt in pieces": dict(prefill_chunk_size=5),
    "a prompt in pieces, left padding": dict(prefill_chunk_size=5, attention_mask=MASK),
}


def pruned_and_zeroed(clean, unit):
    """A pruned model, and two copies of the dense one: its dropped units are zero, or those of one MLP wrong."""
    model = copy.deepcopy(clean)
    pruned = prune(model, "wanda_sp", ratio=0.5, calibration=CALIBRATION, attention_unit=unit, trace=True)
    kept = {(record["layer"], record["kind"]): record["kept"] for record in pruned.trace}
    assert kept.keys() == {(layer, kind) for layer in range(2) for kind in ("attention", "mlp")}
    wrong = kept | {(1, "mlp"): [*range(48)]}
    return model, *(ByCall(clean, pruned.sites, [units]).model for units in (kept, wrong))


@pytest.fixture(scope="module")
def models():
    """By family and unit of attention. A cache that rounds its values needs query heads: they leave it whole."""
    return {
        "kv_group": pruned_and_zeroed(small_model(), "kv_group"),
        "query_head": pruned_and_zeroed(small_model(), "query_head"),
        "hybrid": pruned_and_zeroed(small_model("qwen2", **HYBRID), "kv_group"),
        "hybrid, query_head": pruned_and_zeroed(small_model("qwen2", **HYBRID), "query_head"),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("which", "way"),
    [
        *(("query_head" if way == "quantized cache" else "kv_group", way) for way in ALL_WAYS),
        ("query_head", "left padding"),
        ("query_head", "beams"),
        ("hybrid", "greedy"),
        ("hybrid", "static cache"),
        ("hybrid", "left padding"),
        ("hybrid", "a prompt in pieces"),
        ("hybrid, query_head", "greedy"),
        ("hybrid, query_head", "static cache"),
        ("hybrid, query_head", "a prompt in pieces"),
    ],
)
def test_ways_to_generate(models, which, way):
    ids, how, found = prompts(2), ALL_WAYS[way], []
    for model in models[which]:
        given = {"inputs_embeds": model.get_input_embeddings()(ids)} if way == "embeddings" else {"inputs": ids}
        found.append(generated(model, None, **given, **how))
    (tokens, logits), (expected, wanted), (_, wrong) = found
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert (wrong - wanted).abs().max() > 5e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("which", ["kv_group", "query_head", "hybrid", "hybrid, query_head"])
def test_a_second_turn(models, which, kind):
    found, wanted, wrong = (conversation(model, prompts(2), prompts(2, seed=8), kind) for model in models[which])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (wrong - wanted).abs().max() > 5e-3


@torch.no_grad()
def test_conversations_in_turns_and_caches_that_are_cropped_copied_saved_and_moved(models):
    """One conversation of two rows, one of three; every cache goes on as that of the zeroed model does."""
    found = []
    for model in models["kv_group"]:
        caches = [start(model, prompts(rows, seed=rows)) for rows in (2, 3)]
        more, logits = [prompts(rows, seed=8) for rows in (2, 3)], []
        for at in range(4):
            for cache, ids in zip(caches, more, strict=True):
                logits += steps(model, cache, ids[:, at : at + 1])
        caches[0].crop(-6)  # into the prompt
        file = io.BytesIO()
        torch.save(caches[1], file)
        file.seek(0)
        copied, stored = copy.deepcopy(caches[0]), torch.load(file, weights_only=False)
        for cache, ids in ((copied, more[0]), (stored, more[1]), (caches[0], more[0])):
            logits += steps(model, cache, ids[:, 4:6])
        stored.batch_repeat_interleave(2)
        stored.reorder_cache(torch.tensor([5, 0, 1, 2, 3, 4]))
        stored.batch_select_indices(torch.tensor([0, 1]))
        found.append(torch.cat([*logits, *steps(model, stored, more[0][:, 6:8])]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert (found[2] - found[1]).abs().max() > 5e-3
