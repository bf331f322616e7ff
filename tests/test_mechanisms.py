"""The mechanisms of families whose layers need more than names: what is cut along with heads, other linear layers,
arguments of blocks, and caches of several kinds of layers.

That every type of the table is right is shown in test_families.py. Here are their variants, and what is around a cut.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import transformers
from accelerate import cpu_offload
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.engine import per_unit, probing, site_cut
from prunekit.compress.engine.config_view import ConfigView
from prunekit.compress.pruning.checking import ALL, UNITS, Oracle, check_family, greedy, place, randomise
from prunekit.compress.pruning.matching import DecoderCost, Match
from prunekit.compress.pruning.sites import find_sites
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import operations, sliced_operations
from prunekit.registry import DataError, ModelError, ProbeSelector, Rows, SiteScores, UnitArgument
from prunekit.registry.checks import check_sites
from prunekit.registry.checks.parts import some_site
from prunekit.registry.tensors.caches import held, without_caches
from prunekit.strategies.depth import LowestInfluence
from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from tests.test_families import ARCHITECTURES, CATALOG, tiny

FALCON_40B = dict(multi_query=True, new_decoder_architecture=True, num_kv_heads=4)
FALCON_7B = dict(multi_query=True, new_decoder_architecture=False, parallel_attn=True)
FALCON_RW = dict(multi_query=False, new_decoder_architecture=False, parallel_attn=False, alibi=True)
FULL = dict(sliding_window=None, layer_types=None)

VARIANTS = {
    "falcon 7b": ("falcon", FALCON_7B),
    "falcon rw": ("falcon", FALCON_RW),
    "falcon 40b": ("falcon", FALCON_40B),
    "falcon 11b": ("falcon", FALCON_40B | dict(num_ln_in_parallel_attn=1, parallel_attn=True)),
    "command r+": ("cohere", dict(use_qk_norm=True)),
    "stablelm 2": ("stablelm", dict(qk_layernorm=True, use_parallel_residual=True)),
    "diffllama with groups": ("diffllama", dict(num_key_value_heads=4)),
    "bloom post-norm residual": ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    "deepseek v2 lite": ("deepseek_v2", dict(q_lora_rank=None)),
}
WHOLE_GROUPS = ("falcon 40b", "falcon 11b", "diffllama with groups")
"""Variants whose query heads cannot be cut one by one."""


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (3, 10), generator=generator) for _ in range(3)]


def made(name):
    """A random model of a type, or of a variant, in which each weight is random."""
    kind, changes = VARIANTS.get(name, (name, {}))
    return randomise(tiny(kind, **changes))


def architecture_of(model):
    return next(each for each in ARCHITECTURES if model.config.model_type in each.model_types)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name):
    """A third of the 48 combinations."""
    cases = [case for case in ALL if case.unit == "kv_group" or name not in WHOLE_GROUPS][::3]
    kind, changes = VARIANTS[name]
    check_family(tiny(kind, **changes), cases, CATALOG)


@pytest.mark.parametrize("name", WHOLE_GROUPS)
def test_query_heads_that_cannot_be_cut_one_by_one(name, texts):
    model = made(name)
    with pytest.raises(ModelError, match=r"attention_unit: query_head: .*; use attention_unit: kv_group"):
        prune(model, "wanda_sp", ratio=0.4, calibration=texts, catalog=CATALOG, attention_unit="query_head")


WIDE = dict(hidden_size=128, intermediate_size=1600, num_hidden_layers=1, num_attention_heads=8)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("phi3", dict(head_dim=None)), ("gpt_oss", FULL | dict(num_key_value_heads=4)), ("gpt2", dict(n_inner=1600)),
     ("olmo2", {}), ("bloom", {})],
)  # fmt: skip
def test_wide_models_where_the_order_of_sums_matters(kind, changes):
    cases = [case for case in ALL if case.padding == "left" and case.strategy in ("pp", "flap")][::3]
    check_family(tiny(kind, **WIDE, **changes), cases, CATALOG)


CHECKED = [
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "deepseek_v2",
    "llama4_text",
    "jamba",
    "qwen3_next",
    "qwen3_5_text",
    "lfm2",
    "phi3",
    "gpt_oss",
    "granite_swa",
    "olmo2",
    "olmoe",
    "minimax_m2",
    "flex_olmo",
    "gpt2",
    "falcon",
    "bloom",
    "mpt",
    "diffllama",
]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sites_of_variants_pass_their_check(name):
    model = made(name)
    for unit in UNITS if name not in WHOLE_GROUPS else UNITS[:1]:
        check_sites(architecture_of(model), model, unit)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gpt_oss", lambda s: dict(unit_tensors=()), "parameters, the site says"),
        (
            "gpt_oss",
            lambda s: dict(unit_tensors=(replace(s.unit_tensors[0], rows=Rows(0, 1)),)),
            "units own 4 entries of model.layers.0.self_attn.sinks, not all 8 once",
        ),
        (
            "stablelm 2",
            lambda s: dict(unit_tensors=(replace(s.unit_tensors[0], rows=Rows(0, 1)),)),
            "units own 4 entries of model.layers.0.self_attn.q_layernorm.norms, not all 8 once",
        ),
        ("bloom", lambda s: dict(unit_arguments=(UnitArgument("bias"),)), "self_attention has no argument bias"),
        ("bloom", lambda s: dict(residual="stream"), "has no argument stream"),
        ("gptj", lambda s: dict(position_tables=("embed_positions",)), "embed_positions is (64, 4), not (1, 1, P, P)"),
        (
            "olmo2",
            lambda s: dict(selected=(replace(s.selected[0], segments=(Rows(8, 16),)), s.selected[1])),
            "units select 64 outputs of model.layers.0.self_attn.q_norm, not all once",
        ),
        (
            "olmo2",
            lambda s: dict(selected=(replace(s.selected[0], path="model.layers.0.mlp"), s.selected[1])),
            "it calls model.layers.0.self_attn.o_proj before model.layers.0.mlp",
        ),
        ("phi3", lambda s: dict(shape_attributes=(replace(s.shape_attributes[0], per_unit=1),)), "is 8, not 4"),
    ],
)  # fmt: skip
def test_the_check_finds_what_is_wrong(name, change, words):
    model = made(name)
    right = type(architecture_of(model))

    class Wrong(right):
        """Wrong somewhere."""

        def sites(self, model, attention_unit):
            first, *others = super().sites(model, attention_unit)
            return [replace(first, **change(first)), *others]

    with pytest.raises(AssertionError) as caught:
        check_sites(Wrong(), model)
    assert words in str(caught.value)


# Probes of some of the tokens.


class Some(ProbeSelector):
    """Three tokens of two rows."""

    name: Literal["some"] = "some"
    by_row: bool = False

    def select(self, states, valid, generator):
        by_row = torch.tensor([[1, 4, 6], [2, 5, 9]])
        return torch.tensor([0, 2]), by_row if self.by_row else by_row[0]


PROBED = {
    "llama": ("llama", {}),
    **{
        kind: (kind, {})
        for kind in ["gpt_neox", "gptj", "gpt_neo", "qwen3_5_text", "deepseek_v2", "llama4_text", "phi3", "olmo2"]
    },
    **{kind: (kind, {}) for kind in ["gpt2", "bloom", "mpt", "diffllama"]},
    "gpt_oss": ("gpt_oss", FULL),
    "falcon 7b": VARIANTS["falcon 7b"],
    "falcon rw": VARIANTS["falcon rw"],
}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", PROBED)
def test_a_probe_computes_what_the_block_computes_of_these_tokens_alone(name, by_row, texts, monkeypatch):
    """The block, called with the whole batch and a mask that hides all other tokens, gives the same at these tokens."""
    kind, changes = PROBED[name]
    model, probes, run = randomise(tiny(kind, **changes)), [], probing.probe_states

    def noted(cut, given, *chosen):
        states = run(cut, given, *chosen)
        probes.append((cut, given, *chosen[:2], states.clone()))
        return states

    monkeypatch.setattr(probing, "probe_states", noted)
    options = dict(ratio=0.4, calibration=texts, catalog=CATALOG, merger="probe_only", selector=Some(by_row=by_row))
    options["attention_unit"] = "query_head" if name == "falcon 7b" else "kv_group"  # it has one key/value head
    with torch.no_grad(), prune(model, "pp", **options):
        if name == "mpt" and by_row:
            with pytest.raises(ModelError, match=r"is called with position_bias \(8, 1, 64\), which depends on the 10"):
                model(texts[0])
            return
        model(texts[0], use_cache=False)
        for cut, given, rows, positions, states in probes:
            cut.suspend()
            whole = consumed(cut, given, rows, positions)
            taken = [whole[row, positions[n] if by_row else positions] for n, row in enumerate(rows)]
            torch.testing.assert_close(states.reshape(2, 3, -1), torch.stack(taken), rtol=1e-4, atol=1e-5)
    assert {cut.site.kind for cut, *_ in probes} == {"attention", "mlp"} or kind == "gpt_oss"


def consumed(cut, given, rows, positions):
    """What the consumer reads, (3, 10, C), if every token sees itself and the probe's tokens before it."""
    others, seen = without_caches(given.arguments), []
    if cut.site.kind == "attention":
        probed = torch.zeros(3, 10, dtype=torch.bool)
        for number, row in enumerate(rows):
            probed[row, positions[number] if positions.dim() == 2 else positions] = True
        visible = (torch.ones(10, 10, dtype=torch.bool).tril() & probed[:, None, :]) | torch.eye(10, dtype=torch.bool)
        mask, visible = others.get("attention_mask"), visible[:, None]
        if cut.site.entry.endswith("attn") and cut.site.consumer.endswith("attn.out_proj") and mask is not None:
            others["attention_mask"] = mask | ~visible if mask.dtype == torch.bool else mask.masked_fill(~visible, LOW)
        elif mask is None or mask.dtype == torch.bool:
            others["attention_mask"] = visible if mask is None else mask & visible
        else:
            others["attention_mask"] = mask.masked_fill(~visible, LOW)
    handle = cut.binding.consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cut.binding.entry.forward(given.hidden, **others)
    handle.remove()
    return seen[0].reshape(3, 10, -1)


