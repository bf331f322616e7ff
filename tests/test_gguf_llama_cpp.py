"""Uneven models in GGUF compute in unmodified llama.cpp what transformers computes, and read text the same way."""

import json
import re

import pytest
import torch
from prunekit.compress.bundled import MODEL, TEXTS
from prunekit.compress.export.cut_model import LayerShape
from prunekit.compress.export.gguf import file as gguf_file
from prunekit.compress.export.gguf.byte_level import LLAMA3, QWEN2, TEKKEN
from prunekit.compress.export.gguf.file import write_gguf
from prunekit.compress.export.gguf.tokenizer import read_vocabulary
from prunekit.compress.export.weights import PlannedTensor
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

TEXT = (
    "It's  the dog's 1st day; they'll've 12345.67 km²\n\n\n   to go,\tWE'RE told.  \r\n"
    "Ünïcödé naïve café — 東京タワー 🙂 Привет мир! x==y && !z  // end   "
    "the value of an expression is evaluated before everything otherwise specified therein"
)


def cut(model, layers):
    """Cut a transformers model in place to these shapes, keeping the first units; give its tensors, lazily."""
    config = model.config
    for layer, shape in zip(model.model.layers, layers, strict=True):
        attention, mlp, size = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        attention.q_proj = sliced(attention.q_proj, rows=shape.heads * size)
        attention.k_proj = sliced(attention.k_proj, rows=shape.kv_heads * size)
        attention.v_proj = sliced(attention.v_proj, rows=shape.kv_heads * size)
        attention.o_proj = sliced(attention.o_proj, columns=shape.heads * size, bias=shape.attention_bias)
        attention.num_key_value_groups = shape.heads // shape.kv_heads
        mlp.gate_proj = sliced(mlp.gate_proj, rows=shape.width)
        mlp.up_proj = sliced(mlp.up_proj, rows=shape.width)
        mlp.down_proj = sliced(mlp.down_proj, columns=shape.width, bias=shape.mlp_bias)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: PlannedTensor(tuple(t.shape), t.dtype, lambda t=t: t.contiguous()) for name, t in state.items()}


def sliced(linear, rows=None, columns=None, bias=False):
    weight = linear.weight.data[:rows, :columns].clone()
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias or linear.bias is not None, dtype=weight.dtype)
    part.weight.data = weight
    if linear.bias is not None:
        part.bias.data = linear.bias.data[:rows].clone()
    elif bias:
        part.bias.data.normal_(0, 0.1)
    return part.requires_grad_(False)


def uneven(model, groups=(1, 3, 2, 4), widths=(64, 160, 96, 128), biased=(1, 2)):
    config = model.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    shapes = []
    for index in range(config.num_hidden_layers):
        kept, width, bias = groups[index % len(groups)], widths[index % len(widths)], index in biased
        # Layers may differ in the query heads of a group as well.
        heads = kept * per_group if index % 3 or per_group == 1 else kept * (per_group - 1)
        shapes.append(LayerShape(heads, kept, width, bias, bias))
    return shapes


