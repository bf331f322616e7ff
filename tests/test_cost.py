"""Counted operations against formulas, pruned and dense."""

from contextlib import contextmanager

import pytest
import torch
from prunekit.evaluators.cost import Cost, operations
from prunekit.registry import Catalog, DataError, PlainSubject, TextSource

from tests.test_families import tiny

pytestmark = pytest.mark.smoke

B, T = 2, 24


def prefill_flops(config, tokens, context, heads=None, width=None, kv_heads=None):
    """Formula for a LLaMA-like prefill: projections, full-square attention, MLP, output layer."""
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    heads = heads or config.num_attention_heads
    kv_heads = kv_heads or config.num_key_value_heads
    width = width or config.intermediate_size
    layer = 2 * hidden * size * (2 * heads + 2 * kv_heads) + 4 * context * heads * size + 6 * hidden * width
    return tokens * (config.num_hidden_layers * layer + 2 * hidden * config.vocab_size)


def counted_flops(model, ids):
    return sum(operations(PlainSubject(model), ids).values())


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [T, 17])
def test_a_prefill_is_counted_exactly(make_model, family, attention, length):
    model = make_model(family, attention=attention)
    ids = torch.randint(97, (B, length))
    assert counted_flops(model, ids) == prefill_flops(model.config, B * length, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_the_same(make_model, dtype):
    model = make_model("llama-gqa").to(dtype)
    assert counted_flops(model, torch.randint(97, (B, T))) == prefill_flops(model.config, B * T, T)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "opt"])
def test_attention_kernels_count_like_written_out_attention(make_model, family):
    ids = torch.randint(97, (B, T))
    assert counted_flops(make_model(family), ids) == counted_flops(make_model(family, attention="eager"), ids) > 0


@pytest.fixture
def subject(make_model):
    """A model whose MLP is 64 of 192 channels narrower, except in ``dense()``; ``shown`` are its batches."""
    narrow, wide = make_model("llama-gqa", intermediate_size=128), make_model("llama-gqa")
    current = [narrow]

    class Switch:
        config = wide.config
        get_input_embeddings = wide.get_input_embeddings

        def __call__(self, **kwargs):
            found.shown.append(kwargs["input_ids"])
            return current[0](**kwargs)

    @contextmanager
    def dense():
        current[0] = wide
        try:
            yield
        finally:
            current[0] = narrow

    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, **_):
            return {"input_ids": [3 + ord(character) % 90 for character in text]}

    found = PlainSubject(Switch(), Tokenizer(), ["some text " * 6])
    found.dense, found.parameters = dense, lambda: sum(p.numel() for p in current[0].parameters())
    found.shown = []
    return found


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "cost") is Cost


def test_pruned_and_dense_are_counted_on_the_same_batch(subject):
    found = Cost(batch_size=B, length=T).evaluate(subject)
    config = subject.model.config
    dense, pruned = prefill_flops(config, 1, T), prefill_flops(config, 1, T, width=128)
    saved = 3 * 3 * 64 * 128
    assert found.values["flops"] == pruned and found.values["dense_flops"] == dense
    assert found.values["flops_ratio"] == pruned / dense < 1
    assert found.values["dense_parameters"] - found.values["parameters"] == saved
    assert found.values["parameters_ratio"] == pytest.approx(1 - saved / found.values["dense_parameters"])
    settling, first, settling_dense, second = subject.shown
    assert first.equal(second) and first.shape == (1, T)
    assert settling.equal(settling_dense) and settling.equal(first[:, :8])
    assert found.protocol["batch_size"] == B and found.protocol["length"] == T
    assert found.protocol["text"] == "random ids, seed 0"
    assert "probe and compensation included" in found.protocol["flops"]


def test_a_batch_that_is_decided_on_runs_whole(subject):
    once = Cost(batch_size=B, length=T).evaluate(subject).values
    per_batch = type("PerBatch", (PlainSubject,), {"depends_on_batch": True})
    subject.__class__ = per_batch
    subject.shown.clear()
    assert Cost(batch_size=B, length=T).evaluate(subject).values == once
    assert [tuple(ids.shape) for ids in subject.shown] == [(1, 8), (B, T), (1, 8), (1, T)]


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "gemma3_text", "mixtral", "qwen3_moe"])
def test_every_row_takes_the_same_operations(model_type):
    model = tiny(model_type)
    ids = torch.randint(2, 30, (3, T))
    assert counted_flops(model, ids) == 3 * counted_flops(model, ids[:1])


def test_random_tokens_follow_the_seed(subject):
    for seed in (0, 0, 1):
        Cost(batch_size=B, length=T, seed=seed).evaluate(subject)
    first, again, other = subject.shown[1], subject.shown[5], subject.shown[9]
    assert first.equal(again) and not first.equal(other)
    assert int(first.min()) >= 0 and int(first.max()) < 97


def test_real_tokens_can_be_asked_for(subject):
    text = TextSource(bundled="reference-evaluation")
    found = Cost(batch_size=2, length=20, text=text).evaluate(subject)
    ids = [1] + [3 + ord(character) % 90 for character in ("some text " * 6)[:19]]
    assert subject.shown[1].reshape(-1).tolist() == ids
    assert found.protocol["text"] == "bundled reference-evaluation"
    with pytest.raises(DataError, match=r"has 61 tokens, and a batch of 4 x 20 takes 80"):
        Cost(batch_size=4, length=20, text=text).evaluate(subject)


def test_length_is_at_most_the_context(subject):
    assert Cost(batch_size=1, length=5000).evaluate(subject).protocol["length"] == 256
