"""Families that people use, from a pipeline file to an exported model that generates, by the commands of a user."""

import pytest
import torch
import transformers
import yaml
from prunekit.compress.bundled import MODEL
from prunekit.compress.pruning.checking import randomise

from tests.test_families import tiny

WHOLE = {"allocator": {"name": "explicit", "attention": [0, 0], "mlp": [0.5, 0.5]}, "ratio": None}

CASES = [
    ("qwen3_moe", "hf-uniform", {"use": "reap", "ratio": 0.5}),
    ("qwen3_moe", "hf-uniform", {"use": "wanda_sp", "ratio": 0.5, "scorer": "magnitude"}),
    ("gemma3_text", "hf-uniform", {"use": "wanda_sp", "ratio": 0.5}),
    ("gemma3_text", "hf-hetero", {"use": "flap", "ratio": 0.4, "compensate": "none"}),
    ("phi3", "hf-uniform", {"use": "wanda_sp", "ratio": 0.5}),
    ("phi3", "hf-hetero", {"use": "wanda_sp", "ratio": 0.4, "skip_layers": [0]}),
    ("gpt_neox", "hf-uniform", {"use": "wanda_sp", **WHOLE}),
    ("gpt_neox", "hf-hetero", {"use": "flap", "ratio": 0.4}),
    ("gpt_neox", "dynamic", {"use": "pp", "ratio": 0.4, "skip_layers": []}),
    ("qwen3_moe", "dynamic", {"use": "pp", "ratio": 0.4, "skip_layers": []}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "profile", "prune"), CASES)
def test_a_pipeline_file_prunes_exports_and_the_export_generates(kind, profile, prune, tmp_path, command):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    randomise(tiny(kind, vocab_size=4096)).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    pipeline = {
        "model": {"name": "model", "device": "cpu"},
        "calibration": {"sequences": 4, "length": 32},
        "prune": prune,
        "evaluate": [{"name": "perplexity", "window": 32, "limit": 4, "batch_size": 2}],
    }
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(pipeline))
    code, output = command("export", file, "--profile", profile, "--out", out)
    assert code == 0, output
    code, output = command("verify", out)
    assert code == 0, output
    if profile == "dynamic":
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 12)
