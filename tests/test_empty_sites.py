"""Sites that keep nothing: their blocks are not computed, and the model is as if they were not there."""

import copy
from dataclasses import replace
from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.architectures import Llama
from prunekit.compress.models.loading import Loaded
from prunekit.compress.pruning.matching import Match
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import Cost, operations
from prunekit.evaluators.latency import Latency
from prunekit.evaluators.parts import MLP, PROJECTIONS, SCORES
from prunekit.registry import Catalog
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

FAMILIES = ["llama-gqa", "qwen2", "qwen3", "opt"]
GONE = [(0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")]
"""A layer's attention, another's MLP, a whole layer; the first layer has no key/value cache."""
PARTS_OF = {"attention": (PROJECTIONS, SCORES), "mlp": (MLP,)}


def explicit(gone, layers=3):
    shares = {kind: [float((layer, kind) in gone) for layer in range(layers)] for kind in ("attention", "mlp")}
    return {"name": "explicit", **shares}


def without(model, gone=GONE, use="magnitude", **options):
    return prune(model, use, allocator=explicit(gone, len(layers_of(model))), **options)


def layers_of(model):
    return model.get_decoder().layers


def block_modules(layer, kind):
    """Norm, and the modules that compute the block."""
    if kind == "attention":
        return [getattr(layer, "input_layernorm", None) or layer.self_attn_layer_norm, layer.self_attn]
    mlp = [layer.mlp] if hasattr(layer, "mlp") else [layer.fc1, layer.fc2]
    return [getattr(layer, "post_attention_layernorm", None) or layer.final_layer_norm, *mlp]


@torch.no_grad()
def by_hand(model, gone=GONE):
    """A copy of the model whose blocks' outputs are zero: the output layers' weights and biases are."""
    other = copy.deepcopy(model)
    for layer, kind in gone:
        found = layers_of(other)[layer]
        last = found.self_attn if kind == "attention" else getattr(found, "mlp", found)
        for name in ("o_proj", "out_proj") if kind == "attention" else ("down_proj", "fc2"):
            if hasattr(last, name):
                for parameter in getattr(last, name).parameters():
                    parameter.zero_()
    return other


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_is_gone_adds_nothing(make_model, ids, family):
    model = make_model(family)
    dense, expected = model(ids).logits, by_hand(model)(ids).logits
    assert not torch.allclose(dense, expected, atol=1e-2)  # the cut is felt
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with without(model) as pruned:
        assert torch.equal(model(ids).logits, expected)
        assert pruned.counts[0, "attention"] == pruned.counts[2, "mlp"] == 0 and pruned.counts[0, "mlp"] == 192
        assert pruned.kept()[2, "attention"] == ()
        with pruned.dense():
            assert torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    with without(model, applier="zero"):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_nothing_of_the_block_is_computed(make_model, ids, family):
    model = make_model(family)
    called = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or "norm" in type(module).__name__.lower():
            module.register_forward_hook(lambda module, args, out: called.add(module) if out.numel() else None)
    with without(model):
        model(ids)
    for layer in range(3):
        for kind in ("attention", "mlp"):
            _, *block = block_modules(layers_of(model)[layer], kind)
            first = next(m for top in block for m in top.modules() if isinstance(m, torch.nn.Linear))
            assert (first in called) == ((layer, kind) not in GONE), (layer, kind)


@torch.no_grad()
def test_the_consumers_bias_goes_too_and_the_mean_stays_where_it_is_asked_for(make_model, batches, ids):
    model = make_model("opt")
    bare = by_hand(model)
    seen = []
    attention = layers_of(model)[0].self_attn
    handle = attention.out_proj.register_forward_hook(lambda m, a, out: seen.append(out.flatten(0, -2)))
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    mean = torch.cat(seen).mean(0)
    options = dict(gone=[(0, "attention")], use="wanda_sp", calibration=batches)
    with without(model, **options):
        assert torch.equal(model(ids).logits, by_hand(model, [(0, "attention")])(ids).logits)
    with without(model, **options, compensate="mean"):
        found = model(ids).logits
        added = layers_of(model)[0].self_attn(torch.zeros(1, 2, 128))[0]
        assert torch.allclose(added, mean.expand(1, 2, -1), atol=1e-4) and mean.abs().max() > 0.1
    bare = by_hand(model, [(0, "attention")])
    layers_of(bare)[0].self_attn.out_proj.bias.data.copy_(mean)
    assert torch.allclose(found, bare(ids).logits, atol=1e-3)
    with without(model, **options, compensate="mean", applier="zero"):
        assert torch.allclose(model(ids).logits, found, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_continues_as_without_a_cache(make_model, ids, family, implementation):
    model = make_model(family)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=mask, pad_token_id=0)
    expected = by_hand(model).generate(ids, use_cache=False, **options)
    assert not torch.equal(expected, model.generate(ids, use_cache=False, **options))
    with without(model):
        kind = {} if implementation == "dynamic" else {"cache_implementation": "static"}
        found = model.generate(ids, return_dict_in_generate=True, **kind, **options)
        assert torch.equal(found.sequences, expected)
        layers = found.past_key_values.layers
        held = [layer.keys.numel() for layer in layers if layer.is_initialized]
        assert [size > 0 for size in held] == [False, True, False]
        assert int(found.past_key_values.get_seq_length()) == 17
        beams = model.generate(ids, num_beams=2, **kind, **options)
    assert torch.equal(beams, by_hand(model).generate(ids, num_beams=2, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("gone", [[(0, "attention")], [(1, "attention")], [(0, "attention"), (1, "attention")]])
def test_hybrid_caches_count_the_tokens_of_every_kind(make_model, gone):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = dict(num_hidden_layers=4, layer_types=kinds, sliding_window=6, use_sliding_window=True)
    model = make_model("qwen2", **sizes)
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(5))
    whole = by_hand(model, gone)(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        with without(model, gone):
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 3, 1, 1, 1], 1)]
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-3), type(cache).__name__


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_cache_that_is_made_without_a_configuration(make_model, ids):
    model = make_model("llama-gqa")
    whole = by_hand(model)(ids, use_cache=False).logits
    cache = DynamicCache()
    with without(model):
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 4, 3], 1)]
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-3)
        cache.crop(-4)
        again = model(ids[:, 8:], past_key_values=cache).logits
        assert torch.allclose(again, whole[:, 8:], atol=1e-3)
        chunked = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=5)
        assert torch.equal(chunked, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("selector", [{}, {"selector": {"name": "residual_norm", "ahead": True}}], ids=["", "ahead"])
def test_a_strategy_that_decides_per_batch_leaves_blocks_out_for_all_batches(make_model, batches, ids, selector):
    model = make_model("llama-gqa")
    shares = explicit(GONE)
    shares["attention"][1], shares["mlp"][0] = 0.5, 0.4
    options = dict(allocator=shares, calibration=batches, **selector)
    with prune(model, "pp", **options, trace=True) as pruned:
        sliced = model(ids).logits
        decided = {(r["layer"], r["kind"]) for r in pruned.trace if r["batch"] is not None}
        assert decided == {(0, "mlp"), (1, "attention")}
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with prune(model, "pp", **options, applier="zero"):
        assert torch.allclose(model(ids).logits, sliced, atol=1e-3)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert not torch.allclose(model(ids).logits, sliced, atol=1e-2)


@torch.no_grad()
def test_reconstruct_calibrates_past_blocks_that_are_gone(make_model, batches, ids):
    model = make_model("qwen2")
    shares = explicit(GONE)
    shares["mlp"][0] = 0.3
    found = {}
    for applier in ("slice", "zero"):
        with prune(model, "reconstruct", allocator=shares, calibration=batches, applier=applier):
            found[applier] = model(ids).logits
    assert torch.allclose(found["slice"], found["zero"], atol=1e-3)


@torch.no_grad()
def test_a_copy_of_the_model_has_its_own_absent_blocks(make_model, ids):
    model = make_model("llama-gqa")
    dense = model(ids).logits
    pruned = without(model)
    other = copy.deepcopy(model)
    expected = model(ids).logits
    pruned.remove()
    assert torch.equal(other(ids).logits, expected) and torch.equal(model(ids).logits, dense)


class ThreeValues(LlamaAttention):
    """Returns three values, as older releases of transformers do."""

    def forward(self, hidden_states, **kwargs):
        return *super().forward(hidden_states, **kwargs), None


class TwoValues(LlamaMLP):
    """Returns two values, as an MLP with experts does."""

    def forward(self, x):
        return super().forward(x), x.sum()


class OtherLayer(LlamaDecoderLayer):
    """Takes them apart."""

    def forward(self, hidden_states, **kwargs):
        added, _, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + added
        added, _ = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + added


class OtherLlama(Llama):
    """A Llama whose sites say what their entries return."""

    name: Literal["other_llama"] = "other_llama"
    model_types: tuple[str, ...] = ("other_llama",)

    def sites(self, model, attention_unit):
        values = {"attention": 3, "mlp": 2}
        return [replace(site, returns=values[site.kind]) for site in super().sites(model, attention_unit)]


@torch.no_grad()
def test_an_absent_block_returns_as_many_values_as_its_site_says(make_model, ids, monkeypatch):
    model = make_model("llama-gqa")
    expected = by_hand(model)(ids).logits
    for layer in model.model.layers:
        layer.__class__, layer.self_attn.__class__, layer.mlp.__class__ = OtherLayer, ThreeValues, TwoValues
    monkeypatch.setattr(model.config, "model_type", "other_llama", raising=False)
    catalog = Catalog.discover()
    (llama,) = [entry for entry in catalog.of_role("architectures") if entry.name == "llama"]
    catalog.entries.append(replace(llama, name="other_llama", component=OtherLlama))
    with without(model, catalog=catalog):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(("family", "unit"), [("llama-gqa", "query_head"), ("opt", "kv_group")])
def test_cost_is_that_of_the_other_blocks_and_time_is_measured(make_model, ids, family, unit):
    model = make_model(family)
    gone = {(part, layer) for layer, kind in GONE for part in PARTS_OF[kind]}
    with without(model, attention_unit=unit) as pruned:
        expected = model(ids).logits
        subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
        found = operations(subject, ids)
        with subject.dense():
            dense = operations(subject, ids)
        assert all(dense[key] for key in gone)
        assert {key: n for key, n in found.items() if n} == {
            key: n for key, n in dense.items() if n and key not in gone
        }
        cost = Cost(batch_size=2, length=16).evaluate(subject).values
        assert cost["over_floor"] == 1 and cost["parameters"] == pruned.active_parameters()
        time = Latency(batch_size=2, length=16, decode_steps=2, pairs=1, warmup=0).evaluate(subject)
        assert min(time.values["prefill_seconds"], time.values["decode_seconds"]) > 0
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_parameters_and_cost_of_a_layer_that_is_gone_are_those_of_a_shorter_model(make_model, family):
    whole = [(1, "attention"), (1, "mlp")]
    model, shorter = make_model(family), make_model(family, num_hidden_layers=2)
    expected = sum(parameter.numel() for parameter in shorter.parameters())
    for unit in ("kv_group", "query_head"):
        with without(model, whole, attention_unit=unit) as pruned:
            assert pruned.active_parameters() == expected
            for match in (Match("parameters"), Match("flops", length=16, batch_size=1)):
                assert pruned.decoder_cost(match).lost(pruned.counts) == pytest.approx(1 / 3)
