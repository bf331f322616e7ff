"""Exports of models without some blocks: whole layers as stock classes, empty blocks in hf-hetero, or refused."""

import json

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import SpecError
from transformers import AutoModelForCausalLM, StaticCache

BLOCKS = [(0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")]
LAYER = [(0, "attention"), (0, "mlp")]


def without(model, gone, layers=3, use="magnitude", **options):
    shares = {kind: [float((layer, kind) in gone) for layer in range(layers)] for kind in ("attention", "mlp")}
    return prune(model, use, allocator={"name": "explicit", **shares}, **options)


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3", "opt"])
def test_a_layer_that_is_gone_leaves_a_stock_model(make_model, ids, tmp_path, family):
    model = make_model(family)
    dense = model(ids).logits
    with without(model, LAYER) as pruned:
        expected = model(ids).logits
        folder = pruned.save(tmp_path / "out", profile="hf-uniform")
        active = pruned.active_parameters()
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["architectures"] == [type(model).__name__]
    assert len(config.get("layer_types") or [0, 0]) == 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(again(ids).logits, expected, atol=1e-4) and not torch.allclose(dense, expected, atol=1e-2)
    assert sum(parameter.numel() for parameter in again.parameters()) == active


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "opt"])
def test_empty_blocks_are_written_with_a_shape_for_every_layer(make_model, ids, tmp_path, family):
    from prunekit.compress.models.exported.classes import register

    register()
    model = make_model(family)
    with without(model, BLOCKS) as pruned:
        expected = model(ids).logits
        folder = pruned.save(tmp_path / "out")
        padded = pruned.save(tmp_path / "padded", profile="padded")
        active = pruned.active_parameters()
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(padded)(ids).logits, expected, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.num_hidden_layers == 2
    assert torch.allclose(again(ids).logits, expected, atol=1e-4)
    assert sum(parameter.numel() for parameter in again.parameters()) == active
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    longer = again.generate(ids, use_cache=False, **options)
    assert torch.equal(again.generate(ids, **options), longer)
    static = StaticCache(config=again.config, max_cache_len=20)
    assert torch.equal(again.generate(ids, past_key_values=static, **options), longer)
    if family == "llama-gqa":  # what was exported can be cut again
        with prune(again, "magnitude", ratio=0.3) as pruned:
            assert set(pruned.counts) == {(0, "mlp"), (1, "attention")}


@pytest.mark.parametrize("profile", ["hf-uniform", "hf-hetero"])
def test_what_a_format_has_no_place_for_is_refused_by_name(make_model, batches, tmp_path, profile):
    if profile == "hf-uniform":
        reason, options = "layer 0 has no attention left", {}
    else:
        reason, options = "layer 0 attention keeps nothing, and its compensated mean", {"compensate": "mean"}
    with without(make_model("llama-gqa"), BLOCKS, use="wanda_sp", calibration=batches, **options) as pruned:
        with pytest.raises(SpecError, match=reason):
            pruned.save(tmp_path / "out", profile=profile)
    assert not (tmp_path / "out").exists()
