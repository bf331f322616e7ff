"""Exported folders, loaded in a fresh process without prunekit: equal logits, equal greedy tokens under every cache."""

import json
import os
import subprocess
import sys

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.export.profiles import profile_named
from prunekit.compress.export.writing import write_model
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

NEW_TOKENS = 8
CACHES = ({}, {"cache_implementation": "static"}, {"use_cache": False})

UNEVEN = {"name": "explicit", "attention": [0, 0.5, 0.3], "mlp": [0, 0.45, 0.2]}
UNEVEN_MHA = {"name": "explicit", "attention": [0, 0.5, 0.25], "mlp": [0.1, 0.45, 0.2]}
MLP_ONLY = {"name": "explicit", "attention": [0, 0, 0], "mlp": [0.5, 0.5, 0.5]}
HALF = {"name": "explicit", "attention": [0.5, 0.5, 0.5], "mlp": [0.5, 0.5, 0.5]}
FIVE_EIGHTHS = {"name": "explicit", "attention": [0.25, 0.25, 0.25], "mlp": [0.25, 0.25, 0.25]}
FAMILIES = ("llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt")

# family, profile, allocator, compensation, tied embeddings, class that transformers must load
CASES = [
    *(
        (family, "hf-hetero", UNEVEN_MHA if family in ("llama-mha", "opt") else UNEVEN, compensate, tied, None)
        for family in FAMILIES
        for compensate, tied in (("none", False), ("mean", True), ("least_squares", False))
    ),
    ("llama-gqa", "hf-uniform", HALF, "none", False, "LlamaForCausalLM"),
    ("llama-gqa", "hf-uniform", HALF, "mean", True, "LlamaForCausalLM"),
    ("llama-gqa", "hf-uniform", FIVE_EIGHTHS, "none", True, "MistralForCausalLM"),
    ("llama-gqa", "hf-uniform", FIVE_EIGHTHS, "least_squares", False, "GraniteForCausalLM"),
    ("llama-mha", "hf-uniform", FIVE_EIGHTHS, "none", False, "MistralForCausalLM"),
    ("llama-mha", "hf-uniform", FIVE_EIGHTHS, "mean", True, "GraniteForCausalLM"),
    ("mistral", "hf-uniform", FIVE_EIGHTHS, "none", False, "MistralForCausalLM"),
    ("mistral", "hf-uniform", HALF, "mean", False, "LlamaForCausalLM"),
    ("qwen2", "hf-uniform", MLP_ONLY, "none", True, "Qwen2ForCausalLM"),
    ("qwen2", "hf-uniform", HALF, "none", True, "LlamaForCausalLM"),
    ("qwen2", "hf-uniform", FIVE_EIGHTHS, "none", False, "GraniteForCausalLM"),
    ("qwen2", "hf-uniform", HALF, "mean", False, "LlamaForCausalLM"),
    ("qwen2", "hf-uniform", FIVE_EIGHTHS, "mean", False, "GraniteForCausalLM"),
    ("qwen3", "hf-uniform", FIVE_EIGHTHS, "none", False, "Qwen3ForCausalLM"),
    ("opt", "hf-uniform", MLP_ONLY, "none", True, "OPTForCausalLM"),
    ("opt", "hf-uniform", MLP_ONLY, "mean", False, "OPTForCausalLM"),
    ("llama-gqa", "padded", UNEVEN, "none", True, "LlamaForCausalLM"),
    ("llama-gqa", "padded", UNEVEN, "least_squares", False, "LlamaForCausalLM"),
    ("qwen3", "padded", UNEVEN, "none", False, "Qwen3ForCausalLM"),
    ("opt", "padded", UNEVEN_MHA, "mean", True, "OPTForCausalLM"),
]

LOADING = """
import json, sys
class NoPrunekit:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "prunekit":
            raise ImportError("prunekit is not to be used here")
sys.meta_path.insert(0, NoPrunekit())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in json.load(open(sys.argv[1])):
    want = load_file(folder + "/expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(want["ids"]).logits
    same = []
    for number, cache in enumerate(CACHES):
        tokens = model.generate(want["ids"], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **cache)
        same.append(torch.equal(tokens, want[f"tokens.{number}"]))
    output = model.get_output_embeddings().weight
    found[folder] = {
        "class": type(model).__name__,
        "difference": float((logits - want["logits"]).abs().max()),
        "scale": float(want["logits"].abs().max()),
        "tokens": same,
        "tied": output.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
        "dtype": str(model.dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
json.dump(found, open(sys.argv[2], "w"))
"""


def name_of(case) -> str:
    family, profile, _, compensate, tied, cls = case
    return "-".join([family, profile, compensate, "tied" if tied else "untied", cls or "own"])


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, make_model):
    """What a fresh process found in all folders, by case."""
    root = tmp_path_factory.mktemp("exports")
    folders, parameters = {}, {}
    for number, case in enumerate(CASES):
        folders[name_of(case)] = folder = root / str(number)
        parameters[name_of(case)] = written(folder, make_model, *case[:5])
    (root / "folders.json").write_text(json.dumps([str(folder) for folder in folders.values()]))
    script = root / "loading.py"
    script.write_text(LOADING.replace("CACHES", repr(CACHES)).replace("NEW_TOKENS", str(NEW_TOKENS)))
    command = [sys.executable, str(script), str(root / "folders.json"), str(root / "found.json")]
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((root / "found.json").read_text())
    return {name: {**found[str(folder)], "written": parameters[name]} for name, folder in folders.items()}


def written(folder, make_model, family, profile, allocator, compensate, tied) -> int:
    """Write a pruned model and what it computes; returns its parameters."""
    model = make_model(family, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(7)
    batches = [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(3)]
    ids = batches[0]["input_ids"][:2, :10].contiguous()
    options = {"calibration": batches, "allocator": allocator, "ratio": None, "compensate": compensate}
    folder.mkdir()
    with prune(model, "wanda_sp", **options) as pruned:
        write_model(profile_named(profile), pruned, NoTokenizer(), folder)
        expected = {"ids": ids, "logits": model(ids).logits}
        for number, cache in enumerate(CACHES):
            tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **cache)
            expected[f"tokens.{number}"] = tokens
        save_file(expected, folder / "expected.safetensors")
        return pruned.active_parameters()


class NoTokenizer:
    def save_pretrained(self, folder):
        """Nothing: these models read no text."""


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_fresh_process_computes_the_same(case, reloaded):
    found = reloaded[name_of(case)]
    profile, tied, cls = case[1], case[4], case[5]
    assert found["difference"] <= 1e-5 * max(1, found["scale"])
    assert found["tokens"] == [True, True, True]
    assert found["tied"] is tied
    assert found["class"] == cls or (cls is None and found["class"].startswith("Prunekit"))
    assert found["dtype"] == "torch.float32"
    if profile == "hf-hetero":
        assert found["parameters"] == found["written"]


def test_own_shapes_are_bit_equal(reloaded):
    exact = [found["difference"] == 0 for name, found in reloaded.items() if "hf-hetero" in name]
    assert all(exact)


def test_the_comparison_notices_other_weights(reloaded):
    """The logits are wide enough that a wrong cut would show."""
    assert min(found["scale"] for found in reloaded.values()) > 1
