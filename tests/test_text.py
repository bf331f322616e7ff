"""Text sources, the token stream, and calibration batches."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from prunekit.compress.files.spec import Calibration
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.documents import read_documents
from prunekit.compress.runs.pipeline import calibration_of
from prunekit.compress.runs.text import calibration_batches, fingerprint
from prunekit.registry import DataError, TextSource
from prunekit.registry.tensors.tokens import check_token_ids, context_of
from prunekit.registry.tensors.windows import cut_windows, digest, token_stream, with_bos
from transformers import PretrainedConfig

WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture
def tokenizer():
    """One token a word; ids 0 and 1 are the unknown word and BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def words(count):
    return " ".join(WORDS[i % len(WORDS)] for i in range(count))


def test_txt_is_one_document_and_jsonl_one_per_line(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo", encoding="utf-8-sig")
    assert read_documents(TextSource(file=text)) == ["one\n\ntwo"]

    lines = tmp_path / "a.jsonl"
    lines.write_text(
        json.dumps({"body": "first\u2028still first"}, ensure_ascii=False) + "\n\n" + json.dumps({"body": "second"}),
        encoding="utf-8",
    )
    assert read_documents(TextSource(file=lines, field="body")) == ["first\u2028still first", "second"]
    assert read_documents(TextSource(file=lines, field="body", limit=1)) == ["first\u2028still first"]


def test_bundled_text_is_read_by_name(tmp_path, monkeypatch):
    bundled = tmp_path / "kind.txt"
    bundled.write_text("text of a kind")
    monkeypatch.setattr("prunekit.compress.runs.documents.TEXTS", {"kind-evaluation": bundled})
    assert read_documents(TextSource(bundled="kind-evaluation")) == ["text of a kind"]
    with pytest.raises(DataError, match=r"no bundled text is called 'kind-evaluatoin' \(did you mean 'kind-"):
        read_documents(TextSource(bundled="kind-evaluatoin"))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, r"missing\.txt does not exist"),
        ("a.doc", b"text", r"a\.doc: files of this ending are not read \(\.txt, .*save_to_disk are\)"),
        ("a.jsonl.zst", b"text", r"a\.jsonl\.zst: files of this ending are not read .*unpack it"),
        ("a.csv", b"text\nx\na,b,c\n", r"a\.csv, after row .*ParserError"),
        ("e.csv", b"", r"e\.csv, after row 0.*column names"),
        ("b.csv", b"body\nx\n", r"b\.csv, row 1 has no field 'text'; set field to one of: body"),
        ("a.parquet", b"PAR1", r"a\.parquet is not Parquet, or is damaged"),
        ("a.json.gz", b"text", r"a\.json\.gz cannot be read: .*whole"),
        ("empty.txt", b"", r"empty\.txt holds no text"),
        ("blank.txt", b" \n\n", r"blank\.txt holds no text"),
        ("empty.jsonl", b"", r"empty\.jsonl holds no text"),
        ("latin.txt", "caf\xe9s".encode("latin-1"), r"latin\.txt is not UTF-8 \(byte 0xe9 at 3: .*iconv"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', r"a\.jsonl, line 2 has no field 'text' \(did you mean 'txt'"),
        ("b.jsonl", b'{"text": "x"}\n\n{"text": 3}', r"b\.jsonl, line 3: field 'text' holds int, not text"),
        ("n.jsonl", b'{"text": null}', r"n\.jsonl, line 1: field 'text' is null.*skip_null: true"),
        (
            "s.jsonl",
            b'{"text": "broken \\ud83d emoji"}',
            r"line 1 cannot be read as JSON .*half of a surrogate pair",
        ),
        ("m.jsonl", b'{"text": [{"role": "user"}]}', r"holds list, not text; set apply_chat_template: true"),
        ("h.jsonl", b"[" * 100_000, r"h\.jsonl, line 1 cannot be read as JSON"),
        ("c.jsonl", b'{"text": "x"}\n{"text"', r"c\.jsonl, line 2 cannot be read as JSON"),
        ("d.jsonl", b"[1]", r"d\.jsonl, line 1 is not a JSON object"),
    ],
)
def test_a_bad_file_is_named_with_its_place(tmp_path, name, content, complaint):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_documents(TextSource(file=path))


