"""What an exported folder carries, and how damage, accidents and mistakes are named."""

import json
import shutil

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec, load
from prunekit.compress.export import weights
from prunekit.compress.export.card import card, hub_id
from prunekit.compress.export.licence import licence_of
from prunekit.compress.models.exported.manifest import read_manifest
from prunekit.compress.models.source import ModelSource
from prunekit.registry import DataError, ModelError, SpecError


@pytest.fixture
def pipeline_file(small_pipeline, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(small_pipeline("llama-gqa", use="flap")))
    return path


@pytest.fixture
def exported(pipeline_file, tmp_path):
    """A folder of profile hf-hetero, in three shards."""
    Exporter(PipelineSpec.load(pipeline_file), "hf-hetero", tmp_path / "out", shard_size="500KB").export()
    return tmp_path / "out"


def test_the_folder_says_where_it_comes_from(exported, pipeline_file):
    manifest = json.loads((exported / "prunekit.json").read_text())
    assert manifest["strategy"] == "flap" and manifest["profile"] == "hf-hetero"
    assert len(manifest["calibration"]["fingerprint"]) == len(manifest["base"]["fingerprint"]) == 64
    assert {"python", "prunekit", "torch", "transformers"} <= set(manifest["versions"])
    (metric,) = manifest["metrics"]
    assert metric["protocol"]["window"] == 32 and metric["exported"]["perplexity"] > 0
    listed = {entry["layer"]: entry for entry in json.loads((exported / "kept_units.json").read_text())}
    for layer in manifest["layers"]:
        assert len(listed[layer["layer"]]["mlp"]) == layer["mlp"]["kept"]
    assert set(manifest["files"]) == {path.name for path in exported.iterdir()} - {"prunekit.json"}
    resolved = PipelineSpec.load(exported / "recipe.yaml")
    assert resolved.prune == PipelineSpec.load(pipeline_file).prune


def test_the_model_card_can_be_read_by_the_hub(exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "unknown" and "prunekit" in card.data.tags
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity"
    assert 'from_pretrained("out", trust_remote_code=True)' in card.text
    assert str(exported.parent) not in card.text


@pytest.mark.parametrize(
    ("architecture", "auto", "tag"),
    [
        ("LlavaForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text"),
        ("Gemma3ForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text"),
        ("Gemma3ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    ],
)
def test_the_card_loads_a_model_that_reads_images_by_its_class(architecture, auto, tag, exported):
    manifest = read_manifest(exported)
    base = manifest.base.model_copy(update={"architecture": architecture})
    written = card(manifest.model_copy(update={"profile": "hf-uniform", "base": base}), "out")
    assert f"from transformers import {auto}, AutoTokenizer\nmodel = {auto}.from_pretrained(" in written
    assert f"pipeline_tag: {tag}" in written
    assert ("AutoProcessor" in written) == (tag != "text-generation")


def test_the_licence_of_the_base_is_carried_over(pipeline_file, tmp_path):
    base = tmp_path / "base-llama-gqa"
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "LICENSE").write_text("Apache")
    manifest = Exporter(PipelineSpec.load(pipeline_file), "padded", tmp_path / "out").export()
    assert manifest.license == "apache-2.0"
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"


def test_files_outside_of_the_bases_folder_are_not_carried_over(pipeline_file, tmp_path):
    base, secret = tmp_path / "base-llama-gqa", tmp_path / "secret"
    secret.write_text("---\nlicense: private\n---\n")
    for name in ("LICENSE", "README.md"):
        (base / name).symlink_to(secret)
    manifest = Exporter(PipelineSpec.load(pipeline_file), "padded", tmp_path / "out").export()
    assert manifest.license == "unknown" and not (tmp_path / "out" / "LICENSE").exists()
    assert any("LICENSE of the base model is not copied" in note for note in manifest.notes)


@pytest.mark.parametrize("text", ["mit\\n---\\n# evil", "<script>", "\\e[31mred"])
def test_a_licence_is_an_identifier(text, tmp_path):
    (tmp_path / "README.md").write_text(f'---\nlicense: "{text}"\n---\n')
    assert licence_of(ModelSource(name=str(tmp_path))) == "unknown"


def test_foreign_text_stays_on_its_line_of_the_card(exported):
    from huggingface_hub import ModelCard

    manifest = read_manifest(exported)
    evil = "x\n---\nlicense: evil\n# title <script>\x1b[31m"
    metrics = [metric.model_copy(update={"label": evil, "exported": {evil: 1.0}}) for metric in manifest.metrics]
    changes = {"license": evil, "strategy": evil, "created": evil, "metrics": metrics}
    written = card(manifest.model_copy(update=changes), "out")
    found = ModelCard(written)
    assert found.data.license == evil and "<script>" not in found.text and "\x1b" not in written
    assert "\n# title" not in found.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", "org/model"),
        ("gpt", "gpt"),
        ("bundled", None),
        ("/home/me/model", None),
        ("/cache/models--org--model/snapshots/0123", "org/model"),
    ],
)
def test_the_card_names_a_base_model_of_the_hub(name, expected):
    assert hub_id(name) == expected


