"""What a GGUF file of a cut model holds, read back with the gguf package, and what cannot be written."""

import builtins
import json
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from prunekit.compress.export.cut_model import LayerShape
from prunekit.compress.export.gguf import file
from prunekit.compress.export.gguf.file import check_supported, interleaved, write_gguf
from prunekit.compress.export.weights import PlannedTensor, dense_tensors
from prunekit.registry import ModelError, SpecError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

HIDDEN, HEAD_DIM, ROWS = 64, 16, 300
SHAPES = [LayerShape(4, 2, 96, False, True), LayerShape(1, 1, 32, True, False), LayerShape(6, 3, 7, False, False)]
SIZES = {"hidden_size": HIDDEN, "head_dim": HEAD_DIM, "num_attention_heads": 8, "num_key_value_heads": 4}


def config_of(kind="Llama", **options):
    options = {"vocab_size": ROWS, "num_hidden_layers": 3, "max_position_embeddings": 256} | SIZES | options
    return getattr(transformers, f"{kind}Config")(**options)


def planned(dtype=torch.float32, tied=False, biased=False):
    """Random tensors of the shapes above."""
    sizes = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        sizes["lm_head.weight"] = (ROWS, HIDDEN)
    for index, layer in enumerate(SHAPES):
        rows = {
            "self_attn.q_proj": (layer.heads * HEAD_DIM, HIDDEN, biased),
            "self_attn.k_proj": (layer.kv_heads * HEAD_DIM, HIDDEN, biased),
            "self_attn.v_proj": (layer.kv_heads * HEAD_DIM, HIDDEN, biased),
            "self_attn.o_proj": (HIDDEN, layer.heads * HEAD_DIM, layer.attention_bias),
            "mlp.gate_proj": (layer.width, HIDDEN, biased),
            "mlp.up_proj": (layer.width, HIDDEN, biased),
            "mlp.down_proj": (HIDDEN, layer.width, layer.mlp_bias),
        }
        for name, (outputs, inputs, bias) in rows.items():
            sizes[f"model.layers.{index}.{name}.weight"] = (outputs, inputs)
            if bias:
                sizes[f"model.layers.{index}.{name}.bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{index}.{norm}.weight"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}

    return {name: PlannedTensor(size, dtype, partial(values.get, name)) for name, size in sizes.items()}


def tokenizer_of_bytes():
    tokens = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write(path, config=None, layers=SHAPES, **options):
    notes = write_gguf(
        path,
        config or config_of(),
        layers,
        planned(**options),
        tokenizer_of_bytes(),
        name="small and uneven",
    )
    return gguf.GGUFReader(path), notes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_metadata(path):
    config = config_of(rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    file, notes = write(path, config)
    found = {key: field.contents() for key, field in file.fields.items()}
    expected = {
        "general.architecture": "deci",
        "general.type": "model",
        "general.name": "small and uneven",
        "general.file_type": 0,
        "deci.block_count": 3,
        "deci.context_length": 256,
        "deci.embedding_length": 64,
        "deci.vocab_size": 300,
        "deci.attention.head_count": [4, 1, 6],
        "deci.attention.head_count_kv": [2, 1, 3],
        "deci.feed_forward_length": [96, 32, 7],
        "deci.attention.key_length": 16,
        "deci.attention.value_length": 16,
        "deci.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "deci.rope.dimension_count": 16,
        "deci.rope.freq_base": 5e5,
    }
    assert {key: found[key] for key in expected} == expected
    assert not any("rope.scaling" in key for key in found)
    assert notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors(dtype, path):
    file, _ = write(path, dtype=dtype, biased=True)
    found = {tensor.name: tensor for tensor in file.tensors}
    source = {name: plan.make() for name, plan in planned(dtype=dtype, biased=True).items()}
    assert len(found) == len(source)
    stored = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_v.bias": "model.layers.1.self_attn.v_proj.bias",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.1.attn_output.bias": "model.layers.1.self_attn.o_proj.bias",
        "blk.2.ffn_gate.weight": "model.layers.2.mlp.gate_proj.weight",
        "blk.2.ffn_up.bias": "model.layers.2.mlp.up_proj.bias",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_down.bias": "model.layers.0.mlp.down_proj.bias",
    }
    for target, name in names.items():
        tensor, expected = found[target], source[name]
        assert tensor.tensor_type.name == (stored if expected.dim() > 1 else "F32"), target
        assert tuple(reversed(tensor.shape)) == tuple(expected.shape), target
        assert values(tensor).equal(expected.float()), target
    for target, name in (("blk.2.attn_q", "q_proj"), ("blk.2.attn_k", "k_proj")):
        for part in ("weight", "bias"):
            expected = interleaved(source[f"model.layers.2.self_attn.{name}.{part}"], HEAD_DIM)
            assert values(found[f"{target}.{part}"]).equal(expected.float()), target