def byte_level(expression=None, vocab_size=300, ignore_merges=False, normalizer=None, digits=False, bos=False):
    """A small trained byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    byte_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    steps = [pre_tokenizers.Split(Regex(expression), "isolated")] if expression else []
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else steps
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_step]) if steps else byte_step
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.add_tokens(["[TOOL]"])
    tokenizer.train_from_iterator([TEXT * 3, "the they then dog dog's 123 12345 WE'RE café"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def characters(spaces="normalizer"):
    """A small trained character BPE with byte fallback, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if spaces == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spaces, split=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, limit_alphabet=60)
    # Merges that compete for the same characters need a text of words.
    words = TEXTS["reference-calibration"].read_text(encoding="utf-8")[:20_000].split()
    tokenizer.train_from_iterator([" ".join(words[place : place + 3]) for place in range(len(words))], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def load(path, **options):
    # Keys and values in float32, no flash attention: llama.cpp's defaults round to float16.
    options = {"n_ctx": 128, "logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False} | options
    return llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **options)


def logits(path, ids, **options):
    """llama.cpp's logits (T, V) of token ids."""
    model = load(path, **options)
    model.eval(ids)
    found = torch.tensor(model.scores[: len(ids)])
    model.close()
    return found


def error(found, expected):
    """The largest difference, relative to the spread of the logits."""
    return ((found - expected).abs().max() / expected.std()).item()


def export(path, model, layers, tokenizer):
    write_gguf(path, model.config, layers, cut(model, layers), tokenizer, name="uneven")


def tokens(count, size, seed=0):
    return torch.randint(3, size, (1, count), generator=torch.Generator().manual_seed(seed))


CASES = {
    "llama-mha": {},
    "llama-gqa": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_uneven_models(family, tied, make_model, tmp_path):
    model = make_model(family, vocab_size=320, num_hidden_layers=4, tie_word_embeddings=tied, **CASES[family])
    export(tmp_path / "model.gguf", model, uneven(model), byte_level())
    ids = tokens(100, 320)
    found, expected = logits(tmp_path / "model.gguf", ids[0].tolist()), model(ids).logits[0]
    assert error(found, expected) < 3e-5
    assert found.argmax(-1).equal(expected.argmax(-1))


@pytest.mark.parametrize("rope", ROPES)
def test_logits_with_scaled_rotary_embeddings(rope, make_model, tmp_path):
    parameters = ROPES[rope] | {"rope_theta": 5000.0}
    model = make_model("llama-gqa", vocab_size=320, rope_parameters=parameters)
    export(tmp_path / "model.gguf", model, uneven(model), byte_level())
    ids = tokens(100, 320)
    assert error(logits(tmp_path / "model.gguf", ids[0].tolist()), model(ids).logits[0]) < 3e-5


def test_logits_of_the_bundled_model(tmp_path):
    model, tokenizer = bundled()
    export(tmp_path / "model.gguf", model, uneven(model, widths=(320, 512, 256, 448)), tokenizer)
    ids = tokenizer("The value of the expression is evaluated first; if it is a function, " * 3)["input_ids"]
    expected = model(torch.tensor([ids])).logits[0]
    assert error(logits(tmp_path / "model.gguf", ids), expected) < 3e-5

    greedy = model.generate(torch.tensor([ids[:20]]), do_sample=False, max_new_tokens=24, eos_token_id=[])
    served = load(tmp_path / "model.gguf", logits_all=False)
    stream = served.generate(ids[:20], temp=0.0, top_k=1, repeat_penalty=1.0)
    assert [next(stream) for _ in range(24)] == greedy[0, 20:].tolist()
    served.close()


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(dtype, limit, tmp_path):
    model, tokenizer = bundled(dtype)
    export(tmp_path / "model.gguf", model, uneven(model), tokenizer)
    ids = tokenizer("The value of the expression is evaluated first.")["input_ids"]
    expected = model.float()(torch.tensor([ids])).logits[0]
    assert error(logits(tmp_path / "model.gguf", ids), expected) < limit


def test_without_the_rotary_layout_logits_are_others(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "interleaved", lambda rows, head_dim: rows)
    model = make_model("llama-gqa", vocab_size=320)
    export(tmp_path / "model.gguf", model, uneven(model), byte_level())
    ids = tokens(100, 320)
    assert error(logits(tmp_path / "model.gguf", ids[0].tolist()), model(ids).logits[0]) > 0.1


def test_with_the_defaults_of_llama_cpp(make_model, tmp_path):
    model = make_model("qwen2", vocab_size=320, hidden_size=256, head_dim=64)
    export(tmp_path / "model.gguf", model, uneven(model), byte_level())
    ids = tokens(100, 320)
    for flash in (False, True):
        found = logits(tmp_path / "model.gguf", ids[0].tolist(), type_k=None, type_v=None, flash_attn=flash)
        assert error(found, model(ids).logits[0]) < 0.01


@pytest.mark.parametrize("kind, limit", [("Q8_0", 0.08), ("Q4_K_M", 0.7)])
def test_quantized_files(kind, limit, make_model, tmp_path):
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 8, "intermediate_size": 768}
    model = make_model("llama-gqa", vocab_size=320, **sizes)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        matrix.div_(3)  # as wide as training starts: wider ones amplify the rounding in every layer
    export(tmp_path / "model.gguf", model, uneven(model, groups=(4, 2, 4), widths=(256, 768, 512)), byte_level())
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    source, target = tmp_path / "model.gguf", tmp_path / f"{kind}.gguf"
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(target), parameters) == 0
    assert target.stat().st_size < source.stat().st_size / 2
    ids = tokens(60, 320)
    found = logits(target, ids[0].tolist())
    assert found.isfinite().all()
    assert error(found, model(ids).logits[0]) < limit


TOKENIZERS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(digits=True, bos=True),
    "llama-bpe": lambda: byte_level(LLAMA3, ignore_merges=True, bos=True),
    "smaug-bpe": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(QWEN2, normalizer=normalizers.NFC()),
    "tekken": lambda: byte_level(TEKKEN, ignore_merges=True, bos=True),
    "default": lambda: characters(),
    "default always": lambda: characters("always"),
    "default first": lambda: characters("first"),
    "default never": lambda: characters("never"),
    "bundled": lambda: AutoTokenizer.from_pretrained(MODEL),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_text(name, make_model, tmp_path):
    tokenizer = TOKENIZERS[name]()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 5)
    assert name == "bundled" or vocabulary.pre == name.split()[0]
    check_tokens(tokenizer, TEXT, make_model, tmp_path)


def test_tokens_of_stories(shared, make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k-hf")
    (note,) = read_vocabulary(tokenizer, 512).notes
    assert "extra spaces" in note
    text = re.sub(" +", " ", TEXT).strip(" ") + " Once upon a time, there was a little girl named Lily."
    check_tokens(tokenizer, text, make_model, tmp_path)


def check_tokens(tokenizer, text, make_model, folder):
    """Compare llama.cpp's tokens of a text and of each of its words with transformers', with rows to spare."""
    model = make_model("llama-gqa", vocab_size=len(tokenizer) + 5, num_hidden_layers=1)
    export(folder / "model.gguf", model, uneven(model), tokenizer)
    served = load(folder / "model.gguf", vocab_only=True)
    parts = [text, *text.split(), "Hello<s> world</s>again [TOOL]x"]
    if any("space" in note for note in read_vocabulary(tokenizer, len(tokenizer)).notes):
        parts.pop()  # a space after a special token is among the reported differences
    for part in parts:
        found = served.tokenize(part.encode(), add_bos=True, special=True)
        assert found == tokenizer(part)["input_ids"], part
    served.close()


def bundled(dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(MODEL)