LOW = torch.finfo(torch.float32).min


def test_arguments_of_other_layouts_are_picked_by_token():
    rows, positions, table = torch.tensor([0, 2]), torch.tensor([1, 4]), torch.arange(6 * 5).view(6, 5)
    pick = probing._chosen_tokens
    by_token = torch.arange(3 * 6 * 5).view(3, 6, 5)
    expected = by_token[rows][:, positions]
    assert torch.equal(pick(by_token, 3, 6, rows, positions), expected)
    assert torch.equal(pick(by_token * 1j, 3, 6, rows, positions), expected * 1j)
    assert torch.equal(pick(by_token[:, None], 3, 6, rows, positions), expected[:, None])
    both = torch.stack([by_token, -by_token])
    assert torch.equal(pick(both, 3, 6, rows, positions), torch.stack([expected, -expected]))
    assert torch.equal(pick(table, 3, 6, rows, positions), table[positions])
    assert torch.equal(pick(table[None], 3, 6, rows, positions), table[None, positions])
    assert pick(torch.zeros(3, 2, 6, 6), 3, 6, rows, positions) is None
    assert pick(torch.zeros(6), 3, 6, rows, positions) is None


# Blocks that are not computed.


@pytest.mark.parametrize("name", [*CHECKED, *VARIANTS])
def test_blocks_that_keep_nothing(name, texts):
    """The first layer's blocks add nothing, where there are sites; the residual stream passes, and so do tokens."""
    model = made(name)
    sites = find_sites(model, CATALOG, "kv_group", "keep")[1]
    gone = {kind: [float((layer, kind) in {*map(place, sites)} and not layer) for layer in range(2)] for kind in KINDS}
    oracle = Oracle(model, sites)
    options = dict(calibration=texts, catalog=CATALOG, compensate="none", experts="keep")
    options |= {"allocator": {"name": "explicit", **gone}}
    with torch.no_grad(), prune(model, "wanda_sp", **options) as pruned:
        logits, tokens = model(texts[0], use_cache=False).logits, greedy(model, texts[0], None)
        oracle.zero({place(site): range(site.units) for site in sites} | pruned.sites_kept)
        torch.testing.assert_close(logits, oracle.model(texts[0], use_cache=False).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens, greedy(oracle.model, texts[0], None))