def values(tensor):
    """A tensor read from a file, as float32 torch tensor."""
    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(tensor.data.copy()).float()


def test_rotary_layout():
    rows = torch.arange(12.0)[:, None]
    assert interleaved(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleaved(rows[:, 0], 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]


def test_tied_embeddings_are_written_once(path):
    file, _ = write(path, tied=True)
    names = [tensor.name for tensor in file.tensors]
    assert "token_embd.weight" in names and "output.weight" not in names


@pytest.mark.parametrize(
    ("method", "change", "complaint"),
    [
        ("add_head_count", lambda counts: [*counts[:-1], 5], r"head_count is \[4, 1, 5\], not \[4, 1, 6\]"),
        ("add_token_list", lambda tokens: [*tokens[:-1], tokens[0]], "two tokens have the text"),
        ("add_token_list", lambda tokens: tokens[:-1], "299 tokens for 300 rows"),
        ("add_key_length", lambda length: length + 1, "key_length is 17, not 16"),
        ("write_tensor_data", lambda values: values + 1, r"the values of .* are not those that were written"),
        ("add_bos_token_id", lambda index: 300, "bos_token_id is 300, beyond the 300 tokens"),
    ],
)
def test_a_file_that_is_not_what_was_to_be_written_is_refused(path, method, change, complaint, monkeypatch):
    stock = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, value, *rest: stock(self, change(value), *rest))
    with pytest.raises(ModelError, match=complaint):
        write(path, config_of(bos_token_id=1))


def test_a_tensor_that_is_not_written_is_noticed(path, monkeypatch):
    stock = file._plans
    lost = "blk.1.ffn_up.weight"
    monkeypatch.setattr(file, "_plans", lambda *_: {k: v for k, v in stock(*_).items() if k != lost})
    with pytest.raises(ModelError, match=f"{lost} is missing"):
        write(path)


def test_an_output_layer_of_its_own_is_kept_whatever_the_config_says(tmp_path, make_model):
    """As in checkpoints whose config.json says tie_word_embeddings: true next to a second matrix."""
    model = make_model("llama-gqa", tie_word_embeddings=True)
    tied = dense_tensors(model)
    assert "lm_head.weight" not in tied
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    assert dense_tensors(model).keys() - tied.keys() == {"lm_head.weight"}
    assert tied.keys() == dense_tensors(make_model("llama-gqa", tie_word_embeddings=True)).keys()


@pytest.mark.parametrize("profile", ["gguf", "hf-uniform"])
def test_an_output_layer_of_its_own_is_exported(profile, tmp_path, small_pipeline):
    from prunekit.compress import Exporter, PipelineSpec

    content = small_pipeline(use="magnitude", model={"vocab_size": ROWS})
    config = Path(content["model"]["name"]) / "config.json"
    tokenizer_of_bytes().save_pretrained(config.parent)
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    Exporter(PipelineSpec.of(content), profile, tmp_path / "out").export()
    if profile == "gguf":
        assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    else:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_one_tensor_is_held_at_a_time(path):
    made, held = [], []

    def fresh(plan):
        def make():
            held.append(sum(tensor() is not None for tensor in made))
            tensor = torch.zeros(plan.shape, dtype=plan.dtype)
            made.append(weakref.ref(tensor))
            return tensor

        return make

    tensors = {name: PlannedTensor(plan.shape, plan.dtype, fresh(plan)) for name, plan in planned().items()}
    write_gguf(path, config_of(), SHAPES, tensors, tokenizer_of_bytes(), name="lazy")
    assert held == [0] * len(tensors)


