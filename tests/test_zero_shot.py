"""Zero-shot accuracy: options, values and their protocol, tasks from folders, and every way to get it wrong."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from prunekit.compress import prune
from prunekit.compress.bundled import MODEL
from prunekit.compress.files.spec import PipelineSpec
from prunekit.evaluators import harness
from prunekit.evaluators.zero_shot import PRESETS, ZeroShot
from prunekit.registry import DataError, PlainSubject, SpecError
from prunekit.registry.checks import check_evaluation

ROOT = Path(__file__).resolve().parents[1]
STOCK = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
QUESTION = '{{"q": "Is it {} or {}?", "a": {}}}\n'
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval(), AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def subject(loaded):
    return PlainSubject(*loaded)


@pytest.fixture
def few_tasks(monkeypatch):
    """Only a few of lm-eval's thousands of tasks are indexed, which would take seconds."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    paths = [str(folder / part) for part in STOCK]

    def index(folders, local):
        return TaskManager(include_path=[*paths, *map(str, folders)], include_defaults=False)

    monkeypatch.setattr(harness, "_everything", index)


@pytest.fixture
def folder(tmp_path):
    """Two tasks, the group of both, and their data next to them in folders of their own."""
    for name in ("one", "two"):
        place = tmp_path / "tasks" / name
        place.mkdir(parents=True)
        (place / "same_name.jsonl").write_text("".join(QUESTION.format(name, i, i % 2) for i in range(4)))
        (place / "task.yaml").write_text(TASK.format(name=name, file="same_name.jsonl"))
    group = "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "tasks" / "both.yaml").write_text(group)
    return tmp_path / "tasks"


def test_the_bundled_task(subject, capsys, caplog):
    shown = []
    subject.progress = lambda items, label, total: shown.append((label, total)) or items
    found = ZeroShot(limit=12, batch_size=16).evaluate(subject)
    accuracy = found.values["true_continuation"]
    assert found.values["mean"] == accuracy
    assert found.values["true_continuation_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 11))
    assert sum(found.details["scores"]["true_continuation"]) / 12 == accuracy
    task = found.protocol["tasks"]["true_continuation"]
    assert task == {"metric": "acc,none", "version": "1.0", "documents": 12, "num_fewshot": 0}
    assert {"lm_eval", "limit", "batch_size", "order", "logits_cache", "max_length", "dtype"} <= set(found.protocol)
    assert found.protocol["max_length"] == 512
    assert shown == [("zero_shot true_continuation", 3)]
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_it_leaves_the_model_and_the_tokenizer_alone(subject):
    pad = subject.tokenizer.pad_token
    subject.tokenizer.pad_token = None
    try:
        check_evaluation(ZeroShot(limit=2), subject)
        assert subject.tokenizer.pad_token is None
    finally:
        subject.tokenizer.pad_token = pad


def test_groups_and_several_tasks(subject, folder):
    found = ZeroShot(tasks=("one", "true_continuation"), task_folder=folder, limit=2).evaluate(subject)
    assert found.values["mean"] == (found.values["one"] + found.values["true_continuation"]) / 2
    assert set(found.details["scores"]) == {"one", "true_continuation"}


def test_a_group_is_one_value(subject, folder, few_tasks):
    found = ZeroShot(tasks=("both",), task_folder=folder).evaluate(subject)
    assert set(found.values) == {"both", "both_stderr", "mean"}
    assert found.values["both"] == sum(sum(each) for each in found.details["scores"].values()) / 8
    assert found.protocol["tasks"]["one"]["part_of"] == "both"


def test_solved_examples_come_before(subject, folder):
    seen = []
    hook = subject.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"tasks": ("one",), "task_folder": folder, "limit": 1}
    plain, shown = (ZeroShot(**options, num_fewshot=count).evaluate(subject).protocol for count in (0, 2))
    hook.remove()
    assert (plain["tasks"]["one"]["num_fewshot"], shown["tasks"]["one"]["num_fewshot"]) == (0, 2)
    assert seen[1] > 2 * seen[0]


def test_questions_are_asked_by_the_chat_template(loaded, folder, monkeypatch):
    import copy

    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    asked = []
    stock = harness.MaskedLM.loglikelihood
    monkeypatch.setattr(
        harness.MaskedLM,
        "loglikelihood",
        lambda self, requests, **_: asked.extend(one.args[0] for one in requests) or stock(self, requests),
    )
    options = {"tasks": "one", "task_folder": folder, "num_fewshot": 1, "limit": 1}
    plain = ZeroShot(**options).evaluate(PlainSubject(model, tokenizer))
    chat = ZeroShot(**options, apply_chat_template=True).evaluate(PlainSubject(model, tokenizer))
    assert "chat_template" not in plain.protocol and chat.protocol["chat_template"] == "the tokenizer's"
    assert "<user>" not in asked[0] and asked[-1].count("<user>") == 2 and asked[-1].endswith("<bot>")
    assert "<assistant>" in asked[-1]