KINDS = ("attention", "mlp")


@pytest.mark.parametrize("use", ["shortgpt", "sleb"])
def test_a_layer_whose_mixer_stays_is_not_said_to_be_gone(use, texts):
    model = made("lfm2")  # a convolution, and an attention
    allocator, last = {"keep_first": 0, "keep_last": 1}, {"keep_first": 1, "keep_last": 0}
    with prune(model, use, ratio=0.2, calibration=texts, catalog=CATALOG, allocator=allocator) as pruned:
        assert pruned.counts[0, "mlp"] == 0 and "gone: 1 of 2 MLPs (layer 0)" in pruned.notes
    with prune(model, use, ratio=0.5, calibration=texts, catalog=CATALOG, allocator=last) as pruned:
        assert "gone: 1 of 2 layers (layer 1)" in pruned.notes


def test_a_mixer_that_stays_does_not_protect_its_mlp():
    def scores(layer, kind, block, layers):
        return SiteScores(some_site(kind, layer), block_statistic=block, layer_statistic=layers)

    sites = [scores(0, "mlp", 0.1, 0.9), scores(1, "attention", 0.5, 0.3), scores(1, "mlp", 0.4, 0.3)]
    assert LowestInfluence().allocate(sites, 0.2)[0] == 0


# Caches.


