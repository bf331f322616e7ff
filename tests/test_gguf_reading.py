"""Models read from GGUF files: their values, tokens and names in results, and files that cannot be read."""

import builtins
import json
import sys

import pytest
import torch
import yaml
from prunekit.compress import Exporter, PipelineSpec
from prunekit.compress import load as load_export
from prunekit.compress.ablation.study import Study
from prunekit.compress.models import gguf_file
from prunekit.compress.models.loading import fingerprint, load
from prunekit.compress.models.source import ModelSource
from prunekit.registry import ModelError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.gguf_models import write_gguf

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

SIZES = dict(vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
STATEMENT = "dequantised from GGUF Q4_1"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **gguf_file.LLAMA3}


@pytest.fixture
def model(make_model):
    return make_model("llama-gqa", tie_word_embeddings=True, **SIZES)


@pytest.fixture
def folder(tmp_path, model):
    """A folder with a GGUF of ``model`` in Q4_1, and the text to measure on."""
    write_gguf(tmp_path / "models" / "small.gguf", model)
    (tmp_path / "text.txt").write_text("the thin thing in 1999 " * 200)
    return tmp_path / "models"


@pytest.fixture
def pipeline(folder):
    """The content of a pipeline file next to the folder."""
    return {
        "model": {"name": "models", "gguf": "small.gguf", "device": "cpu"},
        "calibration": {"file": "text.txt", "sequences": 4, "length": 32},
        "prune": {"use": "flap", "ratio": 0.4},
        "evaluate": [{"name": "perplexity", "text": {"file": "text.txt"}, "window": 32, "limit": 4}],
    }


def source(folder, **options):
    return ModelSource(name=str(folder), **{"gguf": "small.gguf", "device": "cpu", **options})


