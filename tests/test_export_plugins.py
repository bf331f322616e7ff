"""Exports of families that an outside plugin serves, and of language models inside of others."""

import pytest
import torch
import transformers
from prunekit.compress import Exporter, PipelineSpec, load, prune
from prunekit.compress.export import exporting
from prunekit.compress.models.families import FAMILIES
from prunekit.compress.models.language import auto_name
from prunekit.registry import Catalog, ModelError, SpecError
from prunekit.registry.checks.sites import check_sites

from tests.family_checks import randomise
from tests.test_families import tiny
from tests.test_towers import build, call

PLUGIN = '''
from typing import Literal

from prunekit.compress.models.architectures import Llama, MlpNames
from prunekit.registry import SizeFields, hookimpl


class Outside(Llama):
    """Granite and Gemma 2, as a stranger would write them."""

    name: Literal["outside_granite"] = "outside_granite"
    model_types: tuple[str, ...] = ("granite",)
    SIZES


class Sandwich(Outside):
    name: Literal["outside_gemma2"] = "outside_gemma2"
    model_types: tuple[str, ...] = ("gemma2",)
    mlp: MlpNames = Outside().mlp.model_copy(update={"norm": "pre_feedforward_layernorm"})


@hookimpl
def architectures():
    return [Outside, Sandwich]
'''


@pytest.fixture
def outside(tmp_path, monkeypatch, make_tokenizer):
    """Writes a pipeline for a tiny model of a type that nothing but a plugin file serves."""
    monkeypatch.setenv("PRUNEKIT_BLOCK", "families")

    def make(kind, sizes="", **strategy):
        (tmp_path / "outside.py").write_text(PLUGIN.replace("SIZES", sizes))
        randomise(tiny(kind, vocab_size=97)).save_pretrained(tmp_path / kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
        words = torch.randint(90, (600,), generator=torch.Generator().manual_seed(3)).tolist()
        (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in words))
        text = {"file": str(tmp_path / "text.txt")}
        content = {
            "plugins": [str(tmp_path / "outside.py")],
            "model": {"name": str(tmp_path / kind), "device": "cpu"},
            "calibration": {**text, "sequences": 4, "length": 16, "batch_size": 2},
            "evaluate": [{"name": "perplexity", "text": text, "window": 16, "batch_size": 4, "limit": 4}],
            "prune": {"use": "wanda_sp", "ratio": 0.4, **strategy},
        }
        return PipelineSpec.of(content)

    return make


@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform", "padded"])
@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_a_plugins_family_is_exported_and_read_back(outside, kind, profile, tmp_path):
    spec = outside(kind, **({"skip_layers": [0]} if profile == "hf-hetero" else {}))
    manifest = Exporter(spec, profile, tmp_path / "out").export()
    assert manifest.check is not None and (profile == "padded" or manifest.check.logits == "equal")
    found = load(tmp_path / "out", device="cpu")
    assert found.model.config.model_type == ("prunekit_" if profile == "hf-hetero" else "") + kind
    with prune(found.model, "magnitude", ratio=0.3, catalog=spec.catalog) as again:  # a model like any other
        assert again.ratio.units_cut > 0.2


def test_a_plugin_that_says_no_sizes_is_refused_before_loading(outside, tmp_path, monkeypatch):
    spec = outside("granite", sizes="sizes: SizeFields | None = None")
    monkeypatch.setattr(exporting, "load", None)
    for profile in ("hf-hetero", "hf-uniform"):
        says = f"profile {profile}: architecture outside_granite names no fields.*nearest: --profile padded"
        with pytest.raises(ModelError, match=says):
            Exporter(spec, profile, tmp_path / "out").export()
    with pytest.raises(ModelError, match=r"granite models cannot be written.*profile padded or dynamic"):
        Exporter(spec, "gguf", tmp_path / "out").export()
    assert not (tmp_path / "out").exists()


def test_a_cut_that_the_family_cannot_hold_is_refused_before_loading(outside, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "load", None)
    halves = {"name": "explicit", "attention": [0.5, 0.5], "mlp": [0.5, 0.5]}
    spec = outside("gemma2", compensate="mean", ratio=None, allocator=halves)
    for profile in ("hf-uniform", "padded"):
        with pytest.raises(SpecError, match=r"the MLP's output .* has no place.*: --profile hf-hetero, or"):
            Exporter(spec, profile, tmp_path / "out").export()


def test_sizes_that_name_wrong_fields_fail_the_check():
    granite = next(each for each in FAMILIES if "granite" in each().model_types)()
    model = tiny("granite")
    check_sites(granite, model)
    wrong = {"width": "vocab_size", "kv_heads": "num_attention_heads", "heads": "n_head"}
    says = ["vocab_size is 64, and layer 0 mlp has 48 units", "num_attention_heads is 8, and ", "no field n_head"]
    for (field, value), message in zip(wrong.items(), says, strict=True):
        sizes = granite.sizes.model_copy(update={field: value})
        with pytest.raises(AssertionError, match=message):
            check_sites(granite.model_copy(update={"sizes": sizes}), model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_a_language_model_inside_another_keeps_the_class_around_it(family, tmp_path):
    model, given, catalog = build(family), call(family), Catalog.discover(block="")
    with prune(model, "magnitude", ratio=0.5, catalog=catalog) as pruned:
        expected = model(**given).logits
        for profile in ("hf-uniform", "padded"):
            pruned.save(tmp_path / profile, profile=profile)
        with pytest.raises(ModelError, match=r"profile hf-hetero: a \w+ inside of a \w+ has no class whose layers"):
            pruned.save(tmp_path / "no", profile="hf-hetero")
    for profile in ("hf-uniform", "padded"):
        again = getattr(transformers, auto_name(type(model).__name__)).from_pretrained(tmp_path / profile).eval()
        assert type(again) is type(model)
        torch.testing.assert_close(again(**given).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_class_that_ties_heads_to_the_hidden_size_takes_smaller_mlps(family, tmp_path):
    model, catalog, whole = build(family), Catalog.discover(block=""), [0, 0]
    with prune(model, "magnitude", ratio=0.5, catalog=catalog) as pruned:
        with pytest.raises(SpecError, match=r"2 of 4 heads .*ties heads to the hidden size; nearest: --profile padded"):
            pruned.save(tmp_path / "no", profile="hf-uniform")
    mlps = {"name": "explicit", "attention": whole, "mlp": [0.5, 0.5]}
    with prune(model, "magnitude", allocator=mlps, catalog=catalog) as pruned:
        pruned.save(tmp_path / "out", profile="hf-uniform")
        expected = model(**call(family)).logits
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**call(family)).logits, expected, rtol=1e-4, atol=1e-4)
