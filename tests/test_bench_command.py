"""prunekit bench on the command line: what is measured, what is written, and every mistake one message."""

import json
import subprocess
import sys

import pytest
import torch
from prunekit.compress.bench import arms, command
from prunekit.compress.bench.presets import PRESETS, Case, Preset
from prunekit.compress.cli.main import app
from typer.testing import CliRunner

TINY = Preset("llama", 64, 192, 4, 2, 2, cases=(Case("float32", 3, 16),))

# What is measured


def test_layers_that_the_paper_skips_are_skipped_at_full_depth_only():
    chosen = dict(dtype=None, batch=None, ratio=None, skip=None, device="cpu", options={}, seed=0)
    (full,) = command.settings_of("llama-2-7b", layers=None, **chosen)
    assert (full.layers, full.skipped_layers, full.dtype, full.ratio) == (32, (0, 1, 2), "bfloat16", 0.4)
    assert (full.batch, full.length) == (20, 1024)
    (few,) = command.settings_of("llama-2-7b", layers=4, **chosen)
    assert few.skipped_layers == ()
    (asked,) = command.settings_of("llama-2-7b", layers=8, **{**chosen, "skip": "0,1"})
    assert asked.skipped_layers == (0, 1)
    several = command.settings_of("cpu-small", layers=1, **{**chosen, "dtype": "float32,bfloat16", "batch": "4x8,2x4"})
    assert [(s.dtype, s.batch) for s in several] == [("float32", 4), ("bfloat16", 4), ("float32", 2), ("bfloat16", 2)]


def test_without_a_question_a_preset_is_measured_as_usual():
    asked = dict(layers=None, skip=None, device="cpu", options={}, seed=0)
    usual = command.settings_of("cpu-small", dtype=None, batch=None, ratio=None, **asked)
    assert [Case(s.dtype, s.batch, s.length, s.ratio) for s in usual] == list(PRESETS["cpu-small"].cases)
    assert {s.dtype for s in usual} == {"float32", "bfloat16"} and {s.batch for s in usual} == {20, 4}
    smol = command.settings_of("smollm2-135m", dtype=None, batch=None, ratio=None, **asked)
    assert {(s.batch, s.length) for s in smol} == {(20, 512), (4, 128)} and {s.ratio for s in smol} == {0.4, 0.2}
    assert {s.dtype for s in smol} == {"float32", "bfloat16"} and len(smol) == 8
    (one,) = command.settings_of("cpu-small", dtype=None, batch=None, ratio="0.3", **asked)
    assert (one.dtype, one.batch, one.length, one.ratio) == ("float32", 20, 256, 0.3)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_the_models_shapes(name):
    preset = PRESETS[name]
    config = preset.config(1, 8)
    shape = {"llama-2-7b": (4096, 32, 32), "llama-3-8b": (4096, 32, 8), "opt-13b": (5120, 40, 40)}
    shape |= {"smollm2-135m": (576, 9, 3), "cpu-small": (1024, 16, 16)}
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert (config.hidden_size, config.num_attention_heads, kv_heads) == shape[name]
    with torch.device("meta"):
        import transformers

        whole = transformers.AutoModelForCausalLM.from_config(preset.config(preset.layers, 8))
    total = sum(parameter.numel() for parameter in whole.get_decoder().parameters()) / 1e9
    billions = {"llama-2-7b": 6.5, "llama-3-8b": 7.0, "opt-13b": 12.6, "smollm2-135m": 0.1345, "cpu-small": 0.026}
    assert total == pytest.approx(billions[name], rel=0.02)
    assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(command.PRESETS, "tiny", TINY)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: True)  # for good, in the process of all tests


def test_the_command_prints_tables_and_writes_them(small, tmp_path):
    out = tmp_path / "found"
    asked = ["--preset", "tiny", "--rounds", "2", "--batch", "2x16,1x8", "--threads", "1", "--out", str(out)]
    done = invoke(*asked)
    assert done.exit_code == 0, done.output
    for words in ("ideal (sliced beforehand)", "PP as in its public code", "decision overhead", "setting", "1 thread"):
        assert words in done.output, words
    data = json.loads((out / "bench.json").read_text())
    assert data["format"] == 1 and len(data["settings"]) == 2
    assert set(data["settings"][0]["arms"]) == set(arms.DEFAULT)
    assert "PP / ideal" in (out / "bench.md").read_text()
    again = invoke(*asked)
    assert again.exit_code == 2 and "exists" in again.output
    assert invoke(*asked, "--overwrite", "--cpu-time", "--set", "prune.history.pool=4").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "llama-2-7"], "--preset: unknown name 'llama-2-7' (did you mean 'llama-2-7b'?)"),
        (["--arms", "dense,ideel"], "--arms: unknown name 'ideel' (did you mean 'ideal'?)"),
        (["--arms", "ideal,pp"], "--arms: add the arm dense"),
        (["--dtype", "float64"], "--dtype: expected any of float32, bfloat16, float16; found 'float64'"),
        (["--batch", "20"], "--batch: expected sequences x tokens, such as 20x256; found '20'"),
        (["--ratio", "1.5"], "--ratio: expected shares to cut, between 0 and 1; found '1.5'"),
        (["--ratio", "x"], "--ratio: expected shares to cut, between 0 and 1; found 'x'"),
        (["--skip-layers", "0,1", "--layers", "2"], "all 2 layers are skipped"),
        (["--cpu-time", "--threads", "2"], "--cpu-time measures one thread on a processor"),
        (["--set", "model.name=x"], "--set model: a benchmark runs only PP"),
        (["--set", "prune.ratio=0.2"], "--set prune.ratio: a benchmark runs PP"),
        (["--set", "prune.history.pol=4"], "history.pol: unknown key (did you mean 'pool'?)"),
        (["--set", "prune=3"], "--set prune: set one of its keys, such as prune.history.pool=16; found 3"),
        (["--set", "prune.scorer=wanda_sp"], "--set prune.scorer: the arm pp-reference has its own"),
        (["--set", "prune.attention_unit=query_head"], "there is no ideal arm where query heads are cut under"),
        (["--device", "cuda"], "cuda was asked for"),
    ],
)
def test_mistakes_are_one_message(small, arguments, said):
    done = invoke("--preset", "tiny", "--rounds", "1", *arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert isinstance(done.exception, SystemExit)


def test_a_full_device_is_one_message(small, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(command, "measure", full)
    done = invoke("--preset", "tiny", "--out", str(tmp_path / "found"))
    said = " ".join(done.output.split())
    assert (
        done.exit_code == 2 and "memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.); name fewer" in said
    )
    assert not list(tmp_path.iterdir())


def test_the_command_is_told_without_its_folder():
    said = command.without_folder
    assert said(["bench", "--out", "bench", "--rounds", "9"]) == ["bench", "--out", "DIR", "--rounds", "9"]
    assert said(["bench", "--out=/a/b"]) == ["bench", "--out=DIR"] and said(["bench"]) == ["bench"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_stays_with_the_process():
    script = "from prunekit.compress.bench.malloc import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("True", "False"), done.stderr
