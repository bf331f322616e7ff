"""Fixtures: tiny models built from a config (no downloads), and the shared reference material where it lies."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests' models are so small that a second thread only waits for the first, for minutes where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

SIZES = dict(vocab_size=97, hidden_size=128, num_hidden_layers=3, num_attention_heads=8, max_position_embeddings=256)
LLAMA_LIKE = dict(intermediate_size=192, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def build_model(family: str, seed: int = 0, attention: str = "sdpa", **overrides):
    """A tiny random model of a family: llama-mha, llama-gqa, mistral, qwen2, qwen3 or opt."""
    import transformers

    kind = family.split("-")[0]
    if kind == "opt":
        sizes = dict(ffn_dim=192, word_embed_proj_dim=128, dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        config = transformers.OPTConfig(**{**SIZES, **sizes, **overrides})
    else:
        heads = 8 if family == "llama-mha" else 4
        config_class = {
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
        }[kind]
        extra = {"head_dim": 16} if kind == "qwen3" else {}
        config = config_class(**{**SIZES, **LLAMA_LIKE, "num_key_value_heads": heads, **extra, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # wide enough that a wrong cut moves the logits
            elif "bias" in name:
                parameter.normal_(0, 0.3)
    return model.requires_grad_(False)


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def make_counting():
    """Makes small models that count in ``passes`` how often their decoder runs."""

    def make(**options):
        found = build_model("llama-gqa", **options)
        found.passes = 0

        def count(*_):
            found.passes += 1

        found.model.register_forward_pre_hook(count)
        return found

    return make


@pytest.fixture
def shared() -> Path:
    """The folder of shared reference material; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared reference material")
    return SHARED


@pytest.fixture
def batches():
    """Four calibration batches of 4 x 24 tokens."""
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(4)]
