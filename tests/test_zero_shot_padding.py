"""lm-eval's requests reach the model with a mask, and what stands in place of padding changes nothing."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.evaluators.harness import MaskedLM, quiet
from prunekit.registry import DataError, NonFiniteError, PlainSubject

LETTERS = "!abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,"
OPTIONS = dict(backend="causal", batch_size=4, max_length=64)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter; token 0 is the exclamation mark and nothing special."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {letter: i for i, letter in enumerate(LETTERS)} | {"<s>": 90, "<pad>": 91}
    built = Tokenizer(models.WordLevel(ids, unk_token=","))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


@pytest.fixture(params=["llama-gqa", "opt"])
def model(request, make_model):
    model = make_model(request.param)
    torch.nn.init.normal_(model.get_input_embeddings().weight[0], std=0.5)  # padding is not a neutral token
    return model


def masked(model, tokenizer, reset=lambda: None, batch_size=4):
    subject = PlainSubject(model, tokenizer)
    subject.reset = reset
    with quiet():
        return MaskedLM(subject, batch_size, 64)


def stock(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, **OPTIONS)


@pytest.fixture
def requests():
    """Ids of contexts and continuations of many lengths, some ending with token 0, some alike but for one token."""
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(0, 97, (count,), generator=generator).tolist()

    made = [(None, ids(3 + 5 * (i % 7)), ids(1 + i % 4)) for i in range(14)]
    context = ids(9)
    ended = [(None, ids(6), [5, 0]), (None, ids(11), [0]), (None, [*ids(4), 0, 0], [0, 0, 0]), (None, [0], [0])]
    return made + ended + [(None, context, [token]) for token in (0, 7, 8, 9)]


class Asked:
    """An lm-eval request."""

    def __init__(self, *args, task="t"):
        self.args, self.task_name = args, task


def spy(model):
    """Takes down what the model is called with."""
    seen = []

    def hook(module, args, kwargs):
        seen.append((args, dict(kwargs)))

    return seen, model.register_forward_pre_hook(hook, with_kwargs=True)


def values(answers):
    return torch.tensor([value for value, _ in answers]), [greedy for _, greedy in answers]


def test_dense_results_are_those_of_lm_eval(model, tokenizer, requests):
    expected, greedy = values(stock(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True))
    found, also = values(masked(model, tokenizer)._loglikelihood_tokens(requests))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert also == greedy


def test_the_first_choice_is_recognised(model, tokenizer):
    context = [5, 9, 0, 33]
    best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    two = [(None, context, [best]), (None, context, [(best + 1) % 97])]
    answers = masked(model, tokenizer)._loglikelihood_tokens(two)
    assert [greedy for _, greedy in answers] == [True, False]


def test_the_mask_is_passed_where_there_is_padding_and_only_there(model, tokenizer, requests):
    seen, hook = spy(model)
    masked(model, tokenizer)._loglikelihood_tokens(requests)
    masked(model, tokenizer)._loglikelihood_tokens([(None, [4, 0, 6], [7, 8]), (None, [0, 0, 0], [0, 9])])
    hook.remove()
    lengths = sorted(len(context) + len(then) - 1 for _, context, then in requests[:-3])
    found = []
    for _, kwargs in seen[:-1]:
        real = kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"]))
        assert torch.equal(real, real.sort(dim=1, descending=True).values)
        assert "attention_mask" not in kwargs or not real.all()
        found += real.sum(1).tolist()
    assert sorted(found) == lengths
    assert "attention_mask" not in seen[-1][1]
    assert seen[-1][1]["input_ids"].tolist() == [[0, 0, 0, 0], [4, 0, 6, 7]]


def garbage(model, seed, hide_mask=False):
    """Puts random ids where padding is; ``hide_mask`` is what lm-eval does."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is not None:
            other = torch.randint(0, 97, ids.shape, generator=generator)
            kwargs = {**kwargs, "input_ids": torch.where(mask.bool(), ids, other)}
            if hide_mask:
                del kwargs["attention_mask"]
        return args, kwargs

    return model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.fixture