def test_a_folder_is_no_text_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_documents(TextSource(file=tmp_path))


ROWS = [{"text": "one", "more": "1"}, {"text": 'two, "quoted"\nline', "more": "2"}]


def write_rows(path):
    """The two rows in the format of the path's ending."""
    import datasets
    import pandas

    frame = pandas.DataFrame(ROWS)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif ".csv" in path.name or ".tsv" in path.name:
        frame.to_csv(path, index=False, sep="," if ".csv" in path.name else "\t")
    elif ".json" in path.name:
        frame.to_json(path, orient="records", lines=True)
    elif path.name == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.jsonl.gz", "a.json.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "saved", "splits"],
)
def test_rows_of_every_format_are_the_same(tmp_path, name):
    write_rows(tmp_path / name)
    found = read_documents(TextSource(file=tmp_path / name))
    assert found == [row["text"] for row in ROWS]
    both = read_documents(TextSource(file=tmp_path / name, field=["more", "text"], limit=1))
    assert both == ["1\none"]
    if name == "splits":
        with pytest.raises(DataError, match="no split 'test'; set split to one of: train"):
            read_documents(TextSource(file=tmp_path / name, split="test"))


def test_rows_without_text_are_left_out_only_where_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert read_documents(TextSource(file=path, skip_null=True, limit=2)) == ["one", "two"]
    with pytest.raises(DataError, match="line 2"):
        read_documents(TextSource(file=path))


def test_chats_become_text_by_the_tokenizers_template(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    path.write_text(json.dumps({"messages": chat, "other": "x"}))
    source = TextSource(file=path, apply_chat_template=True)
    with pytest.raises(DataError, match="this model's tokenizer has none"):
        read_documents(source, tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% if m.role == 'tool' %}"
        "{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    assert read_documents(source, tokenizer) == ["<s> user w1 assistant w2"]
    assert source.label == "a.jsonl by chat template"
    assert with_bos(token_stream(["<s> w1"], tokenizer), tokenizer).tolist() == [1, 3]  # one BOS, not two
    with pytest.raises(DataError, match="field 'other' holds str, not the messages of a chat"):
        read_documents(source.model_copy(update={"field": "other"}), tokenizer)
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "w1"}]}))
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template refuses .*no tools"):
        read_documents(source, tokenizer)


def test_files_of_a_dataset_can_be_named(dataset):
    source = TextSource(dataset=dataset, data_files="train.jsonl", limit=2)
    assert read_documents(source) == ["row 0", "row 1"] and "train.jsonl" in source.label
    with pytest.raises(DataError, match=r"other\.jsonl"):
        read_documents(TextSource(dataset=dataset, data_files=["other.jsonl"]))
    with pytest.raises(ValueError, match="data_files are files of a hub dataset"):
        TextSource(bundled="reference-calibration", data_files="a")


def test_new_options_of_a_text_are_not_written_at_their_defaults():
    """The keys of stored trials are made of what is written."""
    source = TextSource(bundled="reference-calibration")
    assert not source.model_dump().keys() & {"data_files", "apply_chat_template", "skip_null"}
    assert "mixture" not in Calibration(bundled="reference-calibration").model_dump()
    changed = source.model_copy(update={"skip_null": True})
    assert TextSource(**changed.model_dump()) == changed


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is not a regular file"):
        read_documents(TextSource(file=tmp_path / "a.txt"))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of five rows that ``datasets`` loads from a folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}", "n": i}) for i in range(5)))
    return str(folder)


@pytest.mark.parametrize("limit", [None, 2])
def test_a_dataset_gives_one_document_per_row_and_is_streamed_with_a_limit(dataset, monkeypatch, limit):
    import datasets

    streaming = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: streaming.append(k["streaming"]) or real(*a, **k))
    assert read_documents(TextSource(dataset=dataset, limit=limit)) == [f"row {i}" for i in range(limit or 5)]
    assert streaming == [limit is not None]