def test_positions_of_layers_that_do_not_count_them(texts):
    """A layer of linear attention holds what a counting layer does; before its state is written, nothing."""
    model, seen = made("qwen3_5_text"), []
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, at=number: seen.append(held(cache, at, 10)))
    with torch.no_grad():
        model(texts[0], past_key_values=cache)
        model(texts[0], past_key_values=cache)
    assert seen == [0, 0, 10, 10]
    cache.layers.append(cache.layers[0])  # after the layer that counts, which has the tokens of this call already
    assert held(cache, 2, 10) == 10
    with pytest.raises(ValueError, match="get_seq_length"):
        cache.get_seq_length(2)
    cache.layers.pop(1)
    assert held(cache, 0, 10) == 1, "some state, of an unknown number of positions"


def test_a_hybrid_cache_that_was_filled_without_the_pruning_is_refused(texts):
    model = made("lfm2")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(texts[0], past_key_values=cache)
        with prune(model, "pp", ratio=0.4, calibration=texts, catalog=CATALOG):
            with pytest.raises(DataError, match="layer 0: the key/value cache already holds 10 positions"):
                model(texts[0][:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
@torch.no_grad()
def test_a_refused_call_leaves_a_hybrid_cache_as_it_was_and_a_failed_one_is_refused(kind, texts):
    """Its first layer does not count its positions, so that the cache does not show which layers have begun."""
    model = made(kind)
    ids = texts[0]
    with prune(model, "pp", ratio=0.4, calibration=texts, catalog=CATALOG) as pruned:
        found = []
        for mistaken in (False, True):
            pruned.reset()
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            if mistaken:
                with pytest.raises(DataError, match="layer 0: 4 tokens in one call continue"):
                    model(ids[:, :4], past_key_values=cache)
                with pruned.dense(), pytest.raises(DataError, match="layer 0: the key/value cache already holds 10"):
                    model(ids[:, :1], past_key_values=cache)
            found += [model(ids[:, :1], past_key_values=cache).logits]
        assert torch.equal(*found)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 1:2], past_key_values=cache)
        handle.remove()
        with pytest.raises(DataError, match="an earlier call with this key/value cache has failed"):
            model(ids[:, 1:2], past_key_values=cache)


# Configurations, tensors of heads, Conv1D.


def test_a_size_in_the_configuration_changes_for_one_module(texts):
    model = made("phi3")
    config, attention = model.config, [layer.self_attn for layer in model.model.layers]
    shares = {"attention": [0.5, 0.0], "mlp": [0.0, 0.0]}
    allocator = {"name": "explicit", **shares}
    with prune(model, "wanda_sp", calibration=texts, catalog=CATALOG, allocator=allocator):
        assert [each.config.num_attention_heads for each in attention] == [4, 8]
        assert config.num_attention_heads == model.config.num_attention_heads == 8
        assert attention[0].config.hidden_size == config.hidden_size
        twin = copy.deepcopy(model)
        assert twin.model.layers[0].self_attn.config.num_attention_heads == 4
        with torch.no_grad():
            assert torch.equal(twin(texts[0]).logits, model(texts[0]).logits)
    assert all(each.config is config for each in attention)


def test_a_view_is_not_put_over_a_configuration_that_was_set_since(texts):
    model = made("phi3")
    with prune(model, "wanda_sp", ratio=0.4, calibration=texts, catalog=CATALOG):
        own = model.model.layers[0].self_attn.config = copy.deepcopy(model.config)
    assert model.model.layers[0].self_attn.config is own
    assert not any(isinstance(value, ConfigView) for module in model.modules() for value in vars(module).values())