def test_published_tasks_from_files(subject, shared, tmp_path):
    names = ("arc_easy", "arc_challenge", "openbookqa", "boolq", "hellaswag")
    shutil.copytree(ROOT / "docs" / "examples" / "tasks", tmp_path / "tasks")
    for path in (shared / "tasks").glob("*.jsonl"):
        (tmp_path / "tasks" / path.name).symlink_to(path)
    found = ZeroShot(tasks=[f"{name}_local" for name in names], task_folder=tmp_path, limit=3).evaluate(subject)
    assert [len(scores) for scores in found.details["scores"].values()] == [3] * 5
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with harness._data_next_to(manager):
        (task,) = manager.load(["hellaswag_local"])["tasks"].values()
    asked = task.doc_to_text(task.eval_docs[0])
    assert asked == "Roof shingle removal: A man is sitting on a roof. He"
    assert task.doc_to_choice(task.eval_docs[0])[task.doc_to_target(task.eval_docs[0])].startswith("starts pulling")


def test_relative_folders_start_at_the_pipeline_file(folder, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("prune: {use: pp, ratio: 0.4}\nevaluate: [{name: zero_shot, tasks: [one], task_folder: [tasks]}]\n")
    monkeypatch.chdir(ROOT)
    assert PipelineSpec.load(file).evaluate[0].task_folder == (folder,)


def test_paper7_is_seven_tasks_and_says_what_it_misses(subject, few_tasks, monkeypatch):
    assert len(PRESETS["paper7"]) == 7
    with pytest.raises(DataError, match=r"the data of task boolq \(aps/super_glue boolq\) cannot be loaded: .*network"):
        ZeroShot(tasks=("paper7",)).evaluate(subject)


def test_metrics_of_the_published_tables():
    score = {"acc,none": 0.1, "acc_stderr,none": 0.0, "acc_norm,none": 0.2}
    chosen = {task: ZeroShot(metric="llm_pruner")._key(task, score) for task in PRESETS["paper7"]}
    normed = {task for task, key in chosen.items() if key == "acc_norm,none"}
    assert normed == {"hellaswag", "arc_challenge", "openbookqa"}
    assert ZeroShot(metric="acc_norm,none")._key("boolq", score) == "acc_norm,none"


WRONG = [
    ({"tasks": ("true_continuaton",)}, r"no task or group 'true_continuaton' \(did you mean 'true_continuation'\?"),
    ({"tasks": ("hellaswg",)}, r"did you mean 'hellaswag'\?"),
    ({"metric": "acc_norn"}, r"true_continuation has no metric 'acc_norn'; it has acc\."),
    ({"max_length": 513}, "513 tokens are more than the model's context of 512"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_cannot_work(subject, few_tasks, options, message):
    with pytest.raises(SpecError, match=message):
        ZeroShot(**options).evaluate(subject)


def test_options_that_are_refused(tmp_path):
    for options, message in [
        ({"batch_size": "auto"}, "batch_size: should be a whole number, not text .found 'auto'"),
        ({"task_folder": tmp_path / "none"}, "there is no folder"),
        ({"task_folder": (tmp_path,)}, "holds no lm-eval task file"),
        ({"tasks": ()}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ZeroShot(**options)


def test_data_that_is_not_there_and_files_that_are_no_yaml(subject, folder):
    (folder / "one" / "same_name.jsonl").unlink()
    with pytest.raises(DataError, match=r"the data of task one .json. cannot be loaded: .*same_name\.jsonl"):
        ZeroShot(tasks=("one",), task_folder=folder).evaluate(subject)
    (folder / "two" / "task.yaml").write_text("task: [")
    with pytest.raises(SpecError, match=r"task_folder: lm-eval cannot read .*two.task\.yaml: ParserError"):
        ZeroShot(tasks=("two",), task_folder=folder).evaluate(subject)


def test_prompts_longer_than_history(subject):
    words = [{"input_ids": subject.tokenizer("word " * 40, return_tensors="pt")["input_ids"][:, :28]}]
    with prune(subject.model, "pp", ratio=0.4, calibration=words):
        with pytest.raises(
            DataError, match=r"task true_cont.*longer than the history.*max_length, or raise calibration\.length$"
        ):
            ZeroShot(limit=4).evaluate(subject)
        found = ZeroShot(limit=4, max_length=28).evaluate(subject)
    assert "lost their beginning" in found.notes[0]


def test_the_catalog_does_not_import_lm_eval():
    code = "import sys; from prunekit.registry import Catalog; Catalog.discover(); print('lm_eval' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert done.stdout == "False\n"


def test_one_task_needs_no_brackets_in_the_schema_either():
    import jsonschema

    schema = ZeroShot.model_json_schema()
    jsonschema.validate({"tasks": "paper7"}, schema)
    jsonschema.validate({"tasks": ["piqa", "boolq"]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"tasks": 7}, schema)