def test_an_exported_model_is_a_model_like_any_other(exported, pipeline_file, command, tmp_path):
    """It can be measured by a pipeline, and pruned and exported once more."""
    again = tmp_path / "again.yaml"
    content = yaml.safe_load(pipeline_file.read_text())
    again.write_text(yaml.safe_dump({**content, "model": {"name": str(exported)}}))
    code, output = command("export", again, "--profile", "hf-hetero", "--out", tmp_path / "twice")
    assert code == 0, output
    first, second = (json.loads((f / "prunekit.json").read_text()) for f in (exported, tmp_path / "twice"))
    assert second["parameters"]["dense"] == first["parameters"]["exported"]
    assert second["parameters"]["exported"] < first["parameters"]["exported"]
    assert load(tmp_path / "twice").model.config.model_type == "prunekit_llama"


def test_an_exported_model_is_exported_again_in_every_profile(exported, pipeline_file, tmp_path):
    content = yaml.safe_load(pipeline_file.read_text())
    calibration = {**content["calibration"], "length": 32}
    prune = {"use": "wanda_sp", "allocator": {"name": "explicit", "attention": [0, 0, 0], "mlp": [0, 0.1, 0.1]}}
    base = {**content, "model": {"name": str(exported)}, "calibration": calibration, "prune": prune}
    assert len({layer.intermediate_size for layer in load(exported).model.config.per_layer_config}) > 1
    for profile in ("padded", "dynamic"):
        manifest = Exporter(PipelineSpec.of(base), profile, tmp_path / profile).export()
        assert manifest.check.largest_difference < 1e-4
    uniform = {**content, "prune": {"use": "magnitude", "ratio": 0.4}}
    Exporter(PipelineSpec.of(uniform), "hf-hetero", tmp_path / "alike").export()
    again = {**uniform, "model": {"name": str(tmp_path / "alike")}, "prune": {"use": "magnitude", "ratio": 0.2}}
    Exporter(PipelineSpec.of(again), "hf-uniform", tmp_path / "stock").export()
    assert type(load(tmp_path / "stock").model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")


def test_weights_are_sharded_and_written_one_shard_at_a_time(exported, pipeline_file, tmp_path, monkeypatch):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 3 and all((exported / shard).is_file() for shard in shards)
    held, save = [], weights.save_file
    monkeypatch.setattr(weights, "save_file", lambda made, *rest: (held.append(len(made)), save(made, *rest)))
    Exporter(PipelineSpec.load(pipeline_file), "hf-hetero", tmp_path / "other", shard_size="500KB").export()
    assert len(held) == len(shards) and max(held) < len(index["weight_map"])
    whole = load(exported).model.state_dict()
    assert sum(held) == len(whole)


def damage(folder, what):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    if what == "changed":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(bytes(content))
    elif what == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "missing":
        shard.unlink()
    elif what == "code":
        (folder / "modeling_other.py").write_text("print('run')")
    elif what == "numbers":
        manifest = json.loads((folder / "prunekit.json").read_text())
        manifest["metrics"][0]["exported"]["perplexity"] *= 1.01
        (folder / "prunekit.json").write_text(json.dumps(manifest))
    elif what == "weights":
        manifest = json.loads((folder / "prunekit.json").read_text())
        manifest["weights"] = "0" * 64
        (folder / "prunekit.json").write_text(json.dumps(manifest))
    return shard.name


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("changed", "SHARD has changed since it was written"),
        ("cut off", "SHARD has .* bytes, .* were written"),
        ("missing", "SHARD is missing"),
        ("code", "modeling_other.py was not written by the export"),
    ],
)
def test_damage_is_named_by_verify_and_on_loading(what, said, exported, command):
    said = said.replace("SHARD", damage(exported, what))
    with pytest.raises(DataError, match=said):
        load(exported)
    code, output = command("verify", exported)
    assert code == 1
    assert "files fails" in output and "does not hold" in output