@pytest.mark.parametrize("name", ["gpt_oss", "command r+", "stablelm 2"])
def test_tensors_of_heads_stay_what_they_are(name, texts):
    """State dict, parameters and their gradients are those of the whole tensors, between calls and after an error."""
    model = made(name).requires_grad_(True)
    site = find_sites(model, CATALOG, "kv_group")[1][0]
    module = model.get_submodule(site.unit_tensors[0].path)
    whole, before = getattr(module, site.unit_tensors[0].name), dict(model.state_dict())
    with prune(model, "wanda_sp", ratio=0.5, calibration=texts, catalog=CATALOG) as pruned:
        model(texts[0], use_cache=False).logits.square().mean().backward()
        assert getattr(module, site.unit_tensors[0].name) is whole
        assert list(model.state_dict()) == list(before)
        gradients = [each.grad for each in ([whole] if isinstance(whole, nn.Parameter) else whole.parameters())]
        kept = site.unit_tensors[0].rows.of(torch.tensor(pruned.sites_kept[0, "attention"])).tolist()
        if isinstance(whole, nn.Parameter):
            moved = [bool(row.any()) for row in gradients[0]]
        else:
            moved = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert [number for number, each in enumerate(moved) if each] == kept
        cut = pruned._engine.cuts[0]
        cut.binding.entry.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(texts[0])
        assert getattr(module, site.unit_tensors[0].name) is whole


@pytest.mark.parametrize("name", ["gpt_oss", "command r+", "stablelm 2", "gpt2", "phi3"])
@pytest.mark.parametrize("strategy", ["wanda_sp", "pp"])
def test_offloaded_weights_give_the_same(name, strategy, texts):
    model, found = made(name), []
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    for each in (model, offloaded):
        options = dict(ratio=0.4, calibration=texts, catalog=CATALOG, experts="keep")
        with torch.no_grad(), prune(each, strategy, **options):
            found.append(each(texts[0]).logits)
    assert torch.equal(*found)
    assert torch.equal(model(texts[0]).logits, offloaded(texts[0]).logits)


def test_weights_of_heads_that_change_are_read_anew(texts):
    model = made("gpt_oss")
    with torch.no_grad(), prune(model, "wanda_sp", ratio=0.4, calibration=texts, catalog=CATALOG):
        first = model(texts[0]).logits
        model.model.layers[0].self_attn.sinks += 5
        assert (model(texts[0]).logits - first).abs().max() > 0.1


def test_conv1d_comes_back_as_it_was(texts):
    model = made("gpt2")
    layers = [module for module in model.modules() if isinstance(module, Conv1D)]
    before = [dict(vars(layer)) for layer in layers]
    weights = [(layer.weight, layer.weight.clone(), layer.weight.stride()) for layer in layers]
    with prune(model, "pp", ratio=0.4, calibration=texts, catalog=CATALOG):
        assert not any(type(layer) is Conv1D for layer in layers)
        assert all(layer.weight is weight for layer, (weight, *_) in zip(layers, weights, strict=True))
    assert all(type(layer) is Conv1D and vars(layer) == was for layer, was in zip(layers, before, strict=True))
    assert all(torch.equal(weight, copied) and weight.stride() == stride for weight, copied, stride in weights)


