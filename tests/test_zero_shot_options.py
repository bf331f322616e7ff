"""What zero_shot finds wrong with its options before a model is loaded, and what that costs."""

import time
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from prunekit.compress import Pipeline
from prunekit.compress.runs import pipeline
from prunekit.evaluators import harness
from prunekit.evaluators.zero_shot import ZeroShot
from prunekit.registry import SpecError
from transformers import LlamaConfig

TASK = """
task: {name}
tag: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: nowhere.jsonl}}}}
output_type: multiple_choice
test_split: test
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def few_tasks(monkeypatch):
    """Only a few of lm-eval's thousands of tasks are indexed; holds what was asked of the index."""
    asked = []
    paths = [
        str(Path(lm_eval.__file__).parent / "tasks" / part) for part in ("hellaswag", "winogrande", "arc", "gsm8k")
    ]

    def index(folders, local):
        asked.append(folders)
        return TaskManager(include_path=[*paths, *map(str, folders)], include_defaults=False)

    monkeypatch.setattr(harness, "_everything", index)
    return asked


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.yaml").write_text(TASK.format(name="one"))
    (tmp_path / "two.yaml").write_text("include: one.yaml\ntask: two\nmetric_list: [{metric: exact_match}]\n")
    return tmp_path


WRONG = [
    ({"tasks": "true_continuaton"}, r"no task or group 'true_continuaton' \(did you mean 'true_continuation'\?"),
    ({"tasks": ["true_continuation", "hellaswg"]}, r"did you mean 'hellaswag'\?"),
    ({"metric": "acc_norn"}, r"true_continuation has no metric 'acc_norn'; it has acc\."),
    ({"tasks": "winogrande", "metric": "acc_norm"}, r"winogrande has no metric 'acc_norm'.* it has acc\."),
    ({"tasks": "ai2_arc", "metric": "f1"}, r"task arc_\w+ has no metric 'f1'; it has acc, acc_norm\."),
]


@pytest.mark.parametrize("name", ["arc_eazy", "no_such_task"])
def test_names_are_looked_up_without_an_index_of_all_tasks(name, monkeypatch):
    monkeypatch.setattr(harness, "_everything", lambda *names: pytest.fail("all of lm-eval's tasks were indexed"))
    with pytest.raises(SpecError, match=f"knows no task or group '{name}'"):
        ZeroShot(tasks=["piqa", name]).check_options()
    ZeroShot(tasks="paper7", metric="llm_pruner").check_options()
    assert set(harness.listed_metrics(["arc_easy", "boolq"], ())) == {"arc_easy", "boolq"}


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_no_model_can_run(few_tasks, options, message, capsys, caplog):
    with pytest.raises(SpecError, match=message):
        ZeroShot(**options).check_options()
    assert capsys.readouterr() == ("", "") and not caplog.records


@pytest.mark.slow
def test_a_name_that_all_of_lm_evals_tasks_lack_is_refused_within_a_minute():
    began = time.process_time()
    with pytest.raises(SpecError, match=r"did you mean 'hellaswag'\?"):
        ZeroShot(tasks="hellaswg").check_options()
    assert time.process_time() - began < 60


def test_what_may_work(few_tasks, folder):
    for options in [
        {"tasks": ["hellaswag", "ai2_arc"], "metric": "acc_norm"},
        {"tasks": ["hellaswag", "winogrande"], "metric": "llm_pruner"},
        {"tasks": "gsm8k", "metric": "exact_match,flexible-extract"},
        {"tasks": "gsm8k", "metric": "whatever"},  # what answers are scored by shows only once they are there
    ]:
        ZeroShot(**options).check_options()


def test_tasks_of_a_folder(few_tasks, folder):
    def check(tasks, **options):
        ZeroShot(tasks=tasks, task_folder=folder, **options).check_options()

    check(["one", "true_continuation"])
    check("one", metric="acc_norm")
    check("two", metric="exact_match")  # its own list in the place of the included one
    with pytest.raises(SpecError, match=r"task two has no metric 'acc'; it has exact_match\."):
        check(["one", "two"])
    with pytest.raises(SpecError, match=r"task two has no metric 'acc'"):
        check("mine")  # the tag of both
    assert not few_tasks
    (folder / "group.yaml").write_text("group: both\ntask: [one, two]\n")
    with pytest.raises(SpecError, match=r"task two has no metric 'acc'"):
        check("both")
    (folder / "one.yaml").unlink()
    with pytest.raises(SpecError, match=r"cannot read .*two\.yaml: FileNotFoundError: .*one\.yaml"):
        check("two", metric="exact_match")
    ZeroShot(task_folder=folder).check_options()  # another's missing file is not in its way
    (folder / "one.yaml").write_text("include: two.yaml\ntask: one\n")
    with pytest.raises(SpecError, match=r"cannot read .*one\.yaml: ValueError: Include cycle at .*one\.yaml"):
        check("one")


def test_functions_as_metrics_are_left_to_loading(folder):
    (folder / "two.yaml").write_text("include: one.yaml\ntask: two\nmetric_list: [{metric: !function mine.score}]\n")
    ZeroShot(tasks="two", task_folder=folder, metric="score").check_options()
    (folder / "two.yaml").write_text("include: one.yaml\ntask: two\nprocess_results: !function mine.results\n")
    ZeroShot(tasks="two", task_folder=folder, metric="score").check_options()


def test_a_run_checks_before_it_loads_the_model(monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda source: pytest.fail("loaded the model first"))
    spec = {"prune": {"use": "magnitude", "ratio": 0.1}, "evaluate": [{"name": "zero_shot", "metric": "f1"}]}
    with pytest.raises(SpecError, match="has no metric 'f1'"):
        Pipeline(spec).measure()


def test_a_tokenizer_without_special_tokens_is_refused_by_name():
    model = SimpleNamespace(config=LlamaConfig())
    subject = SimpleNamespace(model=model, tokenizer=SimpleNamespace(bos_token_id=None, eos_token_id=None))
    with pytest.raises(SpecError, match="neither a BOS nor an EOS token"):
        ZeroShot().evaluate(subject)
    subject.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, chat_template=None)
    with pytest.raises(SpecError, match="the tokenizer has no chat template"):
        ZeroShot(apply_chat_template=True).evaluate(subject)


def test_a_new_option_is_not_written_at_its_default():
    """The keys of stored trials are made of what is written."""
    assert "apply_chat_template" not in ZeroShot().model_dump()
    assert ZeroShot(**ZeroShot(apply_chat_template=True).model_dump()).apply_chat_template