def test_a_dataset_without_the_field_or_the_split_is_refused(dataset):
    with pytest.raises(DataError, match=r"row 0 has no field 'content'; set field to one of: n, text"):
        read_documents(TextSource(dataset=dataset, field="content"))
    with pytest.raises(DataError, match=r"row 0: field 'n' holds int"):
        read_documents(TextSource(dataset=dataset, field="n"))
    with pytest.raises(DataError, match="split nowhere cannot be read"):
        read_documents(TextSource(dataset=dataset, split="nowhere"))


@pytest.mark.parametrize("limit", [None, 3])
def test_a_hub_dataset_out_of_reach_says_why(limit):
    source = TextSource(dataset="prunekit-tests/absent", subset="raw", split="test", limit=limit)
    with pytest.raises(DataError, match=r"prunekit-tests/absent \(raw\), split test cannot be read.*switched off"):
        read_documents(source)


def test_documents_are_joined_before_they_are_tokenised(tokenizer):
    ids = token_stream(["w0 w1", "w2"], tokenizer, separator=" w9 ")
    assert ids.tolist() == [2, 3, 11, 4]
    assert token_stream(["w0", "w1"], tokenizer, separator="").tolist() == [0]  # "w0w1" is not a word
    assert with_bos(ids, tokenizer).tolist() == [1, 2, 3, 11, 4]
    tokenizer.bos_token = None
    assert with_bos(ids, tokenizer) is ids


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"half of a surrogate pair, .* in ' +w1 \\ud83d w2'"):
        token_stream(["w0", "w1 \ud83d w2"], tokenizer, separator=" " * 30)


def scored_positions(ids, *args, **kwargs):
    """Every window's ids and which of them count."""
    return [(w.ids.tolist(), w.ids[len(w.ids) - w.scored :].tolist()) for w in cut_windows(ids, *args, **kwargs)]


def test_windows_without_overlap_score_all_but_their_first_token():
    ids = torch.arange(10)
    assert scored_positions(ids, 4) == [([0, 1, 2, 3], [1, 2, 3]), ([4, 5, 6, 7], [5, 6, 7]), ([8, 9], [9])]
    assert scored_positions(ids, 4, tail="drop") == [([0, 1, 2, 3], [1, 2, 3]), ([4, 5, 6, 7], [5, 6, 7])]
    assert scored_positions(ids[:9], 4)[-1] == ([4, 5, 6, 7], [5, 6, 7])  # a lone token has nothing to be scored by
    assert scored_positions(ids, 20) == [(list(range(10)), list(range(1, 10)))]
    assert scored_positions(ids, 20, tail="drop") == []


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [5, 6, 13])
def test_overlapping_windows_score_every_token_once(stride, count):
    found = scored_positions(torch.arange(count), 5, stride)
    assert [token for _, scored in found for token in scored] == list(range(1, count))
    assert all(len(ids) == 5 for ids, _ in found[:-1])


def test_a_prefix_takes_a_place_and_lets_every_token_count():
    assert scored_positions(torch.arange(7), 4, prefix=99) == [
        ([99, 0, 1, 2], [0, 1, 2]),
        ([99, 3, 4, 5], [3, 4, 5]),
        ([99, 6], [6]),
    ]


def test_ids_without_an_embedding_are_refused():
    check_token_ids(torch.tensor([[0, 4]]), 5, "batch 0")
    check_token_ids(torch.tensor([], dtype=torch.long), 5, "batch 0")
    for bad in (-1, 5):
        with pytest.raises(DataError, match=rf"batch 0 contains token id {bad}, .* embeds 5 ids only \(0 to 4\)"):
            check_token_ids(torch.tensor([[0, bad]]), 5, "batch 0")


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 64),
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, 64),
    ],
)
def test_the_context_counts_scaled_rotary_embeddings(rope, context):
    from transformers import LlamaConfig

    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope and rope["rope_type"] == "llama3" else {}
    options = {"rope_parameters": {"rope_theta": 1e4, **rope, **llama3}} if rope else {}
    config = LlamaConfig(max_position_embeddings=64, hidden_size=64, num_attention_heads=4, **options)
    assert context_of(config) == context


