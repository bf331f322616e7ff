"""Exports of families that an outside plugin serves, and of language models inside of others."""

import json

import pytest
import torch
import transformers
import yaml
from prunekit.compress import Exporter, PipelineSpec, load, prune
from prunekit.compress.export import exporting
from prunekit.compress.models.families import FAMILIES
from prunekit.compress.models.language import auto_name
from prunekit.compress.pruning.checking import randomise
from prunekit.registry import Catalog, ModelError, PluginError, SpecError
from prunekit.registry.checks import check_component
from prunekit.registry.checks.sites import check_sites

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


SHAPES = '''
import json
from typing import ClassVar, Literal

from prunekit.registry import ExportFormat, ModelError, hookimpl


class Shapes(ExportFormat):
    """A list of all tensors with their shapes."""

    made_from: ClassVar[str] = "gguf" if "HOW" == "no profile" else "hf-hetero"
    multiple: ClassVar[int] = 0 if "HOW" == "no multiple" else 8
    name: Literal["NAME"] = "NAME"
    how: Literal["HOW"] = "HOW"

    def check(self, config):
        if config.model_type == "gemma2":
            raise ModelError("format shapes: gemma2 has no shapes; use --profile padded")

    def write(self, model, tokenizer, folder):
        shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
        if self.how == "raise":
            return shapes["nothing"]
        if self.how == "outside":
            (folder.parent / "config.json").write_text("{}")
        if self.how == "other place":
            (folder.parent / "more.json").write_text("{}")
        if self.how == "change":
            model.lm_head.weight.data.add_(1)
        if self.how == "again":
            shapes["at"] = id(folder)
        if self.how != "nothing":
            (folder / "shapes.json").write_text(json.dumps([len(tokenizer), shapes]))
        return ["shapes alone run nowhere"]


@hookimpl
def export_formats():
    return [Shapes]
'''


def with_format(content, tmp_path, how="", name="shapes"):
    """A pipeline whose plugins have a format."""
    (tmp_path / "shapes.py").write_text(SHAPES.replace("HOW", how).replace("NAME", name))
    data = yaml.safe_load(content.to_yaml())
    return PipelineSpec.of(data | {"plugins": [*data["plugins"], str(tmp_path / "shapes.py")]})


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


def test_a_plugins_format_is_written_from_the_smaller_model(outside, tmp_path, command):
    spec = with_format(outside("granite"), tmp_path)
    manifest = Exporter(spec, "shapes", tmp_path / "out").export()
    words, shapes = json.loads((tmp_path / "out" / "shapes" / "shapes.json").read_text())
    again = load(tmp_path / "out", device="cpu")  # the profile that it is made from loads as always
    assert shapes == {name: list(tensor.shape) for name, tensor in again.model.named_parameters()}
    assert words == len(again.tokenizer) and manifest.profile == "hf-hetero" and "shapes/shapes.json" in manifest.files
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("down_proj.weight")}
    assert widths and all(width % 8 == 0 for width in widths)  # the format's multiple
    assert {"written as shapes, too: folder shapes", "shapes alone run nowhere"} <= set(manifest.notes)
    code, output = command("export", "--list", "--plugin", tmp_path / "shapes.py")
    assert code == 0 and "as hf-hetero" in output and "by file" in output


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "export format 'shapes' of plugin file shapes.py raised KeyError"),
        ("outside", "export format 'shapes' of plugin file shapes.py has changed files outside of its folder"),
        ("nothing", "export format 'shapes' of plugin file shapes.py has written no file"),
    ],
)
def test_a_format_that_errs_is_named_and_leaves_no_folder(outside, tmp_path, how, words):
    spec = with_format(outside("granite"), tmp_path, how)
    with pytest.raises(PluginError) as caught:
        Exporter(spec, "shapes", tmp_path / "out").export()
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_a_format_refuses_before_loading(outside, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "load", None)
    spec = with_format(outside("gemma2"), tmp_path)
    with pytest.raises(ModelError, match="gemma2 has no shapes"):
        Exporter(spec, "shapes", tmp_path / "out").export()
    with pytest.raises(SpecError, match=r"no profile 'shape' \(did you mean 'shapes'\?\); there are hf-.*shapes"):
        Exporter(spec, "shape", tmp_path / "out").export()
    wrong = with_format(outside("granite"), tmp_path, "no profile")
    with pytest.raises(PluginError, match=r"'shapes' of plugin file shapes.py: made_from is 'gguf', not hf-uniform or"):
        Exporter(wrong, "shapes", tmp_path / "out").export()
    spec = with_format(outside("gemma2"), tmp_path)
    with pytest.raises(SpecError, match="takes multiples of 8, found 4"):
        Exporter(spec, "shapes", tmp_path / "out", multiple=4).export()
    spec = with_format(outside("granite"), tmp_path, name="padded")
    with pytest.raises(SpecError, match="padded is a profile of prunekit, and a plugin has an export format of that"):
        Exporter(spec, "padded", tmp_path / "out").export()


