"""Tasks whose answers are generated (generate_until), with a pruned model."""

import copy
import json

import pytest
import torch
from prunekit.compress import prune
from prunekit.evaluators.zero_shot import ZeroShot
from prunekit.registry import PlainSubject, SpecError

from tests.test_generation import greedy, zeroed_copy

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["w999"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = ["w5 w17 w40 w8", "w3 w80", "w2 w61 w9 w44 w27", "w30 w1 w1"]
ASKED = dict(tasks="words", metric="exact_match")


@pytest.fixture
def model(make_model):
    found = make_model("llama-gqa")
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def answered(tmp_path):
    """Writes the task with these answers, and returns its folder."""

    def write(answers):
        rows = [json.dumps({"q": q, "a": a}) for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "words.jsonl").write_text("\n".join(rows))
        (tmp_path / "words.yaml").write_text(TASK)
        return tmp_path

    return write


def words(model, tokenizer, question):
    ids = torch.tensor([tokenizer(question)["input_ids"]])
    return tokenizer.decode(greedy(model, ids)[0, ids.shape[1] :][:4], skip_special_tokens=True)


def test_a_static_cut_answers_as_the_model_without_its_units(model, tokenizer, batches, answered):
    clean = copy.deepcopy(model)
    dense = [words(clean, tokenizer, question) for question in QUESTIONS]
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, trace=True) as pruned:
        oracle = zeroed_copy(clean, pruned, pruned.trace)
        own = [words(oracle, tokenizer, question) for question in QUESTIONS]
        subject = PlainSubject(model, tokenizer)
        found = ZeroShot(**ASKED, task_folder=answered(own), batch_size=4).evaluate(subject)
        assert found.values["words"] == 1 and found.details["scores"]["words"] == [1.0] * 4
        other = ZeroShot(**ASKED, task_folder=answered(dense), batch_size=4).evaluate(subject)
    assert other.values["words"] == sum(a == b for a, b in zip(own, dense, strict=True)) / 4 < 1
    assert found.protocol["tasks"]["words"]["metric"] == "exact_match,none" and found.notes == other.notes


def test_a_strategy_that_decides_per_prompt_keeps_its_choice(model, tokenizer, batches, answered):
    clean = copy.deepcopy(model)
    with prune(model, "pp", ratio=0.4, calibration=batches, merger="probe_only", trace=True) as pruned:
        own = []
        for question in QUESTIONS:
            words(model, tokenizer, question)
            own.append(words(zeroed_copy(clean, pruned, pruned.trace[-6:]), tokenizer, question))
        made = len(pruned.trace)
        found = ZeroShot(**ASKED, task_folder=answered(own), batch_size=1).evaluate(PlainSubject(model, tokenizer))
    assert found.values["words"] == 1 and len(pruned.trace) == 2 * made
    assert own != [words(clean, tokenizer, question) for question in QUESTIONS]


def test_prompts_without_room_for_the_answer_are_counted(model, tokenizer, answered):
    found = ZeroShot(**ASKED, task_folder=answered(["w1"] * 4), max_length=7).evaluate(PlainSubject(model, tokenizer))
    assert found.notes[0] == "2 prompts did not fit in 7 tokens and lost their beginning"
    with pytest.raises(SpecError, match=r"lm-eval cannot run words: .*max tokens to generate \(4\)"):
        ZeroShot(**ASKED, task_folder=answered(["w1"] * 4), max_length=4).evaluate(PlainSubject(model, tokenizer))


def test_a_metric_that_the_task_lacks_is_refused_before_it_runs(model, tokenizer, answered):
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SpecError, match="task words has no metric 'acc'; it has exact_match"):
        ZeroShot(tasks="words", task_folder=answered(["w1"] * 4)).evaluate(PlainSubject(model, tokenizer))