def in_linear_layers(model):
    """A GPT-2 with the same weights in ``nn.Linear`` instead of Conv1D."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data, linear.bias.data = module.weight.data.t().contiguous(), module.bias.data
            twin.set_submodule(name, linear)
    return twin.requires_grad_(False)


@pytest.mark.parametrize(
    "options",
    [
        dict(strategy="pp"), dict(strategy="pp", compensate="least_squares"), dict(strategy="flap"),
        dict(strategy="llm_pruner"), dict(strategy="cfsp"), dict(strategy="wanda_sp", compensate="least_squares"),
        dict(strategy="wanda_sp", allocator="owl"),
    ],
)  # fmt: skip
def test_conv1d_is_pruned_as_the_same_weights_in_linear_layers(options, texts):
    """Scores, decisions, compensation and logits are the same whichever way a weight is stored."""
    model = made("gpt2")
    twin, found = in_linear_layers(model), []
    for each in (model, twin):
        with prune(each, ratio=0.4, calibration=texts, catalog=CATALOG, trace=True, **options) as pruned:
            with torch.no_grad():
                logits = each(texts[0]).logits
            found.append((pruned.sites_kept, pruned.trace, logits))
    assert found[0][0] == found[1][0] and [r["kept"] for r in found[0][1]] == [r["kept"] for r in found[1][1]]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["gpt2", "phi3", "gpt_oss", "olmo2", "falcon 7b", "bloom", "qwen3_5_text", "diffllama"]
)
def test_a_static_cut_costs_what_is_computed_of_its_shapes(name, texts):
    """Counted operations are the floor; parameters are those of the dense model without the units that go."""
    model, options = made(name), dict(calibration=texts, catalog=CATALOG, experts="keep")
    with torch.no_grad(), prune(model, "wanda_sp", ratio=0.4, **options) as pruned:
        subject = Measuring(SimpleNamespace(model=model, tokenizer=None), pruned, no_progress, {})
        cut = operations(subject, texts[0])
        with subject.dense():
            dense = operations(subject, texts[0])
        floor = sliced_operations(model, pruned.all_sites, subject.kept(), dense, texts[0].numel())
        assert sum(cut.values()) == floor < sum(dense.values())


def test_matching_parameters_counts_conv1d_in_layers_that_are_skipped(texts):
    model = made("gpt2")
    sites = find_sites(model, CATALOG, "kv_group")[1]
    models, match = (model, in_linear_layers(model)), Match("parameters")
    costs = [DecoderCost.of(each, each.transformer.h, sites, match) for each in models]
    assert costs[0] == costs[1] and costs[0].dense > 0


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_oss", "olmo2", "falcon 40b", "bloom", "mpt", "stablelm 2"])
def test_padded_export_loads_in_the_stock_class(name, texts, tmp_path):
    model, options = made(name), dict(calibration=texts, catalog=CATALOG, experts="keep")
    with torch.no_grad(), prune(model, "wanda_sp", ratio=0.4, **options) as pruned:
        logits = model(texts[0], use_cache=False).logits
        pruned.save(tmp_path / "out", profile="padded")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again(texts[0], use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


def test_other_subclasses_of_linear_layers_are_refused(texts):
    model = made("gpt_neox")

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.gpt_neox.layers[0].mlp.dense_4h_to_h.__class__ = Doubling
    with pytest.raises(ModelError, match=r"dense_4h_to_h is a .*Doubling, not a plain nn.Linear"):
        prune(model, "wanda_sp", ratio=0.4, calibration=texts, catalog=CATALOG)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bitnet", "normalize all channels together"), ("gemma3n_text", "keys and values")],
)
def test_types_that_cannot_be_served_are_refused_with_the_reason(kind, reason, texts):
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    model = transformers.LlamaForCausalLM(config)
    model.config.model_type = kind
    with pytest.raises(ModelError, match=f"models of type '{kind}' cannot be pruned: .*{reason}"):
        prune(model, "wanda_sp", ratio=0.4, calibration=texts, catalog=CATALOG)


def test_a_block_that_adds_the_residual_stream_is_not_probed_ahead(texts):
    model = made("bloom")
    with pytest.raises(ModelError, match=r"selector ahead: transformer.h.0.mlp is called with residual, too"):
        prune(model, "pp", ratio=0.4, calibration=texts, catalog=CATALOG, selector={"ahead": True})


# What would be wrong is seen.


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("gpt_oss", (per_unit, "_show", lambda *_: None)),
        ("olmo2", (per_unit, "_select", lambda *_: None)),
        ("bloom", (per_unit, "_arguments", lambda *_: None)),
    ],
)
def test_without_its_mechanism_a_family_fails(name, broken, texts, monkeypatch):
    monkeypatch.setattr(*broken)
    with pytest.raises((AssertionError, RuntimeError)):
        check_family(tiny(name), ALL[:1], CATALOG)


def test_without_the_residual_a_block_that_keeps_nothing_is_wrong(texts, monkeypatch):
    monkeypatch.setattr(site_cut.SiteCut, "site", property(lambda cut: replace(cut.binding.site, residual=None)))
    with pytest.raises(AssertionError):
        test_blocks_that_keep_nothing("bloom", texts)
