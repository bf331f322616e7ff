"""Exported GGUF folders, served by llama.cpp: the export's own files, measured by verify."""

import json

import pytest
import yaml

pytest.importorskip("llama_cpp", reason="make test-gguf builds llama.cpp")

FILE = {
    "calibration": {"length": 128, "sequences": 8},
    "evaluate": [{"name": "perplexity", "window": 128, "limit": 4}, "cost"],
}


@pytest.mark.parametrize(
    ("prune", "options"),
    [
        ({"use": "flap", "ratio": 0.3}, ()),
        ({"use": "wanda_sp", "ratio": 0.4, "compensate": "least_squares"}, ("--multiple", "64")),
        ({"use": "pp", "ratio": 0.4, "skip_layers": [0], "compensate": "mean"}, ("--freeze", "mean-score")),
    ],
    ids=["flap", "least squares", "frozen pp"],
)
def test_llama_cpp_measures_what_transformers_measured(prune, options, tmp_path, command):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump({**FILE, "prune": prune}))
    folder = tmp_path / "out"
    code, output = command("export", tmp_path / "file.yaml", "--profile", "gguf", "--out", folder, *options)
    assert code == 0, output
    manifest = json.loads((folder / "prunekit.json").read_text())
    widths = [layer["mlp"]["kept"] for layer in manifest["layers"]]
    assert all(width % 32 == 0 for width in widths)
    code, output = command("verify", folder)
    assert code == 0 and "llama.cpp loads it" in output and "perplexity holds" in output, output
    manifest["metrics"][0]["exported"]["perplexity"] *= 1.01
    (folder / "prunekit.json").write_text(json.dumps(manifest))
    code, output = command("verify", folder)
    assert code == 1 and "perplexity fails" in output


def test_a_model_that_was_pruned_before_is_served(tmp_path, command):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({**FILE, "prune": {"use": "flap", "ratio": 0.3}}))
    assert command("export", first, "--profile", "hf-hetero", "--out", tmp_path / "once")[0] == 0
    again = {**FILE, "model": {"name": str(tmp_path / "once")}, "prune": {"use": "magnitude", "ratio": 0.2}}
    second.write_text(yaml.safe_dump(again))
    code, output = command("export", second, "--profile", "gguf", "--out", tmp_path / "twice")
    assert code == 0, output
    code, output = command("verify", tmp_path / "twice")
    assert code == 0 and "perplexity holds" in output, output


def test_a_file_that_is_no_gguf_is_named(tmp_path, command):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump({**FILE, "prune": {"use": "magnitude", "ratio": 0.3}}))
    folder = tmp_path / "out"
    assert command("export", tmp_path / "file.yaml", "--profile", "gguf", "--out", folder)[0] == 0
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    manifest = json.loads((folder / "prunekit.json").read_text())
    del manifest["files"]["model.gguf"]
    (folder / "prunekit.json").write_text(json.dumps(manifest))
    (folder / "model.gguf").rename(folder / "model.old")
    code, output = command("verify", folder)
    assert code == 1 and "loading fails" in output
