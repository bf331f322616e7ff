"""The continuation evaluator: reference perplexity through the cache, greedy agreement, repetition, and its prompts."""

import copy
import json
import math

import pytest
import torch
from prunekit.compress import Pipeline, prune
from prunekit.evaluators.continuation import Case, Continuation, continued, repetition, same
from prunekit.registry import Catalog, DataError, NonFiniteError, PlainSubject, SpecError, TextSource
from prunekit.registry.checks import check_evaluation
from transformers import GPT2Config, GPT2LMHeadModel

from tests.test_generation import greedy, zeroed_copy

DOCUMENT = " ".join(f"w{number * 7 % 94}" for number in range(400))
SMALL = dict(prompt_length=6, length=5, prompts=4)


class Both(PlainSubject):
    """A subject whose texts are distinguished by their field, and whose model is pruned."""

    def __init__(self, model, tokenizer, texts, pruned=None):
        super().__init__(model, tokenizer)
        self.texts = texts
        if pruned is not None:
            self.dense, self.reset, self.sites = pruned.dense, pruned.reset, pruned.all_sites

    def read(self, source):
        return self.texts[source.field]

    def measure(self, evaluator):
        return evaluator.evaluate(self)


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def model(make_model):
    found = make_model("llama-gqa")
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture
def subject(model, tokenizer):
    return PlainSubject(model, tokenizer, [DOCUMENT])


@torch.no_grad()
def losses_of(model, prompt, reference):
    """Summed loss of a reference after its prompt, in one pass without a cache."""
    ids = torch.tensor([[*prompt, *reference]])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return -logits.log_softmax(-1)[range(len(reference)), reference].sum().item()


def test_it_is_offered_and_keeps_the_rules(subject):
    assert Catalog.discover(block="").get("evaluators", "continuation") is Continuation
    check_evaluation(Continuation(**SMALL), subject)
    assert Continuation(prompt_length=100).longest_row(64) == 64


def test_the_loss_is_that_of_one_pass_without_a_cache(model, subject):
    found = Continuation(**SMALL, batch_size=3).evaluate(subject)
    stream = [3 + number * 7 % 94 for number in range(400)]
    starts = [98, 196, 294, 392]  # of 395 tokens, in four
    expected = [losses_of(model, [1, *stream[s - 5 : s]], stream[s : s + 5]) for s in starts]
    assert found.details["window_losses"] == pytest.approx(expected, rel=1e-5)
    assert found.values["loss"] == pytest.approx(sum(expected) / 20, rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(sum(expected) / 20), rel=1e-5)
    assert "agreement" not in found.values and not any(name.startswith("dense_") for name in found.values)


def test_references_do_not_depend_on_the_length_of_prompts(subject, model):
    batches = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: batches.append(kw["input_ids"].tolist()), with_kwargs=True)
    for length in (6, 40):
        Continuation(**{**SMALL, "prompt_length": length}).evaluate(subject)
    hook.remove()
    short, long = ([ids[0] for ids in batches[first : first + 36] if len(ids[0]) > 1] for first in (0, 36))
    assert [row[0] for row in short + long] == [1] * 8
    assert [row[-5:] for row in short] == [row[-5:] for row in long]
    steps = [[ids[0] for ids in batches[first : first + 5] if len(ids[0]) == 1] for first in (0, 36)]
    assert steps[0] == steps[1] != []


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt2"])
def test_padding_changes_nothing(make_model, family):
    if family == "gpt2":  # learned positions, which no mask tells
        sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    else:
        model = make_model(family)
    model.generation_config.eos_token_id = None
    cases = [Case([5, 9, 30, 7, 11], [8, 2, 40]), Case([3], [17, 60]), Case([90, 4, 4], [33])]
    together = continued(model, cases, 6, 0)
    for case, found in zip(cases, together, strict=True):
        (alone,) = continued(model, [case], 6, 0)
        assert found.loss == pytest.approx(alone.loss, rel=1e-4) and found.greedy == alone.greedy
        assert found.loss == pytest.approx(losses_of(model, case.prompt, case.reference), rel=1e-4)
        assert alone.greedy == greedy(model, torch.tensor([case.prompt]))[0, len(case.prompt) :][:6].tolist()


