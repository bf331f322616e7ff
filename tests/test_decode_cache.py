"""Decisions and key/value caches: a decision belongs to the prompt that filled the cache, and to the pruning."""

import copy
import io
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine.decode_cache import MARK
from prunekit.registry import DataError, ModelError
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from tests.test_generation import greedy, zeroed_copy

KINDS = {
    "dynamic": lambda config: DynamicCache(config=config),
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "fp8": lambda config: QuantizedCache("fp8", config),
}
NO_GPU = not torch.cuda.is_available()
OPTIONS = dict(ratio=0.4, attention_unit="query_head")


class Both(EncoderDecoderCache):
    """An encoder-decoder cache of a model that has a decoder alone."""

    def update(self, *args, **kwargs):
        return self.self_attention_cache.update(*args, **kwargs)


@pytest.fixture
def pp(make_model, batches):
    """A pruned model whose decisions depend on the prompt alone, its copy without the units of the first prompt, and
    two prompts that decide differently."""
    model = make_model("llama-gqa")
    clean, prompts = copy.deepcopy(model), [b["input_ids"][:2, :12] for b in batches[:2]]
    with prune(model, "pp", calibration=batches, merger="probe_only", trace=True, **OPTIONS) as pruned, torch.no_grad():
        for prompt in prompts:
            model(prompt, use_cache=False)
        first, second = pruned.trace[:6], pruned.trace[6:]
        assert [r["kept"] for r in first] != [r["kept"] for r in second]
        yield model, zeroed_copy(clean, pruned, first), prompts