def refusal(folder, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load(source(folder, **options))
    message = str(caught.value)
    assert len(message) < 600 and "\n" not in message
    return message


def test_the_weights_are_those_of_the_file(tmp_path, model):
    loaded = load(source(write_gguf(tmp_path / "small.gguf", model, quantised=None).parent))
    assert loaded.identity["weights"] == "read from GGUF F32"
    assert fingerprint(loaded.model) == fingerprint(model)
    ids = torch.arange(20)[None]
    assert torch.allclose(loaded.model(ids).logits, model(ids).logits, atol=1e-4)


def test_quantised_weights_become_a_plain_model(folder, model, tmp_path):
    from gguf.quants import dequantize, quantize

    loaded = load(source(folder))
    assert loaded.identity == {
        "name": f"{folder}/small.gguf",
        "revision": None,
        "commit": None,
        "trust_remote_code": False,
        "weights": STATEMENT,
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    stored = model.model.layers[0].mlp.up_proj.weight.numpy()
    expected = torch.from_numpy(dequantize(quantize(stored, kind), kind))
    assert torch.equal(loaded.model.model.layers[0].mlp.up_proj.weight, expected)
    assert loaded.model.dtype == torch.float32 and not loaded.model.is_quantized
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert "quant" not in (tmp_path / "saved" / "config.json").read_text()
    again = load(ModelSource(name=str(tmp_path / "saved"), device="cpu"))
    assert fingerprint(again.model) == fingerprint(loaded.model)
    assert again.tokenizer("in 1999")["input_ids"] == loaded.tokenizer("in 1999")["input_ids"]
    assert load(source(folder, dtype="bfloat16")).model.dtype == torch.bfloat16


def test_the_tokenizer_is_the_files_own_and_splits_digits_as_llama_cpp_does(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    (folder / "chat_template.jinja").write_text("another model's")
    tokenizer = load(source(folder)).tokenizer
    assert tokenizer.tokenize("in the  12") == ["in", "Ġth", "e", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.bos_token == "<|im_start|>" and tokenizer.chat_template is None
    words = [tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in ("  12",)]
    assert [word for word, _ in words[0]] == ["ĠĠ", "1", "2"]


def test_llama_3_rotary_factors_are_read(tmp_path, make_model):
    model = make_model("llama-gqa", tie_word_embeddings=True, rope_parameters=LLAMA3, **SIZES)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    factors = (1.0 / LLAMA3["rope_theta"] ** (torch.arange(8) / 8) / scaled).numpy()
    place = write_gguf(tmp_path / "small.gguf", model, None, tensors={"rope_freqs.weight": factors}).parent
    loaded = load(source(place))
    assert loaded.model.config.rope_parameters == LLAMA3
    ids = torch.arange(60)[None]
    assert torch.allclose(loaded.model(ids).logits, model(ids).logits, atol=1e-4)
    factors[3] *= 2
    write_gguf(tmp_path / "other" / "small.gguf", model, None, tensors={"rope_freqs.weight": factors})
    assert "rope_freqs.weight" in refusal(tmp_path / "other")


def test_a_run_states_the_source_and_is_exported(folder, pipeline, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(pipeline))
    code, output = command("run", "run.yaml", "--out", "results")
    assert code == 0, output
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"]["weights"] == STATEMENT
    assert f"float32, weights {STATEMENT} on cpu" in (tmp_path / "results" / "report.md").read_text()
    for profile in ("hf-hetero", "gguf"):
        code, output = command("export", "results", "--profile", profile, "--out", profile)
        assert code == 0, output
        assert STATEMENT in (tmp_path / profile / "README.md").read_text()
    exported = load(ModelSource(name=str(tmp_path / "hf-hetero"), device="cpu"))
    assert exported.identity["weights"] == STATEMENT  # also where the export itself is measured
    assert command("verify", "hf-hetero")[0] == 0
    code, output = command("evaluate", folder / "small.gguf", "--set", "evaluate=[cost]", "--set", "model.device=cpu")
    assert code == 0 and "small.gguf,notpruned" in "".join(output.split())  # a long path breaks anywhere


def test_a_dynamic_export_finds_its_base_again(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = PipelineSpec.of({**pipeline, "prune": {"use": "pp", "ratio": 0.4}})
    assert Exporter(spec, "dynamic", tmp_path / "out").export().base.weights == STATEMENT
    assert load_export(tmp_path / "out", device="cpu").pruned is not None


def test_trial_keys_have_the_files_content(folder, model, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "base: {model: {name: models, gguf: small.gguf}, prune: {use: magnitude}}\nvary: {prune.ratio: [0.2]}\n"
    )
    (key,) = (trial.key for trial in Study.load(file).trials)
    (folder / "another.gguf").write_bytes(b"GGUF")
    assert Study.load(file).trials[0].key == key  # only the named file counts
    write_gguf(folder / "small.gguf", model, quantised=None)
    assert Study.load(file).trials[0].key != key


def test_a_model_can_be_named_alone(folder, tmp_path):
    spec = PipelineSpec.of({"model": "models", "prune": {"use": "pp", "ratio": 0.4}}, folder=tmp_path)
    assert spec.model.name == str(folder)
    assert PipelineSpec.of({"model": "bundled", "prune": {"use": "pp", "ratio": 0.4}}).model == ModelSource()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general__architecture": "deci"}, "architecture 'deci', which prunekit's export writes for llama.cpp"),
        ({"general__architecture": "rwkv7"}, "architecture 'rwkv7', which transformers"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type: 'yarn'"),
        ({"tokenizer__ggml__model": None}, "holds no tokenizer"),
        ({"tokenizer__ggml__model": "plamo2"}, "tokenizer.ggml.model: 'plamo2'"),
        ({"tokenizer__ggml__pre": "chatglm-bpe"}, "tokenizer.ggml.pre: 'chatglm-bpe'"),
        ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre: None"),
    ],
)
def test_what_transformers_cannot_read(tmp_path, model, changes, message):
    write_gguf(tmp_path / "small.gguf", model, **changes)
    found = refusal(tmp_path)
    assert message in found and ("tokenizer: FOLDER_OR_HUB_ID" in found) == ("tokenizer" in message)


def test_another_tokenizer_can_be_given(tmp_path, folder, model):
    load(source(folder)).tokenizer.save_pretrained(tmp_path / "words")
    write_gguf(tmp_path / "small.gguf", model, tokenizer__ggml__model=None)
    loaded = load(source(tmp_path, tokenizer=str(tmp_path / "words")))
    assert loaded.identity["tokenizer"] == str(tmp_path / "words")
    assert loaded.tokenizer.tokenize("in 12") == ["in", "Ġ", "1", "2"]
    assert "tokenizer: folder ./nowhere does not exist" in refusal(tmp_path, tokenizer="./nowhere")


def test_tensors_that_would_be_left_out_are_refused(tmp_path, model):
    import numpy as np

    more = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    write_gguf(tmp_path / "small.gguf", model, tensors=more)
    assert "1 tensors that transformers' LlamaForCausalLM does not have" in refusal(tmp_path)


def test_files_that_are_damaged_or_elsewhere(folder, tmp_path, monkeypatch):
    whole = (folder / "small.gguf").read_bytes()
    for length in (5, 200, len(whole) // 2, len(whole) - 100):
        (folder / "small.gguf").write_bytes(whole[:length])
        found = refusal(folder)
        assert "is damaged or cut off" in found and "download or copy it again" in found
    (folder / "small.gguf").write_bytes(b"{}")
    assert "is not a GGUF" in refusal(folder)
    assert "there are small.gguf" in refusal(folder, gguf="other.gguf")
    (tmp_path / "away.gguf").write_bytes(whole)
    assert "outside of" in refusal(folder, gguf="../away.gguf")
    assert f"write model: {{name: {folder}, gguf: small.gguf}}" in refusal(folder / "small.gguf", gguf=None)
    assert "set model.gguf: small.gguf" in refusal(folder, gguf=None)
    with pytest.raises(ValueError, match="set name to the folder"):
        ModelSource(gguf="small.gguf")


def test_without_the_package(folder, monkeypatch):
    importing = builtins.__import__

    def without(name, *rest):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "gguf")
    assert "pip install gguf" in refusal(folder)
