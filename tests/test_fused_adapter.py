"""An adapter by ``sites()``: GPT-NeoX Japanese has one layer for all heads, and its cache is ``layer_past``."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.models.architectures import Llama
from prunekit.registry import Catalog, DataError, ModelError
from prunekit.registry.checks import check_sites, sites
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tests.test_generation import greedy, zeroed_copy
from tests.test_plugin_docs import EXAMPLES


@pytest.fixture
def neox(tmp_path):
    """A small GPT-NeoX Japanese, the catalog with the adapter of docs/plugins.md, and the adapter."""
    file = tmp_path / "neox.py"
    (source,) = [source for source in EXAMPLES if "gpt_neox_japanese" in source]
    file.write_text(source)
    catalog = Catalog.discover(files=[file], block="")
    config = transformers.GPTNeoXJapaneseConfig(
        vocab_size=97, hidden_size=128, intermediate_multiple_size=2, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, hidden_dropout=0.0, attention_dropout=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model.requires_grad_(False), catalog, catalog.get("architectures", "gpt_neox_japanese")()


def test_the_adapter_fits(neox):
    model, _, adapter = neox
    check_sites(adapter, model)
    check_sites(adapter, model, "query_head")


@pytest.mark.parametrize("applier", ["slice", "zero"])
@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
def test_a_cache_of_another_name_is_found(neox, batches, strategy, applier):
    """Logits, the cache's length and greedy tokens are those of the dense model without the units that were dropped."""
    model, catalog, _ = neox
    clean, prompt = copy.deepcopy(model), batches[0]["input_ids"]
    options = dict(ratio=0.4, calibration=batches, catalog=catalog, applier=applier, trace=True)
    with prune(model, strategy, **options) as pruned:
        cache = DynamicCache(config=model.config)
        logits = model(prompt, past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == prompt.shape[1]
        oracle = zeroed_copy(clean, pruned, pruned.trace[:6])
        torch.testing.assert_close(logits, oracle(prompt, use_cache=True).logits, rtol=1e-4, atol=1e-4)
        pruned.reset()
        assert torch.equal(greedy(model, prompt), greedy(oracle, prompt))


def test_the_check_finds_a_probe_that_fills_the_cache(neox, monkeypatch):
    """Were the cache left out by one name alone, the check would say so."""
    model, _, adapter = neox
    monkeypatch.setattr(
        sites, "without_caches", lambda given: {k: v for k, v in given.items() if k != "past_key_values"}
    )
    with pytest.raises(AssertionError, match=r"gpt_neox_japanese.layers.0.attention writes to the key/value"):
        check_sites(adapter, model)


class Hidden:
    """Holds a cache, and does not say so."""

    def __init__(self, cache):
        self.cache = cache


def test_the_check_finds_a_cache_that_is_no_argument(make_model):
    model = make_model("llama-gqa")

    def hide(layer, args, kwargs):
        return args, {**kwargs, "past_key_values": None, "state": Hidden(kwargs["past_key_values"])}

    for layer in model.model.layers:
        attend = layer.self_attn.forward

        def forward(hidden_states, past_key_values=None, state=None, attend=attend, **others):
            return attend(hidden_states, past_key_values=state.cache, **others)

        layer.self_attn.forward = forward
        layer.register_forward_pre_hook(hide, with_kwargs=True)
    with pytest.raises(AssertionError, match=r"layer 0 attention: model.layers.0.self_attn writes to the key/value"):
        check_sites(Llama(), model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entry": "model.layers.0"}, "a pass must call model.layers.0.input_layernorm, then model.layers.0, then"),
        (
            {"norm": "model.layers.0.post_attention_layernorm"},
            "it calls model.layers.0.self_attn before model.layers.0.post_attention_layernorm",
        ),
        ({"norm": "model.layers.1.input_layernorm"}, "it calls model.layers.0.self_attn before model.layers.1.input"),
        ({"norm": "model.layers.0.self_attn"}, "it calls model.layers.0.self_attn once, for both"),
        ({"norm": "model.layers.0.mlp.spare"}, "a pass never calls model.layers.0.mlp.spare"),
    ],
)
def test_the_check_finds_wrong_places(make_model, change, words):
    class Wrong(Llama):
        """Wrong somewhere."""

        def sites(self, model, attention_unit):
            first, *others = super().sites(model, attention_unit)
            return [replace(first, **change), *others]

    model = make_model("llama-gqa")
    model.model.layers[0].mlp.spare = torch.nn.Identity()
    with pytest.raises(AssertionError) as caught:
        check_sites(Wrong(), model)
    assert words in str(caught.value)


class Adding(LlamaMLP):
    """An MLP that wants the residual stream, too."""

    def forward(self, x, residual):
        return super().forward(x)


def test_the_check_finds_an_mlp_that_needs_more(make_model):
    model = make_model("llama-gqa")
    for layer in model.model.layers:
        layer.mlp.__class__ = Adding
        layer.mlp.register_forward_pre_hook(lambda mlp, args: (*args, args[0]))
    with pytest.raises(AssertionError, match=r"layer 0 mlp: model.layers.0.mlp cannot run as in a probe: .*'residual'"):
        check_sites(Llama(), model)


class Apart(LlamaAttention):
    """Takes cosines and sines as arguments of their own, and returns states alone."""

    def forward(self, hidden_states, cosines, sines, position_embeddings=None, **others):
        return super().forward(hidden_states, (cosines, sines), **others)[0]


def rename(layer, args, kwargs):
    """Give a layer's attention cosines and sines apart."""
    cosines, sines = kwargs.pop("position_embeddings")
    return args, {**kwargs, "cosines": cosines, "sines": sines}


@pytest.mark.parametrize("selector", ["residual_norm", "spread"])
def test_arguments_by_other_names_are_per_token_or_refused(make_model, batches, selector):
    """Also a bias of every pair of positions, of which a probe cannot take a part."""
    found, ids = [], batches[0]["input_ids"]
    for apart in (False, True):
        model = make_model("llama-gqa")
        for layer in model.model.layers if apart else ():
            layer.self_attn.__class__ = Apart
            layer.register_forward_pre_hook(rename, with_kwargs=True)
            layer.self_attn.register_forward_hook(lambda attention, args, out: (out, None))
        with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, selector=selector) as pruned:
            found.append((model(ids, use_cache=False).logits, [record["kept"] for record in pruned.trace]))
            bias = partial(model.model.layers[1].register_forward_pre_hook, with_kwargs=True)
            bias(lambda layer, args, kwargs: (args, {**kwargs, "bias": torch.zeros(1, 8, 24, 24)}))
            with pytest.raises(ModelError, match=r"called with bias \(1, 8, 24, 24\), which depends on the 24"):
                model(ids, use_cache=False)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_cache_without_a_class_is_refused(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    pair = (torch.zeros(4, 4, 8, 16), torch.zeros(4, 4, 8, 16))
    give = partial(model.model.layers[0].register_forward_pre_hook, with_kwargs=True)
    give(lambda layer, args, kwargs: (args, {**kwargs, "layer_past": pair}))
    with prune(model, "pp", ratio=0.4, calibration=batches):
        with pytest.raises(DataError, match="layer 0: the key/value cache layer_past is a tuple, which"):
            model(ids, use_cache=False)
