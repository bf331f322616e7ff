"""LoRA on an exported model: perplexity falls, the folder is as whole as before, and what cannot be is refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("peft", reason="recovery needs peft: pip install peft")

from prunekit.compress import Exporter, PipelineSpec, load
from prunekit.compress.files import recover as options
from prunekit.compress.files.recover import Recover
from prunekit.compress.recovery.recovering import Recovery
from prunekit.registry import DataError, NonFiniteError, SpecError

# peft asks transformers something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUICK = dict(steps=4, batch_size=2, learning_rate=1e-3, length=32)


@pytest.fixture
def exported(small_pipeline, tmp_path):
    """Exports a small model and returns its folder."""

    def export(profile="hf-hetero", use="wanda_sp", settings=(), shard_size="5GB"):
        content = small_pipeline(use=use)
        for key, value in settings:
            content["model"][key] = value
        Exporter(PipelineSpec.of(content), profile, tmp_path / "out", shard_size=shard_size).export()
        return tmp_path / "out"

    return export


@pytest.fixture
def recover(tmp_path, save_model):
    """Recovers a folder in a few steps, on the small model's own text."""

    def start(folder, overwrite=False, **changes):
        how = Recover(file=next(tmp_path.glob("base-*")) / "text.txt", **{**QUICK, **changes})
        return Recovery(folder, tmp_path / "recovered", how, overwrite=overwrite).recover()

    return start


@pytest.mark.slow
def test_a_short_run_lowers_the_perplexity_of_the_bundled_model(tmp_path, command):
    file, folder, out = tmp_path / "flap.yaml", tmp_path / "flap", tmp_path / "recovered"
    evaluate = [{"name": "perplexity", "window": 128, "limit": 16}]
    calibration = {"length": 128, "sequences": 8}
    prune = {"use": "flap", "ratio": 0.5}
    file.write_text(yaml.safe_dump({"prune": prune, "calibration": calibration, "evaluate": evaluate}))
    assert command("export", file, "--profile", "hf-hetero", "--out", folder)[0] == 0
    options = ("--steps", 12, "--batch-size", 4, "--length", 128, "--learning-rate", 2e-3)
    code, output = command("recover", folder, "--out", out, *options)
    assert code == 0, output
    assert "12 steps on" in output and "before recovery" in output
    manifest = json.loads((out / "prunekit.json").read_text())
    (metric,) = manifest["metrics"]
    assert metric["exported"]["perplexity"] < 0.97 * metric["before_recovery"]["perplexity"]
    assert manifest["recovery"]["loss"]["last"] < manifest["recovery"]["loss"]["first"]
    code, output = command("verify", out)
    assert code == 0 and "perplexity holds" in output, output
    assert "recovery" in (out / "README.md").read_text()


@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform"])
def test_shapes_and_files_stay_and_weights_change(profile, exported, recover, tmp_path):
    folder = exported(profile, shard_size="400KB")
    before, after = json.loads((folder / "prunekit.json").read_text()), recover(folder)
    out = tmp_path / "recovered"
    assert set(before["files"]) == set(after.files)
    assert (out / "kept_units.json").read_bytes() == (folder / "kept_units.json").read_bytes()
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert after.weights != before["weights"] == after.recovery.weights_before
    old, new = load(folder).model.state_dict(), load(out).model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert [(name, t.shape, t.dtype) for name, t in old.items()] == [(n, t.shape, t.dtype) for n, t in new.items()]
    assert changed == {name for name in old if "_proj.weight" in name}
    written = {key for shard in out.glob("*.safetensors") for key in load_file(shard)}
    assert written == {name for name in old if name in written} and not any("lora" in key for key in written)


def test_the_same_seed_trains_the_same_weights(exported, recover, tmp_path):
    folder = exported()
    weights = []
    for seed in (0, 0, 1):
        weights.append(recover(folder, steps=3, seed=seed, overwrite=True))
    assert weights[0].weights == weights[1].weights != weights[2].weights


def test_half_precision_stays_half_precision(exported, recover, tmp_path):
    recover(exported(settings=[("dtype", "bfloat16")]))
    assert load(tmp_path / "recovered").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("profile", "why"), [("padded", "zeros that training would fill in"), ("dynamic", "no weights of its own")]
)
def test_profiles_that_cannot_be_trained_are_refused(profile, why, exported, recover, tmp_path):
    folder = exported(profile, use="magnitude")
    with pytest.raises(SpecError, match=rf"{why}.*nearest: export again with --profile hf-hetero or hf-uniform"):
        recover(folder)
    assert not (tmp_path / "recovered").exists()


def test_mistakes_leave_nothing(exported, recover, tmp_path, monkeypatch, command):
    folder = exported()
    with pytest.raises(DataError, match=r"recover.sequences: .* 900 are asked for"):
        recover(folder, sequences=900)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step .*lower learning_rate"):
        recover(folder, steps=6, learning_rate=1e30)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="pip install peft"):
        recover(folder)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if "recovered" in path.name) == []
    recover(folder)
    with pytest.raises(SpecError, match="has been recovered already"):
        Recovery(tmp_path / "recovered", tmp_path / "twice").recover()
    with pytest.raises(SpecError, match="exists"):
        recover(folder)
    code, output = command("recover", folder, "--out", tmp_path / "x", "--text", "a.txt", "--dataset", "b")
    assert code == 2 and "name one of bundled, file or dataset" in output
    code, output = command("recover", folder)
    assert code == 2 and "--out DIR is missing" in output