def test_nothing_is_made_or_written_where_something_is_refused(path):
    tensors = {name: PlannedTensor(plan.shape, plan.dtype, pytest.fail) for name, plan in planned().items()}
    tokenizer = tokenizer_of_bytes()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="Whitespace"):
        write_gguf(path, config_of(), SHAPES, tensors, tokenizer, name="refused")
    assert not path.exists()


def test_rope_scaling(path):
    rope = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    llama3 = rope | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_of(rope_parameters=llama3)
    file, _ = write(path, config)
    (factors,) = (tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(plain / values(factors), scaled)
    assert values(factors).min() == 1 and values(factors).max() == 8

    for kind in ("linear", "yarn"):
        file, _ = write(path, config_of(rope_parameters=rope | {"rope_type": kind}))
        assert file.get_field("deci.rope.scaling.type").contents() == kind
        assert file.get_field("deci.rope.scaling.factor").contents() == 8.0
    assert file.get_field("deci.rope.scaling.original_context_length").contents() == 64


REFUSED = {
    "qwen3 models cannot be written .*no norm on queries.*hf-hetero, or with hf-uniform": lambda: config_of("Qwen3"),
    "opt models cannot be written .*llama, mistral, qwen2 can": lambda: transformers.OPTConfig(),
    "hidden_act is 'gelu'.*hf-hetero or hf-uniform": lambda: config_of(hidden_act="gelu"),
    "sliding window of 128 positions.*set sliding_window to null": lambda: config_of("Mistral", sliding_window=128),
    "rope_type is 'dynamic', but it can be default, linear": lambda: rope("dynamic"),
    "partial_rotary_factor is 0.5": lambda: rope("default", partial_rotary_factor=0.5),
    "beta_fast is 16, but with YaRN it can be 32": lambda: rope("yarn", beta_fast=16),
    "attention_factor is 2.0, but with YaRN": lambda: rope("yarn", attention_factor=2.0),
    "mscale is 1.0, but with YaRN it can be absent": lambda: rope("yarn", mscale=1.0),
}


def rope(kind, **options):
    return config_of(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | options)


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_cannot_be_written(message):
    with pytest.raises(ModelError, match=f"(?s)profile gguf: .*{message}"):
        check_supported(REFUSED[message]())


def test_models_that_can_be_written():
    check_supported(config_of("Mistral", sliding_window=None))
    check_supported(config_of("Mistral", sliding_window=4096))  # longer than any context
    check_supported(config_of("Qwen2", use_sliding_window=False, sliding_window=16))
    check_supported(rope("yarn", attention_factor=None, beta_fast=32.0, truncate=True))


def test_layers_that_cannot_be_written(path):
    with pytest.raises(ModelError, match=r"layer 1 has 3 query heads, 2 key/value heads.*attention_unit: kv_group"):
        write(path, layers=[SHAPES[0], LayerShape(3, 2, 32, True, False), SHAPES[2]])
    with pytest.raises(ModelError, match=r"float64; load the model in one of float32, float16, bfloat16"):
        write(path, dtype=torch.float64)
    extra = planned() | {"model.layers.0.self_attn.extra.weight": planned()["model.norm.weight"]}
    with pytest.raises(ModelError, match=r"self_attn\.extra\.weight has no place"):
        write_gguf(path, config_of(), SHAPES, extra, tokenizer_of_bytes(), name="extra")
    assert not path.exists()


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "gguf")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SpecError, match="pip install gguf"):
        check_supported(config_of())
