"""The model code next to exported weights: never run unless asked for, and clear about what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec, load
from prunekit.compress.models.exported import modeling_prunekit
from prunekit.compress.models.loading import load as load_model
from prunekit.compress.models.source import ModelSource
from prunekit.registry import ModelError

from tests.test_generation import greedy
from tests.test_generation_modes import together

CODE = Path(modeling_prunekit.__file__)


@pytest.fixture
def exported(small_pipeline, tmp_path):
    """A folder whose model code leaves a file behind when it is run."""
    Exporter(PipelineSpec.of(small_pipeline(use="wanda_sp")), "hf-hetero", tmp_path / "out").export()
    with (tmp_path / "out" / CODE.name).open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return tmp_path / "out"


def test_prunekit_runs_its_own_code(exported, tmp_path):
    assert load(exported, check=False).model.config.model_type == "prunekit_llama"
    for trust in (False, True):
        source = ModelSource(name=str(exported), device="cpu", trust_remote_code=trust)
        assert type(load_model(source, check=False).model).__module__ == modeling_prunekit.__name__
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
@pytest.mark.parametrize("attention", [[0, 0, 0], [0, 0.5, 0.3]])
def test_continuous_batching_works_or_is_refused(small_pipeline, tmp_path, batches, attention):
    allocator = {"name": "explicit", "attention": attention, "mlp": [0.3, 0.5, 0]}
    spec = PipelineSpec.of(small_pipeline(use="wanda_sp", ratio=None, allocator=allocator))
    Exporter(spec, "hf-hetero", tmp_path / "out").export()
    model, prompts = load(tmp_path / "out", check=False).model, batches[0]["input_ids"][:2, :12]
    if any(attention):
        with pytest.raises(ValueError, match=r"need 4 key/value heads in every layer, and layer 1 has 2; use generate"):
            together(model, prompts)
    else:
        assert torch.equal(together(model, prompts), greedy(model, prompts)[:, 12:])


def test_transformers_alone_runs_it_only_when_told(exported, tmp_path):
    """In a process of its own, where nothing is registered."""
    program = """if True:
    import sys
    from transformers import AutoModelForCausalLM
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as error:
        print("refused:", "trust_remote_code" in str(error))
    import os
    print("ran:", os.path.exists(sys.argv[2]))
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    print("ran:", os.path.exists(sys.argv[2]))
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", program, str(exported), str(tmp_path / "ran")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split("\n")[:3] == ["refused: True", "ran: False", "ran: True"], done.stderr[-2000:]


def test_an_old_transformers_is_told_what_it_lacks(monkeypatch):
    class Old:
        """A configuration without per-layer values."""

    monkeypatch.setattr(sys.modules["transformers"], "PreTrainedConfig", Old)
    with pytest.raises(ImportError, match=rf"transformers {modeling_prunekit.OLDEST} or newer.*hf-uniform"):
        exec(compile(CODE.read_text(), str(CODE), "exec"), {"__name__": "old"})


def test_an_export_for_an_old_transformers_says_so_before_anything_is_pruned(small_pipeline, tmp_path, monkeypatch):
    from prunekit.compress.models.exported import classes as exported_classes

    def classes():
        raise ModelError("models with layers of different shapes need transformers 5.14 or newer")

    monkeypatch.setattr(exported_classes, "model_classes", classes)
    monkeypatch.setattr("prunekit.compress.export.exporting.prune_as_asked", None)
    with pytest.raises(ModelError, match="need transformers"):
        Exporter(PipelineSpec.of(small_pipeline(use="wanda_sp")), "hf-hetero", tmp_path / "out").export()


def test_the_code_stands_alone():
    """It imports transformers and torch, and nothing of ours."""
    lines = [line for line in CODE.read_text().splitlines() if line.startswith(("import ", "from "))]
    packages = {line.split()[1].split(".")[0] for line in lines}
    assert packages == {"__future__", "copy", "functools", "transformers", "torch"}


def test_an_exported_model_runs_in_a_pipeline(tmp_path, small_pipeline):
    """Its own shapes are the sites that are measured and pruned."""
    from prunekit.compress import Pipeline

    exported = tmp_path / "out"
    Exporter(PipelineSpec.of(small_pipeline(use="wanda_sp")), "hf-hetero", exported).export()
    content = {**small_pipeline(use="magnitude"), "model": {"name": str(exported), "device": "cpu"}}
    content["prune"]["ratio"] = 0.25
    content["evaluate"] = [{"name": "cost", "batch_size": 2, "length": 16}]
    results = Pipeline(PipelineSpec.of(content)).measure()
    kept = {e["layer"]: e for e in json.loads((exported / "prunekit.json").read_text())["layers"]}
    for layer in results.record.layers:
        assert layer.mlp.units == kept[layer.layer]["mlp"]["kept"]
        assert layer.attention.units == kept[layer.layer]["attention"]["kept"]
    assert yaml.safe_load(results.resolved)["model"]["name"] == str(exported)