def test_digest_depends_on_ids_shape_and_order():
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])
    assert digest([a, b]) == digest([a.to(torch.int32), b.clone()])
    assert len({digest([a, b]), digest([b, a]), digest([a]), digest([a.view(1, 4), b]), digest([a + 1, b])}) == 5


def test_calibration_draws_without_replacement_in_seeded_order(tokenizer):
    documents = [words(100), words(63)]
    stream = with_bos(token_stream(documents, tokenizer), tokenizer)
    pieces = {tuple(piece.tolist()) for piece in stream[: len(stream) // 8 * 8].view(-1, 8)}

    batches = calibration_batches(tokenizer, documents, sequences=10, length=8, batch_size=4, seed=3)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 8), (4, 8), (2, 8)]
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)
    drawn = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert len(set(drawn)) == 10 and set(drawn) <= pieces

    again = calibration_batches(tokenizer, documents, sequences=10, length=8, batch_size=4, seed=3)
    other = calibration_batches(tokenizer, documents, sequences=10, length=8, batch_size=4, seed=4)
    assert fingerprint(again) == fingerprint(batches) != fingerprint(other)

    everything = calibration_batches(tokenizer, documents, sequences=20, length=8, batch_size=20, seed=0)
    assert {tuple(row.tolist()) for row in everything[0]["input_ids"]} == pieces


def test_every_text_of_a_mixture_gives_its_share(tokenizer, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(words(400))
    second.write_text(words(300)[::-1])
    calibration = Calibration(
        mixture=(TextSource(file=first), TextSource(file=second)), sequences=5, length=8, batch_size=4
    )
    batches, facts = calibration_of(calibration, Loaded(SimpleNamespace(config=PretrainedConfig()), tokenizer, {}))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 1] and facts.text == "first.txt + second.txt"
    rows = torch.cat([batch["input_ids"] for batch in batches])
    for text, count, part in ((first, 3, rows[:3]), (second, 2, rows[3:])):
        alone = calibration_batches(tokenizer, [text.read_text()], sequences=count, length=8)
        assert torch.equal(alone[0]["input_ids"], part)


def test_too_little_text_in_a_mixture_says_how_much_there_is(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    source = TextSource(file=tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text(words(900))
    wanted = Calibration(mixture=(source, TextSource(file=tmp_path / "b.txt")), sequences=40, length=8)
    with pytest.raises(DataError, match=r"a.txt gives 1\d seq.* asks for 20 of it, one of 2 texts; .* to 2\d or less"):
        calibration_of(wanted, Loaded(SimpleNamespace(config=PretrainedConfig()), tokenizer, {}))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mixture": ()}, "name at least one"),
        (
            {"mixture": ({"bundled": "a"},), "bundled": "b"},
            "one of bundled, file, dataset, generated or mixture .found bundled and",
        ),
        ({"mixture": ({"bundled": "a"}, {"bundled": "b"}), "sequences": 1}, "cannot be shared by the 2 texts"),
        ({"mixture": ({"bundled": "a", "file": "b"},)}, "name one of bundled, file, dataset or generated"),
        ({"mixture": ({"bundled": "a"}, {"file": "b"}, {"bundled": "a"})}, "bundled a is named twice"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Calibration(**options)


def test_too_little_calibration_text_says_how_much_there_is(tokenizer):
    with pytest.raises(DataError, match=r"my text gives 2 sequences of 8 tokens \(21 tokens in all\).*asks for 3"):
        calibration_batches(tokenizer, [words(20)], sequences=3, length=8, batch_size=1, seed=0, label="my text")
    with pytest.raises(DataError, match=r"has 21 tokens, less than one sequence of 64"):
        calibration_batches(tokenizer, [words(20)], sequences=1, length=64, batch_size=1, seed=0)
