"""Steps that repeat the step before, hybrid caches, and compiled decoding: the same tokens, nothing looked up twice."""

import copy
import gc
from itertools import pairwise, product
from weakref import ref

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine.steady import Steady
from prunekit.registry import DataError
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.policy_models import ByCall, kept_by_call, prompts, small_model
from tests.test_policies import OPTIONS, POLICIES, generated, steps

CALIBRATION = [{"input_ids": prompts(4, 24, seed=3)}]


@pytest.fixture(scope="module")
def dense():
    return small_model()


@pytest.fixture
def repeated(monkeypatch):
    """The positions in the cache at every step that repeated the one before; 0 for a step that did not."""
    found, honest = [], Steady.again

    def again(self, *args):
        found.append(honest(self, *args))
        return found[-1]

    monkeypatch.setattr(Steady, "again", again)
    return found


def start(model, ids, kind=DynamicCache):
    cache = DynamicCache(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=40)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_which_steps_repeat(dense, repeated, name):
    """The first step looks everything up, and so does every one that chooses units, or watches."""
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", policy=POLICIES[name], **OPTIONS | {"trace": False}):
        steps(model, start(model, ids), ids)
    expected = {
        "every_n": [13, 0, 15, 16, 0, 18, 19, 0, 21, 22, 0],
        "every_n, dense prompt": [0, 14, 0, 16, 0, 18, 0, 20, 0, 22, 0],
        "drift": [],
    }
    assert repeated == expected.get(name, [*range(13, 24)])


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_weights_that_change_between_two_steps(dense, strategy, kind):
    """Written to, replaced, or moved: the next step computes with the new ones, as without copies."""
    model, ids, found = copy.deepcopy(dense), prompts(2), []
    options, mlp = {"merger": "probe_only"} if strategy == "pp" else {}, model.model.layers[1].mlp
    up, down = mlp.up_proj, mlp.down_proj
    changes = [
        lambda: None,
        lambda: up.weight.mul_(1.5),
        lambda: setattr(down, "weight", torch.nn.Parameter(down.weight * 0.5, False)),
        lambda: setattr(up.weight, "data", up.weight.data.clone() * 2),
    ]
    with prune(model, strategy, ratio=0.5, calibration=CALIBRATION, **options) as pruned:
        for forget in (False, True):
            cache, logits = start(model, ids, kind), []
            before = [copy.deepcopy(linear.weight) for linear in (up, down)]
            for place, change in enumerate(changes):
                logits += steps(model, cache, ids[:, 2 * place : 2 * place + 1])
                change()
                if forget:
                    pruned.refresh()
                logits += steps(model, cache, ids[:, 2 * place + 1 : 2 * place + 2])
            found.append(logits)
            up.weight, down.weight = before
    assert all(map(torch.equal, *found))
    assert not torch.allclose(found[0][2], found[0][3], atol=0.1)


@torch.no_grad()
def test_other_conversations_modes_and_crops_end_the_repetition(dense, repeated):
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    with prune(model, "pp", **OPTIONS | {"trace": False}) as pruned:
        cache, other = start(model, ids), start(model, more)
        steps(model, cache, more[:, :3])
        repeated.clear()
        steps(model, other, ids[:, :2])
        assert repeated == [0, 13]
        with torch.inference_mode():
            steps(model, other, ids[:, 2:4])
        with torch.enable_grad():
            steps(model, other, ids[:, 4:5])
        assert repeated[2:] == [0, 15, 0]
        steps(model, other, ids[:, 5:7])
        with pruned.dense(), pytest.raises(DataError, match="with this pruning, and the model now runs without any"):
            steps(model, other, ids[:, 7:8])
        other.crop(-8)
        with pytest.raises(DataError, match="cropped to 11 positions"):
            steps(model, other, ids[:, 7:8])
        pruned.refresh()
        repeated.clear()
        steps(model, cache, ids[:, :1])
        assert repeated == []