def test_what_was_decided_from_the_prompt_holds_for_both(model, tokenizer, batches):
    """Loss and greedy tokens are those of the model without the units that each prompt dropped."""
    clean = copy.deepcopy(model)
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 0.1}, trace=True) as pruned:
        subject = Both(model, tokenizer, {"text": [DOCUMENT]}, pruned)
        found = Continuation(**SMALL).evaluate(subject)
        decisions = [pruned.trace[first : first + 6] for first in range(0, len(pruned.trace), 6)]
        again = Continuation(**{**SMALL, "prompts": 4}).evaluate(subject)
    assert len(decisions) == 4 and again.values == found.values
    assert decisions[0][0]["kept"] != decisions[1][0]["kept"] or decisions[0][1]["kept"] != decisions[1][1]["kept"]
    stream, agreement = [3 + number * 7 % 94 for number in range(400)], []
    for number, start in enumerate((98, 196, 294, 392)):
        prompt, reference = [1, *stream[start - 5 : start]], stream[start : start + 5]
        oracle = zeroed_copy(clean, pruned_sites(pruned, clean), decisions[number])
        assert found.details["window_losses"][number] == pytest.approx(losses_of(oracle, prompt, reference), rel=1e-4)
        rows = [greedy(m, torch.tensor([prompt]))[0, 6:11].tolist() for m in (oracle, clean)]
        assert found.details["texts"][number] == tokenizer.decode(rows[0])
        assert found.details["dense_texts"][number] == tokenizer.decode(rows[1])
        agreement.append(sum(a == b for a, b in zip(*rows, strict=True)) / 5)
        assert abs(losses_of(clean, prompt, reference) - found.details["window_losses"][number]) > 0.01
    assert found.details["agreement"] == agreement and found.values["agreement"] == pytest.approx(sum(agreement) / 4)
    assert found.values["agreement"] < 1 and found.values["dense_loss"] != found.values["loss"]


def pruned_sites(pruned, model):
    """What zeroed_copy reads of a handle, after the pruning was undone."""
    found = prune(copy.deepcopy(model), "magnitude", ratio=0.4)
    try:
        return type("Sites", (), {"sites": found.sites})
    finally:
        found.remove()


