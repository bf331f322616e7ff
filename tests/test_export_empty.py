"""Exports of models without some blocks: whole layers as stock classes, empty blocks in hf-hetero, or refused."""

import copy
import json

import pytest
import torch
from prunekit.compress import Exporter, PipelineSpec, load, prune
from prunekit.compress.export.configs import shortened
from prunekit.compress.export.cut_model import LayerShape
from prunekit.compress.export.gguf.file import write_gguf
from prunekit.compress.export.profiles import profile_named
from prunekit.compress.export.weights import dense_tensors
from prunekit.compress.export.writing import write_model
from prunekit.registry import SpecError
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

from tests.test_empty_sites import GONE as BLOCKS
from tests.test_empty_sites import explicit, layers_of, without

LAYER = [(1, "attention"), (1, "mlp")]
MEAN = "layer 0 attention keeps nothing, and its compensated mean is a constant that no smaller model can hold"


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("applier", ["slice", "zero"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"])
def test_a_layer_that_is_gone_leaves_a_stock_model(make_model, ids, tmp_path, family, applier):
    model = make_model(family)
    dense = model(ids).logits
    with without(model, LAYER, applier=applier) as pruned:
        expected = model(ids).logits
        folder = pruned.save(tmp_path / "out", profile="hf-uniform")
    with without(model, LAYER) as pruned:
        active = pruned.active_parameters()
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["architectures"] == [type(model).__name__]
    assert len(config.get("layer_types") or [0, 0]) == 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ids).logits, expected) and not torch.allclose(dense, expected, atol=1e-2)
    assert sum(parameter.numel() for parameter in again.parameters()) == active


