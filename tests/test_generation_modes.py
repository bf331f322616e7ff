"""Every way to generate gives the tokens of the same cut made by zeroing, or is refused by name."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import DataError, SpecError
from transformers import DynamicCache, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tests.test_generation import greedy, zeroed_copy

WAYS = {
    "beams": dict(num_beams=3),
    "several answers": dict(num_beams=3, num_return_sequences=2),
    "samples": dict(do_sample=True, num_return_sequences=2),
    "static cache": dict(cache_implementation="static"),
    "quantized cache": dict(cache_implementation="quantized", cache_config={"backend": "fp8"}),
    "a cache of one's own": dict(),
    "embeddings": dict(),
}
DRAFTS = [dict(prompt_lookup_num_tokens=3), dict(assistant_early_exit=1), dict(assistant_model=None)]
MLP_ALONE = dict(ratio=None, allocator={"name": "explicit", "attention": [0, 0, 0], "mlp": [0.5, 0.5, 0.5]})


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(make_model, batches, way):
    model, prompt = make_model("llama-gqa"), batches[0]["input_ids"][:2, :12]
    clean = copy.deepcopy(model)

    def tokens(runs):
        torch.manual_seed(0)
        given = {"inputs_embeds": runs.get_input_embeddings()(prompt)} if way == "embeddings" else {"input_ids": prompt}
        own = {"past_key_values": DynamicCache(config=runs.config)} if way == "a cache of one's own" else {}
        return runs.generate(
            **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **given, **own, **WAYS[way]}
        )

    # With units of query heads the oracle's cache holds the same keys and values, for a cache that rounds all of them.
    options = dict(ratio=0.4, calibration=batches, attention_unit="query_head", trace=True)
    with prune(model, "pp", **options) as pruned:
        found = tokens(model)
        assert len(pruned.trace) == 6
        assert torch.equal(found, tokens(zeroed_copy(clean, pruned, pruned.trace)))


@torch.no_grad()
@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: next(iter(draft)))
def test_drafts_give_greedy_tokens_or_are_refused(make_model, batches, draft):
    model, prompt = make_model("llama-gqa"), batches[0]["input_ids"][:1, :12]
    if "assistant_model" in draft:
        draft = {"assistant_model": make_model("llama-gqa", num_hidden_layers=1)}
    dense = greedy(model, prompt)
    for strategy, options in (("pp", {}), ("wanda_sp", {"compensate": "probe_mean"})):
        with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
            with pytest.raises(SpecError, match=f"assisted generation .*: {strategy} would choose units from"):
                greedy(model, prompt, **draft)
            with pruned.dense():
                assert torch.equal(greedy(model, prompt, **draft), dense)
            pruned.freeze("calibration")
            assert torch.equal(greedy(model, prompt, **draft), greedy(model, prompt))
        assert torch.equal(greedy(model, prompt, **draft), dense)


@torch.no_grad()
def test_a_pruned_model_drafts_for_another(make_model, batches):
    draft, model = make_model("llama-gqa"), make_model("llama-gqa", seed=3)
    prompt = batches[0]["input_ids"][:1, :12]
    dense = greedy(model, prompt)
    with prune(draft, "wanda_sp", ratio=0.4, calibration=batches):
        assert torch.equal(greedy(model, prompt, assistant_model=draft), dense)
    with prune(draft, "pp", ratio=0.4, calibration=batches), pytest.raises(DataError, match=r"pruned.freeze\(\)"):
        greedy(model, prompt, assistant_model=draft)


def together(model, prompts):
    """Continuations of both prompts by continuous batching."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=16)
    found = model.generate_batch(prompts.tolist(), generation_config=config, continuous_batching_config=pages)
    return torch.tensor([answer.generated_tokens for answer in found.values()])


@torch.no_grad()
@pytest.mark.parametrize("options", [MLP_ALONE, {"ratio": 0.4, "applier": "zero"}], ids=["mlp", "zero"])
def test_continuous_batching_where_the_cache_keeps_its_size(make_model, batches, options):
    model, prompts = make_model("llama-gqa"), batches[0]["input_ids"][:2, :12]
    with prune(model, "wanda_sp", calibration=batches, **options) as pruned:
        assert torch.equal(together(model, prompts), greedy(model, prompts)[:, 12:])
        with pruned.dense(), pytest.raises(SpecError, match=r"in a thread of its own.*pruned.suspended\(\)"):
            together(model, prompts)
        with pruned.suspended():
            dense = together(model, prompts)
    assert torch.equal(dense, greedy(model, prompts)[:, 12:])


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("wanda_sp", "cut layer 0 attention to 2 of 4; use generate.., or export with profile hf-uniform"),
        ("pp", "pp would choose the same units for all requests; use generate"),
    ],
)
def test_continuous_batching_is_refused(make_model, batches, strategy, words):
    model, prompts = make_model("llama-gqa"), batches[0]["input_ids"][:2, :12]
    with prune(model, strategy, ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(SpecError, match=words):
            together(model, prompts)
        with pytest.raises(SpecError, match=words):
            greedy(model, prompts, cache_implementation="paged")
        copied, _ = copy.deepcopy((model, pruned))
        with pytest.raises(SpecError, match=words):
            together(copied, prompts)
    assert "init_continuous_batching" not in vars(model)