def test_agreement_and_repetition():
    assert same([1, 2, 3], [1, 2, 4, 5]) == [True, True, False, False]
    assert repetition([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21
    assert repetition([1, 2, 3], 2) == 0 and repetition([1], 2) is None


def test_greedy_tokens_end_with_the_eos(model, tokenizer):
    (whole,) = continued(model, [Case([5, 9], [8])], 8, 0)
    model.generation_config.eos_token_id = whole.greedy[2]
    (cut,) = continued(model, [Case([5, 9], [8])], 8, 0)
    assert cut.greedy == whole.greedy[: whole.greedy.index(whole.greedy[2]) + 1]
    assert cut.loss == whole.loss


ANSWERED = {"prompt": ["w1 w2 w3", "w9", "w4 w4"], "answer": ["w5 w6", "w7 w8 w9 w10 w11 w12 w13", "w2"]}
PAIRS = dict(text=TextSource(file="x.jsonl", field="prompt"), answers=TextSource(file="x.jsonl", field="answer"))


def test_whole_prompts_with_their_answers(model, tokenizer):
    subject = Both(model, tokenizer, ANSWERED)
    evaluator = Continuation(**PAIRS, prompt_length=8, length=4, batch_size=3)
    found = evaluator.evaluate(subject)
    assert evaluator.plan(subject) == "3 prompts of up to 8 tokens, up to 4 tokens after each"
    assert found.details["window_tokens"] == [2, 4, 1] and found.protocol["padding"].startswith("left")
    expected = [
        losses_of(model, *pair) for pair in [([1, 4, 5, 6], [8, 9]), ([1, 12], [10, 11, 12, 13]), ([1, 7, 7], [5])]
    ]
    assert found.details["window_losses"] == pytest.approx(expected, rel=1e-4)
    tokenizer.chat_template = (
        "{% for m in messages %}</s> {{ m.content }}{% endfor %}{% if add_generation_prompt %} w93{% endif %}"
    )
    chat = Continuation(**PAIRS, prompt_length=8, length=4, apply_chat_template=True, prompts=1).evaluate(subject)
    assert chat.details["window_losses"] == pytest.approx([losses_of(model, [2, 4, 5, 6, 96], [8, 9])], rel=1e-4)


def test_what_cannot_be_measured(model, tokenizer, subject):
    pairs = Both(model, tokenizer, ANSWERED)
    with pytest.raises(SpecError, match="250 tokens and 32 after them are more than the model's context of 256"):
        Continuation(prompt_length=250).evaluate(subject)
    with pytest.raises(DataError, match="has 400 tokens, and 20 prompts take 1292; lower prompts"):
        Continuation().evaluate(subject)
    with pytest.raises(DataError, match=r"document 1: a prompt of 4 tokens and an answer of 2; a prompt has 1 to 3"):
        Continuation(**PAIRS, prompt_length=3).evaluate(pairs)
    with pytest.raises(DataError, match="has 3 documents for the 2 of"):
        Continuation(**PAIRS).evaluate(Both(model, tokenizer, {**ANSWERED, "prompt": ["w1", "w2"]}))
    with pytest.raises(SpecError, match="the tokenizer has no chat template"):
        Continuation(**PAIRS, apply_chat_template=True).evaluate(pairs)
    with pytest.raises(ValueError, match="apply_chat_template is for whole prompts"):
        Continuation(apply_chat_template=True)
    model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the loss after prompt 0 is nan in float32"):
        Continuation(**PAIRS).evaluate(pairs)


def test_a_run_has_dense_and_pruned_values(small_pipeline, tmp_path):
    data = small_pipeline(use="wanda_sp")
    text = data["calibration"]["file"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"q": f"w{n} w3", "a": "w5 w6"}) + "\n" for n in range(3)))
    asked = {"text": {"file": str(tmp_path / "asked.jsonl"), "field": "q"}}
    data["evaluate"] = [
        {"name": "continuation", "text": {"file": text}, **SMALL},
        {"name": "continuation", **asked, "answers": {"file": str(tmp_path / "asked.jsonl"), "field": "a"}},
    ]
    known = {}
    first, second = Pipeline(data).measure(dense=known).record.metrics
    assert [type(measured.values["loss"]) for measured in known.values()] == [float] * 2  # other runs need not measure
    assert first.dense.keys() == {"perplexity", "loss", "repetition"}
    assert first.pruned.keys() == {*first.dense, "agreement", "same_start"}
    assert (
        first.dense["loss"] != first.pruned["loss"] and 0 <= first.pruned["same_start"] <= first.pruned["agreement"] < 1
    )
    assert second.protocol["prompts"] == 3 and second.protocol["answers"] == "asked.jsonl"


TWO = (TextSource(bundled="a", field="first"), TextSource(bundled="a", field="second"))
SECOND = " ".join(f"w{number * 11 % 89}" for number in range(300))


@pytest.mark.parametrize("mixed", [False, True])
def test_prompts_of_several_texts_share_batches_or_do_not(model, tokenizer, mixed, monkeypatch):
    """Both ways continue the same prompts; in a mixed batch those of the texts take turns."""
    subject, seen = Both(model, tokenizer, {"first": [DOCUMENT], "second": [SECOND]}), []
    alone = [Continuation(**SMALL | {"prompts": 3}, text=text)._runs(subject)[0] for text in TWO]
    evaluator = Continuation(**SMALL | {"prompts": 7}, mixture=TWO, mixed=mixed, batch_size=2)

    def note(self, subject, batch, number):
        seen.append(batch)
        return continued(model, batch, 5, 0)

    monkeypatch.setattr(Continuation, "_continued", note)
    found = evaluator.evaluate(subject)
    first, second = alone
    if mixed:
        assert seen == [list(pair) for pair in zip(first, second, strict=True)]
    else:
        assert seen == [first[:2], first[2:], second[:2], second[2:]]
    assert found.protocol["text"] == "bundled a + bundled a" and found.protocol["prompts"] == 6
    assert found.protocol["batches"] == ("of all texts in turn" if mixed else "of one text each")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixture": TWO[:1]}, "mixture is of two or more texts"),
        ({"mixture": TWO[:1] * 2}, "each named once"),
        ({"mixed": True}, "mixed needs several texts"),
        ({"mixture": TWO, "text": {"file": "some.txt"}}, "mixture takes the place of text"),
        ({"mixture": TWO, "answers": TWO[0]}, "answers belong to the prompts of one text"),
        ({"mixture": TWO, "prompts": 1}, "prompts: 1 cannot be shared by 2 texts"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Continuation(**options)
