"""A manifest that is damaged, and a damaged export that is named as a model: said in one sentence, never run."""

import json

import pytest
from prunekit.compress import Exporter, PipelineSpec, load
from prunekit.compress.cli import app
from prunekit.compress.export.bundle import PARTS
from prunekit.compress.loading import ModelSource
from prunekit.compress.loading import load as load_model
from prunekit.registry import DataError, ModelError
from typer.testing import CliRunner


def command(*arguments):
    """Exit code and all output, white space folded."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def export(small_pipeline, tmp_path):
    def run(profile="hf-hetero", **strategy):
        spec = PipelineSpec.of(small_pipeline(**{"use": "wanda_sp", **strategy}))
        return Exporter(spec, profile, tmp_path / profile).export()

    return run


@pytest.fixture
def exported(export, tmp_path):
    export()
    return tmp_path / "hf-hetero"


def test_a_manifest_that_lists_files_elsewhere(exported):
    manifest = json.loads((exported / "prunekit.json").read_text())
    for name in ("../secret.txt", "/etc/hostname"):
        (exported / "prunekit.json").write_text(json.dumps({**manifest, "files": {name: {"bytes": 1, "sha256": ""}}}))
        code, output = command("verify", exported)
        assert code == 2 and f"{name}, which is outside of the folder" in output


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "prunekit export 9", "versions": {"prunekit": "7"}}'])
def test_a_manifest_that_is_none(content, exported):
    (exported / "prunekit.json").write_text(content)
    code, output = command("verify", exported)
    assert code == 2 and ("damaged" in output or "expected 'prunekit export 1'" in output)


@pytest.mark.parametrize("key", PARTS)
def test_a_part_that_is_missing_or_of_another_kind(key, exported):
    manifest = json.loads((exported / "prunekit.json").read_text())
    for damaged in ({k: v for k, v in manifest.items() if k != key}, {**manifest, key: 7}):
        (exported / "prunekit.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=rf"is damaged \({key} is not what"):
            load(exported)
        assert command("verify", exported)[0] == 2


def test_a_file_that_is_not_described(exported):
    manifest = json.loads((exported / "prunekit.json").read_text())
    (exported / "prunekit.json").write_text(json.dumps({**manifest, "files": {"config.json": {}}}))
    with pytest.raises(DataError, match="files is not what"):
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
    assert manifest["parameters"]["exported"] == sum(parameter.numel() for parameter in model.parameters())


def test_the_parameters_of_a_dynamic_export(export):
    parameters = export("dynamic", use="pp")["parameters"]
    assert parameters["exported"] == parameters["dense"] > parameters["active"]