@torch.no_grad()
def test_a_new_prompt_does_not_keep_the_weights_of_the_last_one(dense):
    """Copies of a site's weights are freed when the site is cut for the next batch, with a cache or without."""
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", **OPTIONS | {"trace": False}) as pruned:
        for use_cache in (True, False):
            steps(model, start(model, ids), ids[:, :2])
            old = [ref(cut.open_cut) for cut in pruned._engine.cuts]
            model(prompts(2, seed=8), use_cache=use_cache)
            gc.collect()
            assert [each() for each in old] == [None] * len(old)


@torch.no_grad()
def test_a_copied_model_and_a_copied_cache_do_not_repeat_steps_of_others(dense, repeated):
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    with prune(model, "pp", **OPTIONS | {"trace": False}) as pruned:
        cache = start(model, ids)
        steps(model, cache, more[:, :3])
        expected = steps(model, copy.deepcopy(cache), more[:, 3:5])
        assert repeated[-2:] == [0, 16]
        copied, handle = copy.deepcopy((model, pruned))
        assert all(map(torch.equal, steps(copied, copy.deepcopy(cache), more[:, 3:5]), expected))
    handle.remove()


# Hybrid caches: layers with a window among layers that hold everything

HYBRID = dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*product(["per_prompt", "decode_only", "every_n"], ["dynamic", "static"]), ("per_prompt", "hybrid")],
)
def test_hybrid_caches(name, implementation):
    clean, ids, policy = small_model("qwen2", **HYBRID), prompts(2), POLICIES[name]
    model, how = copy.deepcopy(clean), {"cache_implementation": implementation}
    with prune(model, "pp", policy=policy, **OPTIONS) as pruned:
        tokens, logits = generated(model, ids, **how)
    kept = kept_by_call(policy, pruned.trace, 12)
    assert any(a != b for a, b in pairwise(kept[1:])) == bool(policy.reads), "units change where they are chosen again"
    expected, wanted = generated(ByCall(clean, pruned.sites, kept).model, ids, **how)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    kept[-1] = kept[-1] | {(1, "mlp"): [*range(48)]}
    assert (generated(ByCall(clean, pruned.sites, kept).model, ids, **how)[1] - wanted).abs().max() > 5e-3


# generate() compiles steps with a static cache, on a GPU automatically


@torch.no_grad()
@pytest.mark.parametrize("name", ["per_prompt", "decode_only", "every_n", "decided once"])
def test_compiled_decoding_with_a_static_cache(dense, name):
    """Two prompts that decide differently; the decoder runs as it is."""
    torch._dynamo.reset()
    counters.clear()
    model, config = copy.deepcopy(dense), CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    policy = POLICIES.get(name)
    use, options = ("pp", {"policy": policy}) if policy else ("wanda_sp", {"calibration": CALIBRATION})
    shared = OPTIONS if policy else {"ratio": 0.5, "trace": True}
    chosen = []
    with prune(model, use, **shared, **options) as pruned:
        for ids in (prompts(2), prompts(2, seed=9)):
            before = len(pruned.trace) if policy else 0
            tokens, logits = generated(model, ids, cache_implementation="static", compile_config=config)
            records = pruned.trace[before:]
            kept = (
                kept_by_call(policy, records, 12) if policy else [{(r["layer"], r["kind"]): r["kept"] for r in records}]
            )
            changes = any(a != b for a, b in pairwise(kept[1:]))
            assert changes == (name == "every_n"), "units change where they are chosen again"
            oracle = ByCall(dense, pruned.sites, kept)
            expected, wanted = generated(oracle.model, ids, cache_implementation="static")
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
            chosen.append(kept)
    wrong = [*kept[:-1], kept[-1] | {(1, "mlp"): [*range(48)]}]
    wrong = generated(ByCall(dense, pruned.sites, wrong).model, ids, cache_implementation="static")[1]
    assert (wrong - wanted).abs().max() > 5e-3
    assert (chosen[0] != chosen[1]) == bool(policy)
    assert hasattr(model, "_compiled_call")
    # What is around the decoder is compiled, and no operation of a layer; a counter as backend would be copied.
    assert 0 < counters["stats"]["calls_captured"] < 10
