"""Generation: the prefill decides, decode steps reuse the decision and a smaller key/value cache."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import DataError
from transformers import DynamicCache, StaticCache

pytestmark = pytest.mark.smoke


def zeroed_copy(model, pruned, records):
    """The dense model with the dropped units' consumer columns set to zero: what generation must equal."""
    oracle = copy.deepcopy(model)
    sites = {(site.layer, site.kind): site for site in pruned.sites}
    for record in records:
        site = sites[record["layer"], record["kind"]]
        dropped = torch.tensor([u for u in range(site.units) if u not in record["kept"]])
        oracle.get_submodule(site.consumer).weight.data[:, site.columns(dropped)] = 0
    return oracle


def greedy(model, prompt, mask=None, **options):
    return model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"])
def test_decode_reuses_the_prefill_decision(make_model, batches, family, unit, padded):
    model = make_model(family)
    clean = copy.deepcopy(model)
    prompt = batches[0]["input_ids"][:, :10]
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :4] = 0
    with prune(model, "pp", ratio=0.4, calibration=batches, attention_unit=unit, trace=True) as pruned:
        tokens = greedy(model, prompt, mask)
        assert {r["batch"] for r in pruned.trace} == {0}
        assert len(pruned.trace) == 6
        oracle = zeroed_copy(clean, pruned, pruned.trace)
        assert torch.equal(tokens, greedy(oracle, prompt, mask))
        pruned.reset()
        assert torch.equal(tokens, greedy(model, prompt, mask, cache_implementation="static"))


def test_the_cache_shrinks_with_key_value_groups(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, calibration=batches):
        cache = model(**batches[0], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (4, 2, 24, 16)


def test_interleaved_generations_keep_their_own_decisions(make_model, batches):
    model = make_model("llama-gqa")
    prompts = [b["input_ids"][:2, :12] for b in batches[:2]]
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 1.0}, trace=True) as pruned:
        alone = []
        for prompt in prompts:
            cache = DynamicCache(config=model.config)
            model(prompt, past_key_values=cache)
            alone.append(model(prompt[:, -1:], past_key_values=cache).logits)
        caches = [DynamicCache(config=model.config) for _ in prompts]
        for prompt, cache in zip(prompts, caches, strict=True):
            model(prompt, past_key_values=cache)
        together = [model(p[:, -1:], past_key_values=c).logits for p, c in zip(prompts, caches, strict=True)]
        kept = [r["kept"] for r in pruned.trace]
    assert kept[:6] != kept[6:12], "the two prompts must decide differently, or the check proves nothing"
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_cache_that_is_reset_decides_afresh(make_model, batches):
    model = make_model("llama-gqa")
    prompts = [b["input_ids"][:, :12] for b in batches[:2]]
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 1.0}, attention_unit="query_head"):
        cache = StaticCache(config=model.config, max_cache_len=24)
        fresh = StaticCache(config=model.config, max_cache_len=24)
        model(prompts[0], past_key_values=cache)
        cache.reset()
        reused = model(prompts[1], past_key_values=cache).logits
        assert torch.equal(reused, model(prompts[1], past_key_values=fresh).logits)


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_cache_filled_otherwise_is_refused(make_model, batches, strategy, kv_heads):
    """Two key/value heads lose none at 40%: only the MLPs are cut then."""
    model = make_model("llama-gqa", num_key_value_heads=kv_heads)
    ids = batches[0]["input_ids"]
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with prune(model, strategy, ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(DataError, match="holds 8 positions that were computed without this pruning"):
            model(ids[:, 8:9], past_key_values=cache)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with pruned.dense(), pytest.raises(DataError, match="holds 8 positions that were computed with this pruning"):
            model(ids[:, 8:9], past_key_values=cache)


@pytest.mark.parametrize("strategy", ["flap", "wanda_sp"])
def test_strategies_that_decide_once_generate(make_model, batches, strategy):
    model = make_model("opt")
    clean = copy.deepcopy(model)
    prompt = batches[0]["input_ids"][:, :10]
    with prune(model, strategy, ratio=0.4, calibration=batches, compensate="none", trace=True) as pruned:
        tokens = greedy(model, prompt)
        assert torch.equal(tokens, greedy(zeroed_copy(clean, pruned, pruned.trace), prompt))
