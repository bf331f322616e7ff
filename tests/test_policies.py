"""Policies: with every one, generation equals the dense model whose units are zeroed call by call, or is refused."""

import copy
import io
import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import yaml
from prunekit.compress import Pipeline, PipelineSpec, prune
from prunekit.compress.models.small import small_model as built
from prunekit.registry import Catalog, DataError, ModelError, PerPrompt, SpecError
from prunekit.strategies.policies import DecodeOnly, Drift, EveryN, PrefillOnly
from transformers import DynamicCache, StaticCache

from tests.policy_models import ByCall, kept_by_call, prompts, small_model

OPTIONS = dict(ratio=0.5, attention_unit="query_head", selector="whole_batch", merger="probe_only", trace=True)
OFTEN = dict(tokens=2, margin=1e-6, deviations=0.0, pressure=1, window=4)
POLICIES = {
    "per_prompt": PerPrompt(),
    "prefill_only": PrefillOnly(),
    "decode_only": DecodeOnly(),
    "every_n": EveryN(n=3),
    "every_n, dense prompt": EveryN(n=2, prompt="dense"),
    "drift": Drift(**OFTEN),
}
OTHERS = [name for name in POLICIES if name != "per_prompt"]
MASK = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])
WAYS = {
    "greedy": {},
    "static cache": dict(cache_implementation="static"),
    "beams": dict(num_beams=3),
    "samples": dict(do_sample=True, num_return_sequences=2),
    "left padding": dict(attention_mask=MASK),
}


@pytest.fixture(scope="module")
def dense():
    return small_model()


