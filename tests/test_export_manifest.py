"""A manifest that is damaged, and a damaged export that is named as a model: reported in one sentence, never run."""

import json
import re
import shutil
import sys

import pytest
from prunekit.compress import Exporter, PipelineSpec, load
from prunekit.compress.models.exported.manifest import Manifest
from prunekit.compress.models.loading import load as load_model
from prunekit.compress.models.source import ModelSource
from prunekit.registry import DataError, ModelError

pytestmark = pytest.mark.smoke


@pytest.fixture
def export(small_pipeline, tmp_path):
    def run(profile="hf-hetero", **strategy):
        spec = PipelineSpec.of(small_pipeline(**{"use": "wanda_sp", **strategy}))
        return Exporter(spec, profile, tmp_path / profile).export()

    return run


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "hf-hetero"


@pytest.fixture
def exported(export, once, tmp_path):
    """An export that the test may damage: a copy of one that is made once."""
    if not once.exists():
        export()
        (tmp_path / "hf-hetero").rename(once)
    return shutil.copytree(once, tmp_path / "hf-hetero")


def test_a_manifest_that_lists_files_elsewhere(exported, command):
    manifest = json.loads((exported / "prunekit.json").read_text())
    for name in ("../secret.txt", "/etc/hostname"):
        (exported / "prunekit.json").write_text(json.dumps({**manifest, "files": {name: {"bytes": 1, "sha256": ""}}}))
        code, output = command("verify", exported)
        assert code == 2 and f"{name}, which is outside of the folder" in output


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "prunekit export 9", "versions": {"prunekit": "7"}}'])
def test_a_manifest_that_is_none(content, exported, command):
    (exported / "prunekit.json").write_text(content)
    code, output = command("verify", exported)
    assert code == 2 and ("damaged" in output or "expected 'prunekit export 1'" in output)


@pytest.mark.parametrize("key", [key for key, info in Manifest.model_fields.items() if info.is_required()])
def test_a_part_that_is_missing_or_of_another_kind(key, exported, command):
    manifest = json.loads((exported / "prunekit.json").read_text())
    for damaged in ({k: v for k, v in manifest.items() if k != key}, {**manifest, key: 7}):
        (exported / "prunekit.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=rf"is damaged \({key} is not what"):
            load(exported)
        assert command("verify", exported)[0] == 2


def test_a_file_that_is_not_described(exported):
    manifest = json.loads((exported / "prunekit.json").read_text())
    (exported / "prunekit.json").write_text(json.dumps({**manifest, "files": {"config.json": {}}}))
    with pytest.raises(DataError, match=r"files\.config\.json\.bytes is not what"):
        load(exported)


def test_a_damaged_export_is_no_model_to_prune(exported):
    source = ModelSource(name=str(exported), device="cpu")
    load_model(source)
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (exported / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"model.safetensors has changed since it was written"):
        load_model(source)


def test_an_export_without_a_model_is_no_model_to_prune(export, tmp_path):
    export("dynamic", use="pp")
    with pytest.raises(ModelError, match="holds no model of transformers"):
        load_model(ModelSource(name=str(tmp_path / "dynamic"), device="cpu"))


@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform", "padded"])
def test_the_parameters_are_those_of_the_model_that_is_loaded(profile, export, tmp_path):
    """Biases of zero, which a stock class has besides, count too."""
    manifest = export(profile, compensate="mean")
    model = load(tmp_path / profile).model
    assert manifest.parameters.exported == sum(parameter.numel() for parameter in model.parameters())


def test_the_parameters_of_a_dynamic_export(export):
    parameters = export("dynamic", use="pp").parameters
    assert parameters.exported == parameters.dense > parameters.active


def test_settings_and_tokenizer_go_along_and_nothing_is_pickled(small_pipeline, tmp_path, make_tokenizer):
    content = small_pipeline(use="magnitude")
    settings = tmp_path / "base-llama-gqa" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_new_tokens": 7}))
    for profile in ("hf-hetero", "hf-uniform", "padded"):
        folder = tmp_path / profile
        Exporter(PipelineSpec.of(content), profile, folder).export()
        found = load(folder)
        assert found.model.generation_config.max_new_tokens == 7
        assert found.tokenizer("w1 w50 w93")["input_ids"] == make_tokenizer()("w1 w50 w93")["input_ids"]
        assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_folder_appears_only_once_its_manifest_is_written(small_pipeline, tmp_path, monkeypatch):
    """Killed at any moment before, there is nothing of its name."""
    from prunekit.compress.export import exporting

    write, seen = exporting.write_manifest, []

    def watched(folder, manifest):
        seen.append((tmp_path / "out").exists())
        manifest = write(folder, manifest)
        seen.append((tmp_path / "out").exists())
        return manifest

    monkeypatch.setattr(exporting, "write_manifest", watched)
    Exporter(PipelineSpec.of(small_pipeline(use="magnitude")), "padded", tmp_path / "out").export()
    assert seen == [False, False] and (tmp_path / "out" / "prunekit.json").is_file()


def test_a_gguf_is_not_called_broken_where_nothing_can_run_it(tmp_path, command, monkeypatch):
    file = tmp_path / "file.yaml"
    file.write_text("prune: {use: magnitude, ratio: 0.3}\nevaluate: [{name: perplexity, window: 64, limit: 2}]\n")
    assert command("export", file, "--profile", "gguf", "--out", tmp_path / "out")[0] == 0
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, output = command("verify", tmp_path / "out")
    assert code == 0 and "files holds" in output and "llama-cpp-python is not installed" in output
    assert "out: holds as far as checked; not checked: loading" in output
    code, output = command("verify", tmp_path / "out", "--strict")
    assert code == 1 and "holds as far as checked" in output


def test_a_damaged_model_is_named_by_the_command_and_on_its_card(tmp_path, command):
    file = tmp_path / "file.yaml"
    file.write_text("prune: {use: random, ratio: 0.7}\nevaluate: [{name: perplexity, window: 64, limit: 2}]\n")
    code, output = command("export", file, "--profile", "padded", "--out", tmp_path / "out")
    said = re.search(r"perplexity rose (\S+)x, from \S+ to \S+: the model is damaged; cut less, or recover it", output)
    assert code == 0 and said and said[0] in (tmp_path / "out" / "README.md").read_text()