def test_verify_measures_again(exported, command):
    code, output = command("verify", exported)
    assert code == 0 and "files holds" in output and "perplexity holds" in output, output
    damage(exported, "numbers")
    code, output = command("verify", exported)
    assert code == 1 and "perplexity fails" in output
    damage(exported, "weights")
    code, output = command("verify", exported, "--no-measure")
    assert code == 1 and "loading fails" in output and "perplexity" not in output


def test_verify_says_what_it_could_not_check(exported, command, tmp_path):
    (tmp_path / "base-llama-gqa" / "text.txt").unlink()
    manifest = json.loads((exported / "prunekit.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (exported / "prunekit.json").write_text(json.dumps(manifest))
    code, output = command("verify", exported)
    assert code == 0 and "perplexity not checked" in output and "torch 1.0 is" in output


def test_a_transformers_that_is_too_old_is_named(exported, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    with pytest.raises(ModelError, match=r"needs transformers 5\.14 or newer, 5\.1\.0 is installed.*hf-uniform"):
        load(exported)


def test_what_is_no_export(tmp_path, command):
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, output = command("verify", folder)
        assert code == 2 and ("not a finished export" in output or "is not a folder" in output)
    (tmp_path / "results.json").write_text("{}")
    assert "it is a results folder, so export it first (prunekit export)" in command("verify", tmp_path)[1]


def test_an_existing_folder_is_refused(exported, pipeline_file, command, tmp_path):
    before = (exported / "prunekit.json").read_bytes()
    code, output = command("export", pipeline_file, "--profile", "padded", "--out", exported)
    assert code == 2 and "exists" in output and (exported / "prunekit.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    code, output = command("export", pipeline_file, "--profile", "padded", "--out", tmp_path / "mine", "--overwrite")
    assert code == 2 and "is not an exported folder" in output and (tmp_path / "mine" / "thesis.txt").exists()
    code, _ = command("export", pipeline_file, "--profile", "padded", "--out", exported, "--overwrite")
    assert code == 0 and json.loads((exported / "prunekit.json").read_text())["profile"] == "padded"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("boom")])
@pytest.mark.parametrize("place", ["writing.write_weights", "exporting.write_manifest", "exporting.card"])
def test_an_accident_leaves_no_folder(place, error, pipeline_file, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"prunekit.compress.export.{place}", fail)
    with pytest.raises(SpecError if isinstance(error, OSError) else type(error), match=r"(make room|boom|^$)"):
        Exporter(PipelineSpec.load(pipeline_file), "hf-hetero", tmp_path / "new" / "out").export()
    assert not (tmp_path / "new").exists()


def test_a_model_that_comes_back_different_is_not_kept(pipeline_file, tmp_path, monkeypatch):
    """The comparison can fail: a shape that is right with values that are wrong."""
    from prunekit.compress.export import cut_model

    original = cut_model._sliced
    monkeypatch.setattr(cut_model, "_sliced", lambda made, kept, whole: original(made, kept, whole).flip(0))
    with pytest.raises(ModelError, match="gives other logits than the pruned one"):
        Exporter(PipelineSpec.load(pipeline_file), "hf-hetero", tmp_path / "out").export()
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_exported_with_its_measurements(pipeline_file, command, tmp_path):
    code, output = command("run", pipeline_file, "--out", tmp_path / "run")
    assert code == 0, output
    code, output = command("export", tmp_path / "run", "--profile", "hf-hetero", "--out", tmp_path / "out")
    assert code == 0, output
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text())
    run = json.loads((tmp_path / "run" / "results.json").read_text())
    assert manifest["run"]["metrics"] == run["metrics"]
    measured = manifest["metrics"][0]["exported"]["perplexity"]
    assert measured == pytest.approx(run["metrics"][0]["pruned"]["perplexity"], rel=1e-5)
    shutil.rmtree(tmp_path / "base-llama-gqa")
    code, output = command("export", tmp_path / "run", "--profile", "padded", "--out", tmp_path / "other")
    assert code == 2 and "there is no file" in output


def test_a_run_of_other_weights_is_refused(pipeline_file, command, tmp_path, make_model):
    assert command("run", pipeline_file, "--out", tmp_path / "run")[0] == 0
    make_model("llama-gqa", seed=5).save_pretrained(tmp_path / "base-llama-gqa")
    code, output = command("export", tmp_path / "run", "--profile", "hf-hetero", "--out", tmp_path / "out")
    assert code == 2 and "other weights" in output and not (tmp_path / "out").exists()


def test_diff_shows_what_was_kept_differently(exported, pipeline_file, command, tmp_path):
    other = tmp_path / "other"
    options = ["--set", "prune.use=wanda_sp", "--profile", "hf-uniform", "--out", other]
    assert command("export", pipeline_file, *options)[0] == 0
    code, output = command("diff", exported, other)
    assert code == 0 and "hf-uniform" in output and "prune.use" in output and "wanda_sp" in output
    listed = [json.loads((folder / "kept_units.json").read_text()) for folder in (exported, other)]
    both = set(listed[0][1]["mlp"]) & set(listed[1][1]["mlp"])
    either = set(listed[0][1]["mlp"]) | set(listed[1][1]["mlp"])
    counts = f"1 mlp (192) {len(listed[0][1]['mlp'])} {len(listed[1][1]['mlp'])} {len(both)}"
    assert f"{counts} {100 * len(both) / len(either):.3g}%" in output
    totals = [sum(len(layer["mlp"]) for layer in each) for each in listed]
    assert output.index("all layers") < output.index(f"mlp (576) {totals[0]} {totals[1]}") < output.index(counts)
    code, output = command("diff", exported, exported)
    assert code == 0 and "100%" in output and "prune.use" not in output


def test_the_dtype_is_kept(pipeline_file, tmp_path):
    spec = PipelineSpec.load(pipeline_file, ["model.dtype=bfloat16"])
    Exporter(spec, "hf-hetero", tmp_path / "out").export()
    assert load(tmp_path / "out").model.dtype == torch.bfloat16


def test_what_is_missing_on_the_command_line(command, pipeline_file, tmp_path):
    for arguments in ([], [pipeline_file], [pipeline_file, "--profile", "padded"]):
        code, output = command("export", *arguments)
        assert code == 2 and "is missing: prunekit export RUN_OR_YAML" in output
    code, output = command("export", tmp_path, "--profile", "padded", "--out", tmp_path / "x")
    assert code == 2 and "so it is not a run" in output
    code, output = command("export", "--list")
    assert code == 0 and "hf-hetero" in output and "llama.cpp" in output