def step(model, cache, ids):
    return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize(
    "kind",
    ["dynamic", "static", "fp8", pytest.param("offloaded", marks=pytest.mark.skipif(NO_GPU, reason="needs CUDA"))],
)
def test_every_kind_of_cache_keeps_the_decision_of_its_prompt(pp, kind):
    model, oracle, prompts = pp
    found = []
    for runs in (model, oracle):
        cache = KINDS[kind](runs.config)
        step(runs, cache, prompts[0])
        found.append([step(runs, cache, prompts[1][:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_sliding_window_shorter_than_the_prompt(make_model, batches, kind):
    """The oldest positions have left the cache, and the decision stays; cropping needs transformers' own recording."""
    model, ids = make_model("mistral", sliding_window=8), batches[0]["input_ids"][:2, :14]
    clean = copy.deepcopy(model)
    with prune(model, "pp", calibration=batches, merger="probe_only", trace=True, **OPTIONS) as pruned:
        found, cache = [], KINDS[kind](model.config)
        found.append([step(model, cache, part) for part in ids.split((12, 1, 1), dim=1)])
        oracle, plain = zeroed_copy(clean, pruned, pruned.trace), KINDS[kind](model.config)
        found.append([step(oracle, plain, part) for part in ids.split((12, 1, 1), dim=1)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        assert len(pruned.trace) == 6
        cache.reset()
        assert torch.equal(step(model, cache, ids), step(model, KINDS[kind](model.config), ids))


@pytest.mark.parametrize("kind", ["dynamic", "static", "wrapper"])
def test_an_emptied_cache_decides_anew(pp, kind):
    model, _, prompts = pp
    make = KINDS.get(kind, lambda config: Both(DynamicCache(config=config), DynamicCache(config=config)))
    used, new = make(model.config), make(model.config)
    step(model, used, prompts[0])
    used.crop(-12) if kind == "dynamic" else used.reset()
    assert torch.equal(step(model, used, prompts[1]), step(model, new, prompts[1]))
    assert torch.equal(step(model, used, prompts[0][:, :1]), step(model, new, prompts[0][:, :1]))


def test_a_cache_keeps_its_decision_in_another_wrapper(pp):
    model, _, prompts = pp
    own, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for ids in (prompts[0], prompts[1][:, :1]):
        wrapped = Both(own, DynamicCache(config=model.config))
        assert torch.equal(step(model, wrapped, ids), step(model, plain, ids))


def test_a_cache_is_cropped_to_its_prompt_and_no_further(pp):
    model, oracle, prompts = pp
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for runs, its in ((model, cache), (oracle, plain)):
        step(runs, its, prompts[0])
        step(runs, its, prompts[1][:, :1])
        its.crop(-1)
    last = prompts[1][:, 1:2]
    torch.testing.assert_close(step(model, cache, last), step(oracle, plain, last), rtol=1e-4, atol=1e-4)
    cache.crop(-8)
    with pytest.raises(DataError, match=r"layer 0: the key/value cache was cropped to 5 positions.* a prompt of 12;"):
        step(model, cache, last)


def test_rows_are_reordered_repeated_and_selected(pp):
    model, oracle, prompts = pp
    found = []
    for runs in (model, oracle):
        cache = DynamicCache(config=runs.config)
        step(runs, cache, prompts[0])
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        found.append([step(runs, cache, prompts[1][:, :1].repeat(2, 1))])
        cache.batch_select_indices(torch.tensor([2]))
        found[-1].append(step(runs, copy.deepcopy(cache), prompts[1][:1, 1:2]))
        found[-1].append(step(runs, cache, prompts[1][:1, 2:3]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", [("pp", {}), ("wanda_sp", {"compensate": "probe_mean"})])
def test_a_prompt_in_pieces_is_refused_where_units_or_means_depend_on_it(make_model, batches, use):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    strategy, options = use
    with prune(model, strategy, calibration=batches, **OPTIONS, **options) as pruned:
        cache = model(ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(DataError, match="layer 0: 4 tokens in one call continue a key/value cache of 8 positions"):
            step(model, cache, ids[:, 8:12])
        with pytest.raises(DataError, match="prefill_chunk_size"):
            greedy(model, ids, prefill_chunk_size=8)
        pruned.freeze("calibration")
        torch.testing.assert_close(greedy(model, ids, prefill_chunk_size=8), greedy(model, ids))


def saved(cache):
    """The cache as another process reads it."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("strategy", ["pp", "flap"])
def test_a_cache_goes_on_with_the_same_pruning_and_with_no_other(make_model, batches, strategy):
    ids = batches[0]["input_ids"]
    options = dict(OPTIONS, calibration=batches, compensate="mean")

    def first():
        return prune(make_model("llama-gqa"), strategy, **options)

    with first() as pruned:
        cache = pruned.model(ids[:, :8], use_cache=True).past_key_values
        stored = saved(cache)
        expected = step(pruned.model, cache, ids[:, 8:9])
    with first() as pruned:
        assert torch.equal(step(pruned.model, copy.deepcopy(stored), ids[:, 8:9]), expected)
        with (
            pruned.dense(),
            pytest.raises(DataError, match="with this pruning, and the model now runs without"),
        ):
            step(pruned.model, copy.deepcopy(stored), ids[:, 8:9])
    others = [("wanda_sp", {}), (strategy, {"ratio": 0.3}), (strategy, {"calibration": batches[:2]})]
    for other, changed in others:
        with prune(make_model("llama-gqa"), other, **{**options, **changed}) as pruned:
            for mode, now in ((torch.no_grad(), "with this"), (pruned.dense(), "without any")):
                with mode, pytest.raises(DataError, match=f"with another pruning, and the model now runs {now}"):
                    step(pruned.model, copy.deepcopy(stored), ids[:, 8:9])


def test_a_cache_has_one_mark_while_it_holds_what_was_pruned(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    cache, marks = StaticCache(config=model.config, max_cache_len=40), []
    for strategy in ("pp", "wanda_sp", "pp"):
        cache.reset()
        with prune(model, strategy, calibration=batches, **OPTIONS) as pruned:
            step(model, cache, ids[:, :8])
            step(model, cache, ids[:, 8:9])
            marks.append([name for name in vars(cache) if name.startswith("prunekit")])
    assert marks == [[MARK]] * 3
    cache.reset()
    with prune(model, "pp", calibration=batches, **OPTIONS) as pruned, pruned.dense():
        step(model, cache, ids[:, :8])
    assert not hasattr(cache, MARK)


# A call that fails


@contextmanager
def raising(model, cache, place):
    """Within it a module of the model raises when it is called, or the cache when it is to store anything."""

    def fail(*_, **__):
        raise RuntimeError(f"no {place} today")

    if place == "cache":
        with patch.object(cache, "update", fail):
            yield
        return
    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


FAILED = "an earlier call with this key/value cache has failed on its way through the layers"
CONVERSATIONS = {
    "prompt": ({}, [12]),
    "step": ({}, [12, 1]),
    "steps that repeat": ({}, [12, 1, 1, 1]),
    "turn": ({"policy": "decode_only", "turns": "decide"}, [12, 1, 5]),
    "step that decides again": ({"policy": {"name": "every_n", "n": 2}}, [12, 1, 1]),
    "rows apart": ({"group_by": "row"}, [12]),
    "decided once": ({"use": "wanda_sp"}, [12, 4]),
}


@torch.no_grad()
@pytest.mark.parametrize("options, lengths", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_failed_call_leaves_its_cache_as_it_was_or_refused(make_model, batches, options, lengths, kind):
    """In the first attention nothing is stored yet; later some layers hold the tokens, and others do not."""
    model, use = make_model("llama-gqa"), {"use": "pp", "merger": "probe_only", **OPTIONS, **options}
    if options.get("use"):
        del use["merger"]
    ids = batches[0]["input_ids"][:2]
    *before, last = ids[:, : sum(lengths)].split(lengths, 1)
    after = batches[1]["input_ids"][:2, :2].split(1, 1)
    with prune(model, use.pop("use"), calibration=batches, **use) as pruned:
        found = {}
        for place in ("none", "model.layers.0.self_attn.q_proj", "cache", "model.layers.1.mlp", "model.norm"):
            pruned._engine.restore(None)
            cache = KINDS[kind](model.config)
            for part in before:
                step(model, cache, part)
            if place != "none":
                with raising(model, cache, place), pytest.raises(RuntimeError, match=f"no {place} today"):
                    step(model, cache, last)
            if place in ("model.layers.1.mlp", "model.norm"):
                stored = saved(cache)
                for again in (cache, copy.deepcopy(cache), stored):
                    for part in (last, after[0]):
                        with pytest.raises(DataError, match=FAILED):
                            step(model, again, part)
                with pruned.dense(), pytest.raises(DataError, match=FAILED):
                    step(model, cache, after[0])
                cache.reset()
                for part in before:
                    step(model, cache, part)
            found[place] = [step(model, cache, part) for part in (last, *after)]
            if "group_by" not in options:
                cache.reorder_cache(torch.tensor([1, 0]))
    for place, logits in found.items():
        assert all(map(torch.equal, logits, found["none"])), place


@torch.no_grad()
def test_a_refused_call_leaves_its_cache_as_it_was(pp):
    model, _, prompts = pp
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for its in (cache, other):
        step(model, its, prompts[0])
    with pytest.raises(DataError, match="4 tokens in one call"):
        step(model, cache, prompts[1][:, :4])
    assert torch.equal(step(model, cache, prompts[1][:, :1]), step(model, other, prompts[1][:, :1]))


@torch.no_grad()
def test_a_prompt_of_rows_apart_that_fails_leaves_the_rows_free_to_move(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"][:2, :12]
    with prune(model, "pp", calibration=batches, group_by="row", **OPTIONS):
        cache = DynamicCache(config=model.config)
        with raising(model, cache, "cache"), pytest.raises(RuntimeError):
            step(model, cache, ids)
    assert not hasattr(cache, MARK)
    step(model, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))


# A layer's index in the cache


@pytest.mark.parametrize("order", [(0, 1, 3), (0, 2, 3), (0, 2, 1, 3)])
def test_layers_taken_out_or_reordered_decode_as_if_numbered_anew(make_model, batches, order):
    found = []
    for renumber in (False, True):
        model = make_model("llama-gqa", num_hidden_layers=4)
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in order])
        for place, layer in enumerate(model.model.layers if renumber else ()):
            layer.self_attn.layer_idx = place
        with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
            model.config.num_hidden_layers = 4
            found.append((greedy(model, batches[0]["input_ids"]).tolist(), pruned.trace))
        assert len(pruned.trace) == 2 * len(order)
    assert found[0] == found[1]


def test_layers_that_share_a_part_of_the_cache_are_refused(make_model, batches):
    model = make_model("llama-gqa")
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    with pytest.raises(ModelError, match=r"layers 1 and 3 both have layer_idx 1, .*layers.3.self_attn.layer_idx = 3"):
        prune(model, "wanda_sp", ratio=0.4, calibration=batches)
    model.model.layers[3].self_attn.layer_idx = 3
    prune(model, "wanda_sp", ratio=0.4, calibration=batches).remove()
