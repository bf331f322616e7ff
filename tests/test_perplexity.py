"""The perplexity evaluator against sums written out by hand, and its protocol."""

import json
import math

import pytest
import torch
from prunekit.evaluators import perplexity as module
from prunekit.evaluators.perplexity import Perplexity, summed_losses
from prunekit.registry import Catalog, DataError, NonFiniteError, PlainSubject, SpecError, TextSource
from pydantic import ValidationError

TEXT = TextSource(bundled="reference-evaluation")


class Codes:
    """A tokenizer of characters: 'a' is id 3."""

    bos_token_id = 1

    def __call__(self, text, **kwargs):
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [3 + (ord(character) - ord("a")) % 90 for character in text]}


@pytest.fixture
def model(make_model):
    return make_model("llama-gqa")


@pytest.fixture
def subject(model):
    """A model and 70 characters of text in two documents; ``subject.batches`` records what the model was shown."""
    generator = torch.Generator().manual_seed(5)
    letters = "".join(chr(97 + int(i)) for i in torch.randint(26, (69,), generator=generator))
    found = PlainSubject(model, Codes(), [letters[:30], letters[30:]])
    found.batches = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: found.batches.append((kwargs["input_ids"], kwargs["use_cache"])), with_kwargs=True
    )
    found.ids = torch.tensor(Codes()(letters[:30] + "z" + letters[30:], add_special_tokens=False)["input_ids"])
    return found


def losses(model, ids):
    """Next-token losses of one sequence (T,) on its own, float64; (T - 1,)."""
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    return -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def with_bos(ids):
    return torch.cat([torch.tensor([1]), ids])


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "perplexity") is Perplexity