def test_a_format_with_an_option_that_has_no_default_is_refused(small_pipeline, tmp_path, command):
    """The command and the class know a format by its name alone."""
    shapes = SHAPES.replace("HOW", "").replace("NAME", "shapes")
    field = "    size: int = Field(gt=0, description='bits of a weight')\n    other: str\n\n    def check"
    shapes = "from pydantic import Field\n" + shapes.replace("    def check", field, 1)
    (tmp_path / "shapes.py").write_text(shapes)
    data = {**small_pipeline(use="wanda_sp"), "plugins": [str(tmp_path / "shapes.py")]}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(data))
    said = (
        f"export format 'shapes' of file {tmp_path / 'shapes.py'}: option size is required: bits of a weight; option "
        "other is required; a format is named without options, so give it a default in the plugin"
    )
    code, output = command("export", tmp_path / "pipeline.yaml", "--profile", "shapes", "--out", tmp_path / "out")
    assert code == 2 and said in output and not (tmp_path / "out").exists()
    with pytest.raises(SpecError) as caught:
        Exporter(PipelineSpec.of(data), "shapes", tmp_path / "out").export()
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("", None),
        ("no profile", "Shapes made_from must be hf-uniform, hf-hetero or padded, found 'gguf'"),
        ("no multiple", "Shapes multiple must be a whole number from 1, found 0"),
        ("nothing", "Shapes writes no file"),
        ("other place", "Shapes writes more.json outside of the folder"),
        ("change", "Shapes changes lm_head.weight; write must leave the model"),
        ("again", "Shapes writes other files the second time"),
        ("raise", "Shapes raises KeyError"),
    ],
)
def test_formats_are_checked(tmp_path, how, words):
    (tmp_path / "shapes.py").write_text(SHAPES.replace("HOW", how).replace("NAME", "shapes"))
    component = Catalog.discover([tmp_path / "shapes.py"], block="").get("export_formats", "shapes")
    if words is None:
        return check_component(component)
    with pytest.raises(AssertionError) as caught:
        check_component(component)
    assert words in str(caught.value)


def test_experts_and_a_strategy_that_decides_per_batch_are_refused_at_once(tmp_path):
    """Not first for the freezing that is missing, and then for the experts."""
    mixtral = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    mixtral.architectures = ["MixtralForCausalLM"]
    mixtral.save_pretrained(tmp_path / "model")
    spec = PipelineSpec.of({"model": {"name": str(tmp_path / "model")}, "prune": {"use": "pp", "ratio": 0.3}})
    with pytest.raises(ModelError, match="profile hf-hetero: routed experts are cut") as caught:
        Exporter(spec, "hf-hetero", tmp_path / "out").export()
    assert "--freeze" not in str(caught.value)
    with pytest.raises(SpecError, match="add --freeze"):
        Exporter(spec, "hf-uniform", tmp_path / "out").export()