def probed(model, tokenizer, requests, batches):
    """Runs the requests on a model that is pruned by PP; gives its answers and decisions."""

    def run(*hook_options):
        with prune(model, "pp", ratio=0.5, skip_layers=(), calibration=batches * 2, trace=True) as pruned:
            # The hook comes in front of the engine's.
            hook = garbage(model, *hook_options) if hook_options else None
            lm = masked(model, tokenizer, pruned.reset)
            answers = lm._by_task(
                lambda some, disable_tqdm: lm._loglikelihood_tokens([one.args for one in some]), asked
            )
            if hook:
                hook.remove()
            return answers, pruned.trace

    asked = [Asked(*request) for request in requests if len(request[1]) + len(request[2]) < 24]
    return run


def test_padding_changes_no_decision(probed):
    answers, trace = probed()
    assert len({str(record["kept"]) for record in trace if record["kind"] == "mlp"}) > 3  # it is dynamic
    for seed in (1, 2):
        again, decisions = probed(seed)
        assert [record["kept"] for record in decisions] == [record["kept"] for record in trace]
        assert again == answers


def test_without_the_mask_padding_decides(probed):
    assert probed(1, True)[0] != probed(2, True)[0]


def test_twice_gives_the_same(probed):
    assert probed() == probed()


def test_rolling_results_are_those_of_lm_eval(model, tokenizer):
    texts = ["aZ! b!", "the cat sat on the mat, twice. " * 4, "!", "no end!!"]
    expected = stock(model, tokenizer).loglikelihood_rolling([Asked(text) for text in texts], disable_tqdm=True)
    seen, hook = spy(model)
    found = masked(model, tokenizer).loglikelihood_rolling([Asked(text) for text in texts])
    hook.remove()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert any("attention_mask" in kwargs for _, kwargs in seen)


def test_generation_is_padded_on_the_left_with_its_mask(model, tokenizer):
    asked = [Asked(text, {"until": ["q"], "max_gen_toks": 5}) for text in ("a long one, this", "hi!", "!!")]
    expected = stock(model, tokenizer).generate_until(asked, disable_tqdm=True)
    seen, hook = spy(model)
    assert masked(model, tokenizer).generate_until(asked) == expected
    hook.remove()
    assert seen[0][1]["attention_mask"].sum(1).tolist() == [16, 3, 2]
    assert seen[0][1]["attention_mask"][:, -1].tolist() == [1, 1, 1]


def test_every_task_begins_anew(model, tokenizer):
    resets = []
    lm = masked(model, tokenizer, reset=lambda: resets.append(1))
    asked = [Asked("ab", "c", task="one"), Asked("a", "bcd", task="two"), Asked("abc", "d", task="one")]
    answers = lm.loglikelihood(asked)
    assert len(resets) == 2
    assert answers[1] == lm.loglikelihood(asked[1:2])[0]


def test_long_prompts_lose_their_beginning_and_are_counted(model, tokenizer):
    lm = masked(model, tokenizer)
    (long,) = lm._loglikelihood_tokens([(None, [7] * 30 + list(range(63)), [3, 4])])
    (short,) = lm._loglikelihood_tokens([(None, list(range(63)), [3, 4])])
    assert long == short
    assert lm.shortened == 1


def test_requests_that_cannot_be_run(model, tokenizer):
    lm = masked(model, tokenizer)
    with pytest.raises(DataError, match="an answer of 65 tokens does not fit into max_length: 64"):
        lm._loglikelihood_tokens([(None, [1], [2] * 65)])
    with pytest.raises(DataError, match="has no tokens"):
        lm._loglikelihood_tokens([(None, [], [2])])
    with pytest.raises(DataError, match="token id 97"):
        lm._loglikelihood_tokens([(None, [97], [2])])
    model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN in float32"):
        lm._loglikelihood_tokens([(None, [4, 5], [2])])