def generated(model, ids, **how):
    torch.manual_seed(0)
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = {} if ids is None else {"inputs": ids}
    found = model.generate(**{**options, **given, **how}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", POLICIES)
def test_generation_equals_zeroing(dense, name, way):
    model, ids, policy = copy.deepcopy(dense), prompts(2), POLICIES[name]
    with prune(model, "pp", policy=policy, **OPTIONS) as pruned:
        tokens, logits = generated(model, ids, **WAYS[way])
        kept = kept_by_call(policy, pruned.trace, ids.shape[1])
        if policy.reads:
            assert any(a != b for a, b in pairwise(kept[1:])), "units must change, or the check proves nothing"
        oracle = ByCall(dense, pruned.sites, kept)
    expected, wanted = generated(oracle.model, ids, **WAYS[way])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert len(set(tokens[0, 12:].tolist())) > 2
    kept[-1] = kept[-1] | {(1, "mlp"): [*range(48)]}
    assert (generated(ByCall(dense, pruned.sites, kept).model, ids, **WAYS[way])[1] - wanted).abs().max() > 5e-3


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_padding_chooses_no_units(dense, name):
    """A row of which four tokens are padding gets the tokens, and the units, of the row without them."""
    model, ids, found = copy.deepcopy(dense), prompts(1), []
    with prune(model, "pp", policy=POLICIES[name], **OPTIONS) as pruned:
        for how in ({"inputs": ids, "attention_mask": MASK[:1]}, {"inputs": ids[:, 4:]}):
            before = len(pruned.trace)
            tokens, logits = generated(model, None, **how)
            found.append((tokens[:, -10:], logits, [record["kept"] for record in pruned.trace[before:]]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][2] == found[1][2]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_without_a_cache_every_step_chooses_anew(dense):
    model, ids, kept = copy.deepcopy(dense), prompts(2), {}
    with prune(model, "pp", **OPTIONS) as pruned:
        tokens, logits = generated(model, ids, use_cache=False)
    for record in pruned.trace:
        kept.setdefault(record["batch"], {})[record["layer"], record["kind"]] = record["kept"]
    assert len(kept) == 10 and any(a != b for a, b in pairwise(kept.values()))
    expected, wanted = generated(ByCall(dense, pruned.sites, [*kept.values()]).model, ids, use_cache=False)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("way", ["quantized cache", "embeddings"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_generate(dense, name, way):
    model, ids, policy = copy.deepcopy(dense), prompts(2), POLICIES[name]
    how = dict(cache_implementation="quantized", cache_config={"backend": "fp8"}) if way == "quantized cache" else {}
    given = {"inputs_embeds": dense.get_input_embeddings()(ids)} if way == "embeddings" else {"inputs": ids}
    with prune(model, "pp", policy=policy, **OPTIONS) as pruned:
        tokens = generated(model, None, **given, **how)[0]
    oracle = ByCall(dense, pruned.sites, kept_by_call(policy, pruned.trace, 12))
    assert torch.equal(tokens, generated(oracle.model, None, **given, **how)[0])


FAMILIES = {
    "opt": {"allocator": "mlp_only"},  # its MLP is not a module
    "mistral": {"sliding_window": 8},  # the oldest positions leave the cache
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["decode_only", "every_n", "prefill_only"])
def test_other_families(name, family):
    options = dict(FAMILIES[family])
    window = {"sliding_window": options.pop("sliding_window")} if family == "mistral" else {}
    clean, ids, policy = small_model(family, **window), prompts(2), POLICIES[name]
    model = copy.deepcopy(clean)
    with prune(model, "pp", policy=policy, **options, **OPTIONS) as pruned:
        tokens, logits = generated(model, ids)
    oracle = ByCall(clean, pruned.sites, kept_by_call(policy, pruned.trace, 12))
    expected, wanted = generated(oracle.model, ids)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


# What a further decision is made of


def energy_kept(x, weight, count):
    """The channels that PPsp keeps by the tokens x (N, C) alone; weight (O, C)."""
    scores = x.square().sum(0) * weight.pow(4).sum(0).sqrt()
    return scores.topk(count).indices.sort().values.tolist()


@torch.no_grad()
def test_a_step_decides_from_the_tokens_since_the_last_decision(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", policy=EveryN(n=3), **OPTIONS) as pruned:
        generated(model, ids)
        records = pruned.trace
    assert [r["positions"] for r in records[4::4]] == [[12, 13, 14], [15, 16, 17], [18, 19, 20]]
    oracle = ByCall(dense, pruned.sites, kept_by_call(EveryN(n=3), records, 12))
    generated(oracle.model, ids)
    for record in records[4:]:
        if record["kind"] == "mlp":
            calls = [position - 11 for position in record["positions"]]
            x = torch.cat([oracle.seen[call, record["layer"], "mlp"].flatten(0, 1) for call in calls])
            weight = dense.model.layers[record["layer"]].mlp.down_proj.weight
            assert record["kept"] == energy_kept(x, weight, 48)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_is_probed_with_the_tokens_of_the_steps_alone(dense, attention):
    """Three tokens attend to each other at their own positions, and to nothing before them, with all query heads."""
    model, ids, calls = small_model(attention=attention), prompts(1), []
    with prune(model, "pp", policy=EveryN(n=3), **OPTIONS) as pruned:
        generated(model, ids)
        records = [r for r in pruned.trace[4:] if (r["layer"], r["kind"]) == (1, "attention")]
    oracle = ByCall(dense, pruned.sites, kept_by_call(EveryN(n=3), pruned.trace, 12))
    block = oracle.model.model.layers[1].self_attn

    def keep(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        calls.append((kwargs["hidden_states"], cos, sin))

    block.register_forward_pre_hook(keep, with_kwargs=True)
    generated(oracle.model, ids)
    for number, record in enumerate(records):
        hidden, cos, sin = (torch.cat(each, 1)[0] for each in zip(*calls[3 * number + 1 : 3 * number + 4], strict=True))

        def heads(linear, rotated, hidden=hidden, cos=cos, sin=sin):
            x = linear(hidden).view(3, -1, 16).transpose(0, 1)
            turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
            return x * cos + turned * sin if rotated else x

        query = heads(block.q_proj, True)
        key, value = (heads(block.k_proj, True), heads(block.v_proj, False))
        scores = query @ key.repeat_interleave(2, 0).transpose(1, 2) / 4
        weights = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
        x = (weights @ value.repeat_interleave(2, 0)).transpose(0, 1).reshape(3, 64)
        energy = (x.square().sum(0) * block.o_proj.weight.pow(4).sum(0).sqrt()).view(4, 16).norm(dim=1)
        assert record["kept"] == energy.topk(2).indices.sort().values.tolist()
    assert len(records) == 3


@torch.no_grad()
def test_drift_decides_by_the_output_of_the_last_attention(dense):
    """An independent count of the steps in which the output has moved gives the steps that decide."""
    model, ids, outputs, policy = copy.deepcopy(dense), prompts(1), [], Drift(**OFTEN | {"margin": 0.02})
    with prune(model, "pp", policy=policy, **OPTIONS) as pruned:
        generated(model, ids, max_new_tokens=40)
        records = pruned.trace
    oracle = ByCall(dense, pruned.sites, kept_by_call(policy, records, 12))
    attention = oracle.model.model.layers[1].self_attn.o_proj
    attention.register_forward_hook(lambda module, args, output: outputs.append(output.mean((0, 1))))
    generated(oracle.model, ids, max_new_tokens=40)
    base, last, cosines, decides, moved = outputs[0], [], [], [], False
    for call, output in enumerate(outputs[1:], 1):
        last = [*last, output][-2:]
        if moved:
            decides.append(call)
            base, last, cosines, moved = torch.stack(last).mean(0), [], [], False
        elif len(last) == 2:
            cosine = torch.cosine_similarity(torch.stack(last).mean(0), base, dim=0).item()
            moved = bool(cosines) and cosine < sum(cosines) / len(cosines) - 0.02
            cosines.append(cosine)
    assert len(decides) > 1 and max(b - a for a, b in pairwise([0, *decides])) > 4
    for before, call, record in zip([0, *decides], decides, records[4::4], strict=False):
        assert record["positions"] == [*range(max(before + 1, call - 3) + 11, call + 12)]
    assert [max(r["positions"]) - 11 for r in records[4::4]] == decides


def test_the_deviation_of_drift_is_that_of_the_cosines_since_the_decision():
    policy, generator = Drift(tokens=1, margin=1e-9, deviations=1.0, pressure=3), torch.Generator().manual_seed(0)
    outputs = [torch.randn(4, generator=generator) for _ in range(40)]
    memory = policy.watch({}, outputs[0], True)
    cosines, count = [], 0
    for output in outputs[1:]:
        memory = policy.watch(memory, output, False)
        cosine = torch.cosine_similarity(output, outputs[0], dim=0)
        if cosines:
            known = torch.stack(cosines)
            count += bool(cosine < known.mean() - known.std(correction=0))
        cosines.append(cosine)
        assert memory["pressure"] == count
        assert policy.again(5, memory) == (count >= 3)
    assert 3 < count < 20


# What a step costs


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_copies_and_decides_only_where_its_policy_says(dense, name):
    model, ids, more, done = copy.deepcopy(dense), prompts(2), prompts(2, 7, seed=8), []
    options = OPTIONS | {"policy": POLICIES[name], "merger": "importance_scaled", "trace": False}
    with prune(model, "pp", calibration=[{"input_ids": prompts(4, 24)}], **options) as pruned:
        cache = DynamicCache(config=model.config)
        for part in (ids, *more.split(1, 1)):
            stages = set()

            def note(stage, stages=stages):
                stages.add(stage)
                return nullcontext()

            with pruned.watch(note):
                model(part, past_key_values=cache, use_cache=True)
            done.append(stages)
            assert name != "prefill_only" or not any(cut.open_cut for cut in pruned.cuts), "its copies are freed"
    decides, copies = {"select", "probe", "score"}, {"gather"}
    prompt = decides | {"history"} | (copies if POLICIES[name].prunes_prompt else set())
    assert done[0] == prompt
    expected = {
        "per_prompt": [set()] * 7,
        "prefill_only": [set()] * 7,
        "decode_only": [copies, *[set()] * 6],
        "every_n": [set(), set(), decides | copies] * 2 + [set()],
        "every_n, dense prompt": [copies, decides | copies, *[set(), decides | copies] * 2, set()],
    }
    if name in expected:
        assert done[1:] == expected[name]


# Caches


def steps(model, cache, ids):
    return [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", OTHERS)
def test_interleaved_conversations_do_not_mix(dense, name, kind):
    model, first, second = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    make = DynamicCache if kind == "dynamic" else lambda config: StaticCache(config=config, max_cache_len=40)
    options = OPTIONS | {"trace": False}
    with prune(model, "pp", policy=POLICIES[name], **options):
        alone = []
        for prompt, other in ((first, second), (second, first)):
            cache = make(config=model.config)
            alone.append([model(prompt, past_key_values=cache, use_cache=True).logits, *steps(model, cache, other)])
        caches = [make(config=model.config) for _ in range(2)]
        both = [
            [model(p, past_key_values=c, use_cache=True).logits] for p, c in zip((first, second), caches, strict=True)
        ]
        for i in range(12):
            for place, other in enumerate((second, first)):
                both[place] += steps(model, caches[place], other[:, i : i + 1])
        for expected, found in zip(alone, both, strict=True):
            assert all(map(torch.equal, expected, found))
        caches[0].reset() if kind == "static" else caches[0].crop(-24)
        again = model(second, past_key_values=caches[0], use_cache=True).logits
        assert torch.equal(again, alone[1][0])
        assert all(map(torch.equal, steps(model, caches[0], first), alone[1][1:]))


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_goes_on_as_a_copy_and_from_a_file(dense, name):
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    with prune(model, "pp", policy=POLICIES[name], **OPTIONS):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        steps(model, cache, more[:, :2])
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        others = copy.deepcopy(cache), torch.load(file, weights_only=False)
        expected = steps(model, cache, more[:, 2:])
        for other in others:
            assert all(map(torch.equal, steps(model, other, more[:, 2:]), expected))


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_prompt_in_pieces_a_second_turn_and_no_cache_are_refused(dense, name):
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", policy=POLICIES[name], **OPTIONS) as pruned:
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        with pytest.raises(DataError, match="4 tokens in one call continue a key/value cache of 8 positions"):
            model(ids[:, 8:], past_key_values=cache, use_cache=True)
        with pytest.raises(DataError, match="prefill_chunk_size"):
            generated(model, ids, prefill_chunk_size=8)
        with pytest.raises(SpecError, match="assisted generation"):
            generated(model, ids[:1], prompt_lookup_num_tokens=3)
        words = rf"generate\(use_cache=False\): policy {POLICIES[name].name} .* use policy: per_prompt"
        with pytest.raises(SpecError, match=words):
            generated(model, ids, use_cache=False)
        with pruned.dense():
            expected = generated(dense, ids, use_cache=False)
            assert torch.equal(generated(model, ids, use_cache=False)[0], expected[0])
    with prune(model, "pp", **OPTIONS | {"policy": "per_prompt"}):
        generated(model, ids, use_cache=False)


@torch.no_grad()
def test_a_cache_is_cropped_to_its_last_decision_and_no_further(dense):
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    for name in ("every_n", "drift", "decode_only"):
        with prune(model, "pp", policy=POLICIES[name], **OPTIONS):
            cache, straight = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for each in (cache, straight):
                model(ids, past_key_values=each, use_cache=True)
            steps(model, cache, more[:, :5])
            cache.crop(-1)
            steps(model, straight, more[:, :4])
            if name == "drift":
                with pytest.raises(DataError, match="cropped to 16 positions, and policy drift has read later ones"):
                    steps(model, cache, more[:, 3:4])
                continue
            assert all(map(torch.equal, steps(model, cache, more[:, 5:9]), steps(model, straight, more[:, 5:9])))
            cache.crop(-3)
            if name == "every_n":
                with pytest.raises(
                    DataError, match=r"layer 0 attention: .* cropped to 17 positions, and policy every_n"
                ):
                    steps(model, cache, more[:, 3:4])


@torch.no_grad()
@pytest.mark.parametrize("name", ["every_n", "drift", "decode_only", "prefill_only"])
def test_rows_are_repeated_and_selected(dense, name):
    """Tokens that were read of other rows do not count."""
    model, ids, more = copy.deepcopy(dense), prompts(2), prompts(2, seed=8)
    with prune(model, "pp", policy=POLICIES[name], **OPTIONS):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        steps(model, cache, more[:, :1])
        cache.batch_repeat_interleave(2)
        repeated = steps(model, cache, more[:, 1:8].repeat_interleave(2, 0))
        assert all(torch.equal(each[0], each[1]) and torch.equal(each[2], each[3]) for each in repeated)
        cache.batch_select_indices(torch.tensor([1]))
        steps(model, cache, more[:1, 8:])


@torch.no_grad()
def test_a_cache_of_another_policy_is_refused(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    cache = DynamicCache(config=model.config)
    with prune(model, "pp", policy="decode_only", **OPTIONS):
        model(ids, past_key_values=cache, use_cache=True)
    with prune(model, "pp", policy="prefill_only", **OPTIONS), pytest.raises(DataError, match="with another pruning"):
        steps(model, cache, ids[:, :1])


# Without a cache, frozen, copied


@torch.no_grad()
def test_scoring_is_dense_or_pruned_as_a_prompt_is(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    expected = dense(ids, use_cache=False).logits
    with prune(model, "pp", policy="decode_only", **OPTIONS):
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    with prune(model, "pp", **OPTIONS):
        pruned = model(ids, use_cache=False).logits
    with prune(model, "pp", policy="prefill_only", **OPTIONS):
        assert torch.equal(model(ids, use_cache=False).logits, pruned)
    assert not torch.allclose(pruned, expected, atol=0.1)


@torch.no_grad()
def test_freezing_keeps_what_a_dense_prompt_has_chosen(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", policy="decode_only", **OPTIONS) as pruned:
        pruned.freeze("last", [{"input_ids": ids}])
        kept = {(r["layer"], r["kind"]): r["kept"] for r in pruned.trace}
        found = model(ids).logits
        assert torch.equal(generated(model, ids, use_cache=False)[0], generated(model, ids)[0])
    torch.testing.assert_close(found, ByCall(dense, pruned.sites, [kept]).model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_history_learns_all_channels_of_a_dense_prompt(dense):
    model, ids = copy.deepcopy(dense), prompts(3)
    merger = {"name": "importance_scaled", "momentum": 0.75}
    options = OPTIONS | {"merger": merger, "calibration": [{"input_ids": prompts(4)}]}
    with prune(model, "pp", policy="decode_only", **options) as pruned:
        before = [cut.history.table.clone() for cut in pruned.cuts]
        generated(model, ids)
        oracle = ByCall(dense, pruned.sites, [{}])
        oracle.model(ids)
        for cut, known in zip(pruned.cuts, before, strict=True):
            observed = oracle.seen[0, cut.site.layer, cut.site.kind].square().mean(0)
            torch.testing.assert_close(cut.history.table, 0.75 * known + 0.25 * observed)


@torch.no_grad()
def test_a_copied_model_goes_on_and_a_removed_policy_leaves_nothing(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "pp", policy=Drift(**OFTEN), **OPTIONS) as pruned:
        expected = generated(model, ids)[0]
        copied, handle = copy.deepcopy((model, pruned))
    assert torch.equal(generated(copied, ids)[0], expected)
    handle.remove()
    for each in (model, copied):
        assert torch.equal(generated(each, ids)[1], generated(dense, ids)[1])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())


@torch.no_grad()
def test_compensation_in_steps_that_decide(dense):
    """Every call's bias is the mean contribution of the units that it drops."""
    model, ids, biases = copy.deepcopy(dense), prompts(2), []
    calibration = [{"input_ids": prompts(4, 24, seed=3)}]
    options = OPTIONS | {"compensate": "mean", "calibration": calibration}
    with prune(model, "pp", policy=EveryN(n=2, prompt="dense"), **options) as pruned:
        tokens, logits = generated(model, ids)
        kept = kept_by_call(EveryN(n=2, prompt="dense"), pruned.trace, 12)
        means = {(cut.site.layer, cut.site.kind): cut.history.mean for cut in pruned.cuts}
    oracle = ByCall(dense, pruned.sites, kept)
    for site in pruned.sites:

        def add(module, args, output, place=(site.layer, site.kind), site=site):
            units = oracle.kept[min(oracle.call, len(oracle.kept) - 1)].get(place)
            if units is None:
                return output
            lost = means[place].index_fill(0, site.columns(torch.tensor(units)), 0)
            biases.append(module.weight @ lost)
            return output + biases[-1]

        oracle.model.get_submodule(site.consumer).register_forward_hook(add)
    expected, wanted = generated(oracle.model, ids)
    assert torch.equal(tokens, expected) and len(biases) > 8
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


# Refused before anything is computed


def unread():
    raise AssertionError("calibration was read")
    yield


@pytest.mark.parametrize("policy", ["prefill_only", "decode_only", "every_n", "drift"])
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (
            "llama-gqa",
            {},
            "layer 0 attention keeps 1 of 2 units.*; nearest: allocator: mlp_only, attention_unit: query_head, or",
        ),
        (
            "opt",
            {"attention_unit": "query_head"},
            "layer 0 attention keeps 2 of 4 units.*: allocator: mlp_only, or",
        ),
        (
            "llama-gqa",
            {"allocator": {"name": "explicit", "attention": [0, 0], "mlp": [1, 0]}, "ratio": None},
            "layer 0 mlp keeps 0 of 96 units, and a block that keeps nothing is gone in all calls; nearest:",
        ),
    ],
)
def test_what_a_cache_cannot_honour_is_refused(policy, family, options, words):
    model = small_model(family)
    with pytest.raises(SpecError, match=f"policy {policy}: {words}.* policy: per_prompt$"):
        prune(model, "pp", policy=policy, calibration=unread(), **{"ratio": 0.5, **options})
    prune(model, "pp", policy=policy, ratio=0.5, applier="zero", merger="probe_only").remove()


BUILT = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4}}
OF_POSITIONS = "layer 0 attention keeps .* adds terms of positions .*: allocator: mlp_only, policy: decode_"


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "policy", "words", "nearest"),
    [
        (
            "mixtral",
            "decode_only",
            "layer 0 expert 0 .* routed experts .*: experts: keep, or",
            {"experts": "keep"},
        ),
        ("bloom", "every_n", OF_POSITIONS, {"policy": "decode_only"}),
        ("gpt_neo", "drift", OF_POSITIONS, {"allocator": "mlp_only"}),
    ],
)
def test_sites_that_a_policy_cannot_prune_are_refused_with_what_works(kind, policy, words, nearest):
    options = dict(ratio=0.5, policy=policy, merger="probe_only", attention_unit="query_head")
    options |= {} if kind == "mixtral" else {"applier": "zero"}
    model = built(kind, **BUILT.get(kind, {}))
    with pytest.raises(SpecError, match=f"policy {policy}: {words}.* policy: per_prompt$"):
        prune(model, "pp", calibration=unread(), **options)
    with prune(model, "pp", **options | nearest):
        generated(model, prompts(2))


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("wanda_sp", {}, "chooses them once; use policy: per_prompt"),
        ("pp", {"selector": {"ahead": True}}, "excludes ahead: true of the selector"),
        ("pp", {"policy": "each_token"}, "each_token"),
        ("pp", {"policy": {"name": "every_n", "n": 0}}, "greater than or equal to 1"),
    ],
)
def test_policies_that_do_not_fit_the_strategy(strategy, options, words):
    with pytest.raises(SpecError, match=words):
        prune(small_model(), strategy, **{"policy": "decode_only", "ratio": 0.5, **options})


def test_a_model_without_a_known_attention_cannot_be_watched(dense):
    from prunekit.compress.engine.policies import watch_attention

    class Named:
        policy = Drift()

    with pytest.raises(ModelError, match="policy drift watches the output of the last attention"):
        watch_attention(dense, [], Named())


# Prompts longer than the calibration text


@torch.no_grad()
@pytest.mark.parametrize("storage", [{}, {"dtype": "float16", "pool": 4}])
def test_a_prompt_longer_than_the_history_is_refused_or_extends_it(dense, storage):
    model, calibration = copy.deepcopy(dense), [{"input_ids": prompts(4, 20, seed=3)}]
    options = dict(
        ratio=0.5, calibration=calibration, merger={"name": "history_only", "momentum": 0.5}, history=storage
    )
    long = prompts(2, 30)
    with prune(model, "pp", **options) as pruned:
        with pytest.raises(DataError, match=r"30 positions .* filled for 20.*long_prompts: extend"):
            model(long)
        table = [cut.history.at(torch.arange(20)) for cut in pruned.cuts]
    with prune(model, "pp", long_prompts="extend", selector="whole_batch", trace=True, **options) as pruned:
        model(long)
        for cut, known, record in zip(pruned.cuts, table, pruned.trace, strict=True):
            whole = torch.cat([known, known[4:].mean(0).expand(10, -1)])
            torch.testing.assert_close(cut.state.history.positions, 20)
            weight = pruned.model.get_submodule(cut.site.consumer).weight
            scores = (whole.sum(0) * weight.pow(4).sum(0).sqrt()).view(cut.site.units, -1).norm(dim=1)
            assert record["kept"] == scores.topk(cut.count).indices.sort().values.tolist()
        changed = [cut.history.at(torch.arange(20)) for cut in pruned.cuts]
        assert not any(torch.equal(a, b) for a, b in zip(changed, table, strict=True)), "the first positions learn"
        model(prompts(1, 60))


# Other people's policies

OUTSIDE = '''
from typing import ClassVar, Literal

from prunekit.registry import Policy, hookimpl


class Thirds(Policy):
    """Decode steps choose units again after every third token, which it counts in its memory."""

    watches: ClassVar[bool] = True
    name: Literal["thirds"] = "thirds"

    @property
    def reads(self):
        return 3

    def again(self, since, memory):
        return memory["steps"] >= 2

    def watch(self, memory, output, decided):
        return {"steps": 0 if decided else memory.get("steps", 0) + 1, "last": output}


@hookimpl
def policies():
    return [Thirds]
'''


@torch.no_grad()
def test_a_policy_from_a_file_equals_the_built_in_one(dense, tmp_path):
    (tmp_path / "thirds.py").write_text(OUTSIDE)
    catalog, found = Catalog.discover([tmp_path / "thirds.py"], block=""), {}
    for policy in ("thirds", EveryN(n=3), "per_prompt"):
        with prune(copy.deepcopy(dense), "pp", policy=policy, catalog=catalog, **OPTIONS) as pruned:
            found[str(policy)] = generated(pruned.model, prompts(2))
    mine, built_in, once = found.values()
    assert torch.equal(mine[0], built_in[0]) and torch.equal(mine[1], built_in[1])
    assert not torch.equal(mine[1], once[1])


def test_a_policy_from_a_file_in_a_run_and_in_generate(small_pipeline, command, tmp_path):
    (tmp_path / "thirds.py").write_text(OUTSIDE)
    content = small_pipeline(use="pp", ratio=0.5, attention_unit="query_head", merger="probe_only")
    evaluator = {"name": "continuation", "text": content["evaluate"][0]["text"]}
    evaluator |= {"prompt_length": 6, "length": 12, "prompts": 4}
    content |= {"plugins": [str(tmp_path / "thirds.py")], "evaluate": [evaluator]}
    values, answers = [], []
    for policy in ("thirds", {"name": "every_n", "n": 3}, "per_prompt"):
        content["prune"] = content["prune"] | {"policy": policy}
        values.append(Pipeline(PipelineSpec.of(content)).measure().record.metrics[0].pruned)
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
        code, output = command(
            "generate",
            tmp_path / "p.yaml",
            "--prompt",
            "w5 w17 w40",
            "--max-new-tokens",
            12,
            "--json",
            "--device",
            "cpu",
        )
        assert code == 0
        (answer,) = json.loads(output[output.index("{") :])["pp"]["answers"]
        answers.append(answer["answer"])
    assert values[0] == values[1] != values[2]
    assert answers[0] == answers[1] != answers[2]
