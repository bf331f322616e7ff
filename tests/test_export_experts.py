"""Models whose routed experts are cut: stock models of a smaller size that reload with equal logits; or refused."""

import json

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.export.profiles import profile_named
from prunekit.compress.export.writing import write_model
from prunekit.registry import ModelError, SpecError
from safetensors import safe_open

from tests.moe_models import FAMILIES, batches, built, catalog, is_supported, logits

STEPS = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
NO_FIELDS = "names no fields of the configuration that hold the sizes"
OTHER_SIZES = (
    "olmoe gpt_oss minimax_m2 flex_olmo granitemoe_swa deepseek_v2 deepseek_v3 dots1 glm4_moe exaone_moe ernie4_5_moe "
    "solar_open hy_v3 glm4_moe_lite"
)
"""Families whose attentions or shared experts have no smaller form: they are cut along with channels of experts."""


def written(model, folder, strategy, profile="hf-uniform", **options):
    """The model that transformers loads after the cut; its logits and tokens are those of the cut model."""
    batch, ids = batches(1, seed=5)[0], batches(1, rows=2, seed=9, padded=False)[0]["input_ids"]
    options = {"ratio": 0.5, "calibration": batches(), "catalog": catalog(), **options}
    with prune(model, strategy, **options) as pruned:
        pruned.save(folder, profile=profile)
        expected, tokens = logits(model, batch), model.generate(ids, **STEPS)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.generate(ids, **STEPS), tokens)
    return again


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if is_supported(family)])
def test_a_model_with_fewer_or_smaller_experts_is_a_stock_model(family, tmp_path):
    model = built(family)
    fewer = written(model, tmp_path / "fewer", "reap", ratio=1 / 3)
    assert type(fewer) is type(model) and size_of(fewer) < size_of(model)
    fewer.save_pretrained(tmp_path / "again")  # under the names of the hub's checkpoints
    assert names_in(tmp_path / "fewer") == names_in(tmp_path / "again")
    if family in OTHER_SIZES.split():
        with pytest.raises(ModelError, match=f"{NO_FIELDS}.*nearest: --profile padded, or --profile dynamic"):
            written(model, tmp_path / "smaller", "magnitude")
        assert not (tmp_path / "smaller").exists()
        return
    smaller = written(model, tmp_path / "smaller", "magnitude")
    assert type(smaller) is type(model) and size_of(smaller) < size_of(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_dropped_channels_of_experts_are_zero_in_the_padded_form(family, tmp_path):
    model = built(family)
    again = written(model, tmp_path / "out", "magnitude", profile="padded", allocator="global_ranking")
    assert size_of(again) == size_of(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compensation_of_experts_needs_their_biases(family, tmp_path):
    model, options = built(family), dict(compensate="mean", profile="padded")
    if family == "gpt_oss":
        written(model, tmp_path / "out", "wanda_sp", **options)
        return
    with pytest.raises(SpecError, match=r"layer 0 expert 0: compensation gives it a bias.*prune\.compensate=none"):
        written(model, tmp_path / "out", "wanda_sp", **options)
    assert not (tmp_path / "out").exists()


def test_what_no_checkpoint_holds_is_refused_with_the_reason(tmp_path):
    model = built("mixtral")
    for profile, strategy, options, words in (
        ("padded", "reap", {}, "a router with rows for all of them would choose them; nearest: --profile hf-uniform"),
        ("hf-hetero", "reap", {}, "routed experts are cut.*, as hf-uniform writes; nearest: --profile hf-uniform, or"),
        ("hf-uniform", "reap", {"skip_layers": [0], "ratio": 0.25}, "layer 1 keeps 3 experts, layer 0 6 experts"),
        ("hf-uniform", "magnitude", {"allocator": "global_ranking"}, "its experts keep .* channels.*--profile padded"),
    ):
        with pytest.raises((SpecError, ModelError), match=words):
            written(model, tmp_path / "out", strategy, profile=profile, **options)
        assert not (tmp_path / "out").exists()


def test_experts_are_written_one_by_one_as_in_checkpoints_of_the_hub(tmp_path):
    model = built("mixtral")
    with prune(model, "reap", ratio=0.5, calibration=batches(), catalog=catalog()) as pruned:
        (tmp_path / "out").mkdir()
        write_model(profile_named("hf-uniform"), pruned, None, tmp_path / "out", shard_size="20KB")
        expected = logits(model, batches(1)[0])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    block = "model.layers.0.block_sparse_moe"
    assert {f"{block}.gate.weight", *(f"{block}.experts.2.w{part}.weight" for part in (1, 2, 3))} <= index.keys()
    assert not [name for name in index if "gate_up_proj" in name or "experts.3" in name]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    torch.testing.assert_close(logits(again, batches(1)[0]), expected, rtol=1e-5, atol=1e-5)