def test_value_is_token_weighted_over_windows_and_the_tail(subject):
    ids = with_bos(subject.ids)  # 71 tokens: windows of 16, 16, 16, 16 and 7
    expected = torch.cat([losses(subject.model, piece) for piece in ids.split(16)])
    subject.batches.clear()
    found = Perplexity(text=TEXT, window=16, batch_size=3, separator="z").evaluate(subject)
    assert found.protocol["tokens"] == len(expected) == 4 * 15 + 6
    assert set(found.values) == {"perplexity", "loss"}
    assert found.values["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(float(expected.mean())), rel=1e-4)
    assert [tuple(batch.shape) for batch, _ in subject.batches] == [(3, 16), (1, 16), (1, 7)]
    assert torch.cat([batch.reshape(-1) for batch, _ in subject.batches]).equal(ids)  # text order
    assert not any(use_cache for _, use_cache in subject.batches)


def test_dropping_the_tail_and_limiting_windows(subject):
    ids = with_bos(subject.ids)
    dropped = Perplexity(text=TEXT, window=16, tail="drop", separator="z").evaluate(subject)
    expected = torch.cat([losses(subject.model, piece) for piece in ids[:64].split(16)])
    assert dropped.protocol["tokens"] == 60
    assert dropped.values["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    limited = Perplexity(text=TEXT, window=16, limit=2, separator="z").evaluate(subject)
    assert limited.values["loss"] == pytest.approx(float(expected[:30].mean()), rel=1e-5)
    assert (limited.protocol["windows"], limited.protocol["limit"]) == (2, 2)


@pytest.mark.parametrize("bos", ["none", "first", "every"])
def test_bos_policies(subject, bos):
    if bos == "every":
        pieces = [with_bos(piece) for piece in subject.ids.split(15)]
    else:
        pieces = (with_bos(subject.ids) if bos == "first" else subject.ids).split(16)
    expected = torch.cat([losses(subject.model, piece) for piece in pieces])
    found = Perplexity(text=TEXT, window=16, bos=bos, separator="z").evaluate(subject)
    assert found.protocol["tokens"] == len(expected)
    assert found.values["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.protocol["bos"] == bos and not found.notes
    if bos == "every":
        assert found.protocol["tokens"] == len(subject.ids) and found.protocol["stride"] == 15


def test_overlapping_windows_score_new_tokens_only(subject):
    found = Perplexity(text=TEXT, window=16, stride=5, bos="none", separator="z", batch_size=4).evaluate(subject)
    ids, expected, seen = subject.ids, [], 0
    for start in range(0, len(ids), 5):
        stop = min(start + 16, len(ids))
        piece = losses(subject.model, ids[start:stop])
        expected.append(piece[max(seen - start - 1, 0) :])
        seen = stop
        if stop == len(ids):
            break
    expected = torch.cat(expected)
    assert found.protocol["tokens"] == len(expected) == len(ids) - 1
    assert found.values["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_losses_are_summed_in_slices(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 50, generator=generator) * 5
    ids = torch.randint(50, (3, 9), generator=generator)
    whole = summed_losses(logits, ids, [8, 3, 1])
    nll = -logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert whole == pytest.approx([float(nll[0].sum()), float(nll[1, -3:].sum()), float(nll[2, -1:].sum())], rel=1e-6)
    monkeypatch.setattr(module, "SLICE", 120)  # two positions at a time
    assert summed_losses(logits, ids, [8, 3, 1]) == pytest.approx(whole, rel=1e-6)
    half = logits.bfloat16()
    assert summed_losses(half, ids, [8, 3, 1]) == pytest.approx(summed_losses(half.float(), ids, [8, 3, 1]), rel=1e-12)
    # With one id more than logits the last logits predict it.
    assert summed_losses(logits[:, :-1], ids, [8, 3, 1]) == pytest.approx(whole, rel=1e-6)


def test_losses_of_every_window_are_told(subject):
    found = Perplexity(text=TEXT, window=16, stride=5, bos="none", separator="z", batch_size=4).evaluate(subject)
    tokens, sums = found.details["window_tokens"], found.details["window_losses"]
    assert len(tokens) == len(sums) == found.protocol["windows"] and sum(tokens) == found.protocol["tokens"]
    for index, (count, total) in enumerate(zip(tokens, sums, strict=True)):
        piece = losses(subject.model, subject.ids[5 * index : 5 * index + 16])
        assert total == pytest.approx(float(piece[-count:].sum()), rel=1e-5)
    assert tokens[0] == 15 and set(tokens[1:]) == {5, 4}  # the last has what is left
    assert found.values["loss"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-12)
    assert json.loads(json.dumps(found.details)) == found.details


def test_the_protocol_states_what_the_value_depends_on(subject):
    protocol = Perplexity(text=TEXT, window=16, batch_size=3, separator="z").evaluate(subject).protocol
    digest = protocol.pop("ids_sha256")
    assert protocol == {
        "text": "bundled reference-evaluation",
        "convention": "tokens",
        "revision": None,
        "documents": "all",
        "separator": "z",
        "window": 16,
        "stride": 16,
        "bos": "first",
        "tail": "keep",
        "limit": None,
        "windows": 5,
        "tokens": 66,
        "batch_size": 3,
        "order": "text order",
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
    }
    other = Perplexity(text=TEXT, window=16, batch_size=2, separator="z").evaluate(subject)
    assert other.protocol["ids_sha256"] == digest
    assert Perplexity(text=TEXT, window=16, separator="y").evaluate(subject).protocol["ids_sha256"] != digest


def test_progress_is_told_of_every_batch(subject):
    seen = []
    subject.progress = lambda items, label, total: seen.append((label, total)) or items
    Perplexity(text=TEXT, window=16, batch_size=3, separator="z").evaluate(subject)
    assert seen == [("perplexity", 3)]


def test_a_tokenizer_without_bos_is_noted(subject):
    subject.tokenizer.bos_token_id = None
    found = Perplexity(text=TEXT, window=16, bos="every").evaluate(subject)
    assert found.protocol["bos"] == "none" and "no BOS" in found.notes[0]


def test_windows_beyond_the_context_are_refused_and_null_means_the_context(subject):
    with pytest.raises(SpecError, match=r"512 tokens are more than the model's context of 256"):
        Perplexity(text=TEXT).evaluate(subject)
    assert Perplexity(text=TEXT, window=None).evaluate(subject).protocol["window"] == 256


def test_a_stride_that_skips_text_is_refused(subject):
    with pytest.raises(ValidationError, match="a stride of 17 would skip text between windows of 16"):
        Perplexity(text=TEXT, window=16, stride=17)
    with pytest.raises(ValidationError, match="a stride of 16 would skip text between windows of 15"):
        Perplexity(text=TEXT, window=16, stride=16, bos="every")
    with pytest.raises(SpecError, match="a stride of 300 would skip"):
        Perplexity(text=TEXT, window=None, stride=300).evaluate(subject)


def test_text_that_cannot_be_measured_is_named(subject):
    subject.read = lambda source: ["a"]
    with pytest.raises(DataError, match="bundled reference-evaluation has 1 tokens"):
        Perplexity(text=TEXT, window=16).evaluate(subject)
    subject.read = lambda source: ["abc"]
    with pytest.raises(DataError, match=r"less than one window of 16, and the tail is dropped"):
        Perplexity(text=TEXT, window=16, tail="drop").evaluate(subject)
    subject.tokenizer = lambda text, **_: {"input_ids": [3, 97]}
    subject.tokenizer.bos_token_id = None
    with pytest.raises(DataError, match=r"token id 97, but the model embeds 97 ids only \(0 to 96\)"):
        Perplexity(text=TEXT, window=16, bos="none").evaluate(subject)


def test_losses_that_are_not_finite_stop_the_measurement(subject):
    with torch.no_grad():
        subject.model.get_input_embeddings().weight[subject.ids[40]] = float("nan")
    with pytest.raises(NonFiniteError, match=r"reference-evaluation: the loss of window 2 is nan in float32"):
        Perplexity(text=TEXT, window=16, batch_size=1).evaluate(subject)


def test_a_loss_too_large_for_a_perplexity_is_noted(subject):
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.mul_(1e5)
    found = Perplexity(text=TEXT, window=16).evaluate(subject)
    assert found.values["perplexity"] is None and found.values["loss"] > 700 and "too many" in found.notes[0]


def test_dtype_of_half_precision_models_is_stated(subject):
    subject.model.to(torch.bfloat16)
    found = Perplexity(text=TEXT, window=16).evaluate(subject)
    assert found.protocol["dtype"] == "bfloat16" and math.isfinite(found.values["perplexity"])


@pytest.mark.slow
def test_a_trained_model_gets_the_loss_that_transformers_computes(shared):
    folder = shared / "models" / "stories260k-hf"
    text = shared / "corpus" / "tinystories-valid-excerpt.txt"
    if not folder.is_dir() or not text.is_file():
        pytest.skip("needs the shared model and text")
    from prunekit.compress.models.loading import load
    from prunekit.compress.models.source import ModelSource
    from prunekit.compress.runs.documents import read_documents

    loaded = load(ModelSource(name=str(folder), device="cpu"))
    subject = PlainSubject(loaded.model, loaded.tokenizer)
    subject.read = read_documents
    found = Perplexity(text=TextSource(file=text), window=512, batch_size=4, limit=10).evaluate(subject)

    # The tokenizer's own way of beginning a text, and the loss that the model itself returns.
    ids = loaded.tokenizer(text.read_text(encoding="utf-8"), verbose=False, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        own = [loaded.model(input_ids=piece[None], labels=piece[None]).loss for piece in ids.split(512)[:10]]
    assert found.values["loss"] == pytest.approx(float(torch.stack(own).mean()), rel=1e-5)
    assert found.values["perplexity"] < 6  # it has learnt this kind of text; 512 would be guessing


@pytest.mark.parametrize("mixed", [False, True])
def test_windows_of_several_texts_share_batches_or_do_not(subject, mixed):
    """The same windows either way, and their losses; only the batches differ."""
    texts = {"a": "qwertyuiopasdfghjklzxcvbnm" * 4, "b": "mqnwbevrctxyzulikojphgafsd" * 3}
    sources = tuple(TextSource(bundled="text", field=name, limit=n) for n, name in enumerate(texts, 1))
    subject.read = lambda source: [texts[source.field]]
    options = dict(window=16, bos="none", batch_size=4)
    alone = [Perplexity(text=source, tail="drop", **options).evaluate(subject) for source in sources]
    first, second = (found.details["window_losses"] for found in alone)
    assert (len(first), len(second)) == (6, 4)
    del subject.batches[:]
    found = Perplexity(mixture=sources, mixed=mixed, limit=12, **options).evaluate(subject)
    pairs = zip(first[:4], second, strict=True)
    order = [loss for pair in pairs for loss in pair] if mixed else [*first[:4], *second]
    assert found.details["window_losses"] == pytest.approx(order, rel=1e-4)
    assert [len(ids) for ids, _ in subject.batches] == [4, 4] and found.protocol["tail"] == "drop"
    assert (found.protocol["documents"], found.protocol["revision"]) == ([1, 2], [None, None])
    assert not {"mixture", "mixed"} & {*Perplexity().model_dump()}
    with pytest.raises(ValidationError, match="reads the pages of one text"):
        Perplexity(mixture=sources, convention="wikitext_words")
