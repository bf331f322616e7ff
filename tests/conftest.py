"""Fixtures: tiny models built from a config (no downloads), and the shared reference material where it lies."""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests' models are so small that a second thread only waits for the first, for minutes where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    # The tiny models have so few units that nearly every cut is noted; test_notes.py looks at these warnings.
    config.addinivalue_line("filterwarnings", "ignore::prunekit.registry.errors.PruneWarning")


def pytest_collection_finish():
    # Millions of objects of torch, transformers and pytest: garbage collections between and in tests pass them over.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """The test that leaves torch's gradients off fails, and not those that run after it."""
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "the test has left torch's gradient mode off"


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


@pytest.fixture(scope="session")
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


@pytest.fixture
def make_tokenizer():
    """Makes a tokenizer of 97 words, for models built from a config."""

    def make():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(94))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


@pytest.fixture
def save_model(make_model, make_tokenizer):
    """Saves a small model with its tokenizer and a text, and returns the ``model`` section that names it."""

    def save(folder: Path, family: str = "llama-gqa", **overrides) -> dict:
        make_model(family, **overrides).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(94, (4000,), generator=generator).tolist()
        (folder / "text.txt").write_text(" ".join(f"w{number}" for number in ids))
        return {"name": str(folder), "device": "cpu"}

    return save


@pytest.fixture
def small_pipeline(tmp_path, save_model):
    """Makes a pipeline file's content for a small saved model: ``small_pipeline("llama-gqa", use="flap", ...)``."""

    def make(family: str = "llama-gqa", model: dict | None = None, **strategy) -> dict:
        folder = tmp_path / f"base-{family}"
        section = save_model(folder, family, **(model or {})) if not folder.exists() else {"name": str(folder)}
        text = str(folder / "text.txt")
        return {
            "model": section,
            "calibration": {"file": text, "sequences": 6, "length": 32, "batch_size": 2},
            "evaluate": [{"name": "perplexity", "text": {"file": text}, "window": 32, "batch_size": 4, "limit": 8}],
            "prune": {"ratio": 0.4, **strategy},
        }

    return make


@pytest.fixture(scope="session")
def command():
    """Runs prunekit and returns exit code and all output, white space folded."""
    from prunekit.compress.cli.main import app
    from typer.testing import CliRunner

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


@pytest.fixture(scope="session")
def fits_schema():
    """By kind of file, pipeline or ablation: whether data fits the schema in docs/schema."""
    import jsonschema

    found = {}
    for kind in ("pipeline", "ablation"):
        schema = json.loads((ROOT / "docs" / "schema" / f"{kind}.schema.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        found[kind] = jsonschema.Draft202012Validator(schema).is_valid
    return found