@torch.no_grad()
def test_the_other_layers_keep_their_kind_of_attention(make_model, ids, tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = dict(num_hidden_layers=4, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    model = make_model("qwen2", **sizes)
    with without(model, [(2, "attention"), (2, "mlp")]) as pruned:
        expected = model(ids).logits
        folder = pruned.save(tmp_path / "out", profile="hf-uniform")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.layer_types == [kinds[number] for number in (0, 1, 3)]
    assert torch.equal(again(ids).logits, expected)


@torch.no_grad()
def test_a_gguf_without_a_layer_is_that_of_the_shorter_model(make_model, tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf package")
    from tests.test_gguf_file import tokenizer_of_bytes

    model, tokenizer = make_model("llama-gqa", vocab_size=300), tokenizer_of_bytes()
    shorter = copy.deepcopy(model)
    shorter.model.layers = nn.ModuleList([shorter.model.layers[0], shorter.model.layers[2]])
    shorter.config.num_hidden_layers = 2
    shapes = [LayerShape(8, 4, 192, False, False)] * 2
    write_gguf(tmp_path / "expected.gguf", shorter.config, shapes, dense_tensors(shorter), tokenizer, name="pruned")
    for applier in ("slice", "zero"):
        with without(model, LAYER, applier=applier) as pruned:
            write_model(profile_named("gguf"), pruned, tokenizer, tmp_path)
        assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        (tmp_path / "model.gguf").unlink()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "opt"])
def test_empty_blocks_are_written_with_a_shape_for_every_layer(make_model, ids, tmp_path, family):
    from prunekit.compress.models.exported.classes import register

    register()
    model = make_model(family)
    with without(model, BLOCKS, applier="zero") as pruned:
        zeroed = pruned.save(tmp_path / "zeroed")
    with without(model, BLOCKS) as pruned:
        expected = model(ids).logits
        folder = pruned.save(tmp_path / "out")
        padded = pruned.save(tmp_path / "padded", profile="padded")
        active = pruned.active_parameters()
    assert (zeroed / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
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
        reason, options = MEAN, {"compensate": "mean"}
    with without(make_model("llama-gqa"), BLOCKS, use="wanda_sp", calibration=batches, **options) as pruned:
        with pytest.raises(SpecError, match=reason):
            pruned.save(tmp_path / "out", profile=profile)
    assert not (tmp_path / "out").exists()


def test_a_model_without_layers_is_refused(make_model):
    with pytest.raises(SpecError, match="nothing is left of any layer"):
        shortened(make_model("llama-gqa").config, [LayerShape(0, 0, 0, False, False)] * 3)


@pytest.fixture
def export(small_pipeline, tmp_path):
    """Exports a small model; nothing may be left where that fails."""

    def run(profile, family="llama-gqa", **strategy):
        spec = PipelineSpec.of(small_pipeline(family, **{"use": "wanda_sp", "ratio": None, **strategy}))
        folder = tmp_path / f"out-{profile}"
        try:
            return folder, Exporter(spec, profile, folder).export()
        except BaseException:
            assert not folder.exists() and not list(tmp_path.glob(".*partial*"))
            raise

    return run


HALF = "has no attention left, and this format needs both in every layer"


def fail(*args, **kwargs):
    raise AssertionError("computed first")


@pytest.mark.parametrize(
    ("profile", "options", "reason"),
    [
        ("hf-uniform", {}, f"profile hf-uniform: layer 0 {HALF}"),
        ("hf-uniform", {"compensate": "mean"}, MEAN),
        ("hf-hetero", {"compensate": "mean"}, MEAN),
        ("gguf", {}, f"profile gguf: layer 0 {HALF}"),
    ],
)
def test_known_counts_are_refused_before_anything_is_computed(export, monkeypatch, profile, options, reason):
    monkeypatch.setattr("prunekit.compress.export.exporting.prune_as_asked", fail)
    monkeypatch.setattr("prunekit.compress.export.gguf.tokenizer.read_vocabulary", lambda *_: None)
    with pytest.raises(SpecError, match=reason):
        export(profile, allocator=explicit(BLOCKS), **options)


@pytest.mark.parametrize("profile", ["hf-uniform", "gguf"])
def test_measured_counts_are_refused_before_anything_else_is_measured(export, monkeypatch, profile):
    monkeypatch.setattr(Exporter, "_measure_before", fail)
    monkeypatch.setattr("prunekit.compress.export.gguf.tokenizer.read_vocabulary", lambda *_: None)
    with pytest.raises(SpecError, match=f"profile {profile}: layer . has no (attention|MLP) left"):
        export(profile, use="block_pruner", ratio=0.2, model={"num_hidden_layers": 2})


@torch.no_grad()
def test_a_folder_that_vllm_cannot_run_says_so(export):
    folder, manifest = export("hf-hetero", allocator=explicit(BLOCKS))
    assert manifest.check.logits == "equal"
    assert "layer 0 has no attention, and vLLM's layers have both: run this folder with transformers" in manifest.notes
    assert "gone: 1 of 3 layers (layer 2), 1 of 3 attentions (layer 0), 1 of 3 MLPs (layer 1)" in manifest.notes
    assert "Runs in: transformers (verified);" in (folder / "README.md").read_text()


@torch.no_grad()
def test_a_strategy_that_decides_per_batch_comes_back_without_its_blocks(export, ids):
    shares = explicit(BLOCKS)
    shares["mlp"][0] = 0.5
    folder, manifest = export("dynamic", use="pp", allocator=shares)
    assert manifest.check.logits == "equal"
    found = load(folder)
    assert found.pruned.counts[0, "attention"] == found.pruned.counts[2, "mlp"] == 0


@torch.no_grad()
def test_an_export_without_blocks_is_cut_and_exported_again(make_model, make_tokenizer, small_pipeline, tmp_path):
    with without(make_model("llama-gqa"), BLOCKS[:2]) as pruned:
        folder = pruned.save(tmp_path / "once", tokenizer=make_tokenizer())
    content = small_pipeline(use="wanda_sp", ratio=0.3) | {"model": {"name": str(folder), "device": "cpu"}}
    Exporter(PipelineSpec.of(content), "hf-hetero", tmp_path / "twice").export()
    rows = [line for line in (tmp_path / "twice" / "README.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[-3:]]
    assert [row[0] for row in cells] == ["0", "1", "2"] and cells[0][1] == cells[1][2] == "-"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert len(layers_of(again)) == 3
