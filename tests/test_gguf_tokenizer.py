"""How a tokenizer is written for llama.cpp, and which cannot be: read back from GGUF with the gguf package."""

import json

import pytest
from prunekit.compress.export.gguf.byte_level import GPT2, LLAMA3, QWEN2, TEKKEN
from prunekit.compress.export.gguf.sentencepiece import merge_scores
from prunekit.compress.export.gguf.tokenizer import read_vocabulary
from prunekit.registry import ModelError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

ROWS = 300


def byte_level(splits=(), template=None, normalizer=None, ignore_merges=False, **step):
    """A byte-level tokenizer of 260 tokens: all bytes, two merges, two special tokens."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"th": 256, "the": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    step = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": not splits} | step)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, step]) if splits else step
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<think>"])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 258), ("</s>", 259)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split_by(expression, **options):
    return byte_level([pre_tokenizers.Split(Regex(expression), "isolated")], **options)


def characters(normalizer=None, pre_tokenizer=None):
    """A tokenizer with byte fallback: 256 bytes, three characters, two merges."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens(["<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def written(folder, tokenizer, config=None):
    """A tokenizer's metadata as it is read back from a file."""
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "deci")
    read_vocabulary(tokenizer, ROWS).add_to(writer, config or LlamaConfig())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / "tokenizer.gguf").fields
    return {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "token" in key}


def test_tokens(tmp_path):
    tokenizer = byte_level(template="<s> $A")
    tokenizer.chat_template = "{{ messages }}"
    read = written(tmp_path, tokenizer)
    assert (read["ggml.model"], read["ggml.pre"], read["chat_template"]) == ("gpt2", "gpt-2", "{{ messages }}")
    assert (read["ggml.bos_token_id"], read["ggml.eos_token_id"]) == (258, 259)
    assert (read["ggml.add_bos_token"], read["ggml.add_eos_token"]) == (True, False)
    assert read["ggml.merges"] == ["t h", "th e"]
    assert read["ggml.tokens"][256:262] == ["th", "the", "<s>", "</s>", "<think>", "[PAD261]"]
    kinds = gguf.TokenType
    assert read["ggml.token_type"][256:261] == [*[kinds.NORMAL] * 2, *[kinds.CONTROL] * 2, kinds.USER_DEFINED]
    assert set(read["ggml.token_type"][261:]) == {kinds.UNUSED} and len(set(read["ggml.tokens"])) == ROWS


def test_unused_ids_get_texts_that_no_token_has(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["[PAD270]", "[[PAD270]]"])
    tokens = written(tmp_path, tokenizer)["ggml.tokens"]
    assert len(set(tokens)) == ROWS and tokens[270] == "[[[PAD270]]]"


def test_named_templates_and_ids_of_the_config(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    read = written(tmp_path, tokenizer, LlamaConfig(bos_token_id=7, eos_token_id=[8, 9], pad_token_id=ROWS))
    assert (read["chat_template"], read["chat_template.rag"]) == ("{{ messages }}", "{{ documents }}")
    assert read["ggml.bos_token_id"] == 7 and not {"ggml.eos_token_id", "ggml.padding_token_id"} & set(read)


@pytest.mark.parametrize("end, ends", [("$A </s>", True), ("$A", False)])
def test_whether_a_text_is_ended(end, ends):
    assert read_vocabulary(byte_level(template=end), ROWS).add_eos is ends


def test_tokens_with_byte_fallback(tmp_path):
    legacy = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    read = written(tmp_path, characters(legacy))
    assert (read["ggml.model"], read["ggml.add_space_prefix"]) == ("llama", True)
    kinds = gguf.TokenType
    assert read["ggml.token_type"][:2] == [kinds.UNKNOWN, kinds.BYTE] and read["ggml.token_type"][258] == kinds.NORMAL
    assert read["ggml.scores"][260:262] == [0, -1] and read["ggml.scores"][258] == -2
    assert "ggml.merges" not in read


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_space_before_a_text(scheme):
    splitter = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    vocabulary = read_vocabulary(characters(None, splitter), ROWS)
    assert vocabulary.space_prefix is (scheme != "never")
    assert ["puts a space before" in note for note in vocabulary.notes] == [True] * vocabulary.space_prefix


RULES = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], use_regex=True),
    "llama-bpe": lambda: split_by(LLAMA3, ignore_merges=True),
    "smaug-bpe": lambda: split_by(LLAMA3),
    "qwen2": lambda: split_by(QWEN2, normalizer=normalizers.NFC()),
    "tekken": lambda: split_by(TEKKEN, ignore_merges=True),
}
NOTES = {"qwen2": "NFC normalization", "tekken": "ASCII letters"}


@pytest.mark.parametrize("name", RULES)
def test_splitting_rules(name):
    vocabulary = read_vocabulary(RULES[name](), ROWS)
    assert vocabulary.pre == name
    assert len(vocabulary.notes) == (name in NOTES) and NOTES.get(name, "") in "".join(vocabulary.notes)


def test_gpt_2_in_full_and_removing_what_is_between():
    assert read_vocabulary(split_by(GPT2), ROWS).pre == "gpt-2"
    split = pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True)
    assert read_vocabulary(byte_level([split], ignore_merges=True), ROWS).pre == "llama-bpe"


def test_removed_spaces_are_told():
    steps = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Prepend("\u2581")]
    steps.append(normalizers.Replace(" ", "\u2581"))
    (note,) = read_vocabulary(characters(normalizers.Sequence(steps)), ROWS).notes
    assert "does not remove extra spaces" in note


def test_scores_follow_the_last_merge_of_each_token():
    byte_tokens = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = byte_tokens | {token: 256 + i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    scores, notes = merge_scores(vocabulary, [("a", "b"), ("b", "c"), ("ab", "c")])
    assert (scores["ab"], scores["bc"], scores["abc"], notes) == (0, -1, -2, [])
    # Without ("ab", "c") the tokenizer never makes abc; llama.cpp would, since it is a token.
    _, notes = merge_scores(vocabulary, [("a", "b"), ("b", "c")])
    assert len(notes) == 1 and "1 of 262 tokens" in notes[0] and "'abc'" in notes[0]
    with pytest.raises(ModelError, match="no token <0x0A>"):
        merge_scores({token: i for token, i in vocabulary.items() if token != "<0x0A>"}, [])


def changed(**model):
    """The byte-level tokenizer with other values in tokenizer.json."""
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def unsplit():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


REFUSED = {
    "add_prefix_space': True.*known to be built into": lambda: byte_level(add_prefix_space=True),
    "ignore_merges True": lambda: byte_level(ignore_merges=True),
    "normalizer Lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "Whitespace.*gpt-2, smollm, llama-bpe": unsplit,
    "BPE model of a kind that": lambda: changed(end_of_word_suffix="</w>"),
    r"only its bos token \('<s>'\) before": lambda: byte_level(template="$A <s>"),
    "object is not a fast tokenizer": object,
    "NFKC.*is none that llama.cpp applies": lambda: characters(normalizers.NFKC()),
    "'split': True.*is none that llama.cpp applies": lambda: characters(None, pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_tokenizers_that_cannot_be_written(message):
    with pytest.raises(ModelError, match=f"(?s)profile gguf: .*{message}.*"):
        read_vocabulary(REFUSED[message](), ROWS)


def test_more_tokens_than_rows():
    with pytest.raises(ModelError, match="261 tokens, but the embedding has 260 rows"):
        read_vocabulary(byte_level(), 260)
