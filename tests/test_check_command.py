"""``prunekit check``, and what the other commands check of other people's components."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prunekit.compress.runs import checking
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.registry import Catalog
from prunekit.registry.checks import findings

PLUGIN = """
from typing import Literal
from prunekit.registry import Evaluator, Measurement, Scorer, SparsityAllocator, hookimpl


class Ignoring(SparsityAllocator):
    \"\"\"Keeps everything.\"\"\"

    name: Literal["ignoring"] = "ignoring"

    def allocate(self, sites, ratio):
        return [each.site.units for each in sites]


class Fine(Scorer):
    \"\"\"Keeps the rules.\"\"\"

    name: Literal["fine"] = "fine"

    def prepare(self, weight, site):
        return weight.abs().sum(0)

    def score(self, prepared, statistic):
        return prepared * statistic


class Training(Evaluator):
    \"\"\"Leaves training mode.\"\"\"

    name: Literal["training"] = "training"
    refuses: bool = False

    def evaluate(self, subject):
        subject.model.train()
        return Measurement({"one": 1}, {"counted": "one"})


@hookimpl
def allocators():
    return [Ignoring]


@hookimpl
def scorers():
    return [Fine]


@hookimpl
def evaluators():
    return [Training]
"""


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(PLUGIN)
    return file


def test_a_plugin_file_is_checked_and_a_broken_rule_is_exit_code_1(command, plugin):
    code, output = command("check", plugin)
    assert code == 1
    assert "ignoring check_budget failed Ignoring is to cut 0.2 and cuts 0" in output
    assert "check_evaluation failed Training leaves the model in training mode" in output
    assert "2 failed, 0 left out" in output
    assert " passed " not in output[output.index(" failed ") :]  # failures are next to the summary


def test_a_component_is_checked_by_its_name_as_data(command, plugin):
    code, output = command("check", "fine", "--plugin", plugin, "--json")
    found = json.loads(output)
    assert code == 0
    assert {each["result"] for each in found} == {"passed"}
    assert {(each["component"], each["role"]) for each in found} == {("fine", "scorers")}
    assert "check_channel_order" in [each["check"] for each in found]


def test_what_a_component_is_exempt_from_is_left_out_with_the_reason(command):
    code, output = command("check", "random", "--json")
    (left_out,) = [each for each in json.loads(output) if each["result"] == "left out" and each["role"] == "scorers"]
    assert code == 0
    assert left_out["message"] == "it draws by the number of the channel"


def test_architectures_are_checked_on_small_models(command, tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "plugins.md").read_text()
    (example,) = re.findall(r'^```python\n("""BioGPT.*?)^```', page, re.MULTILINE | re.DOTALL)
    types = '("biogpt", "llama4_text", "nowhere", "whisper")'
    (tmp_path / "biogpt.py").write_text(example.replace('("biogpt",)', types))
    output = command("check", tmp_path / "biogpt.py", "--json")[1]
    found = [each for each in json.loads(output) if each["check"] == "check_architecture"]
    assert [each["result"] for each in found] == ["passed", "failed", "left out", "left out"]
    assert "no small nowhere can be made (the installed transformers has no such type)" in found[2]["message"]
    assert "no small whisper can be made (ValueError: embed_dim must be divisible" in found[3]["message"]


def test_a_name_that_nothing_has_is_refused(command):
    code, output = command("check", "ppps")
    assert code == 2
    assert "no component, plugin or plugin file is called 'ppps' (did you mean 'ppsp'?)" in output


def spec_file(tmp_path, plugin, **prune):
    file = tmp_path / "pipeline.yaml"
    prune = {"use": "wanda_sp", "ratio": 0.4, **prune}
    file.write_text(yaml.safe_dump({"plugins": [str(plugin)], "prune": prune}))
    return file


def test_validate_says_what_it_has_checked_of_other_people(command, tmp_path, plugin):
    code, output = command("validate", spec_file(tmp_path, plugin, scorer="fine"))
    assert code == 0
    assert "checked scorer 'fine' of plugin file theirs.py (11 rules hold)" in output
    code, output = command("validate", spec_file(tmp_path, plugin, allocator="ignoring"))
    assert "allocator 'ignoring' of plugin file theirs.py (9 rules hold, 1 broken)" in output
    assert "warning: allocator 'ignoring' of plugin file theirs.py: Ignoring is to cut 0.2 and cuts 0" in output
    code, output = command("validate", spec_file(tmp_path, plugin))
    assert "checked" not in output


def test_results_hold_the_broken_rules(small_pipeline, plugin):
    content = small_pipeline(use="magnitude", allocator="ignoring") | {"plugins": [str(plugin)]}
    notes = Pipeline(content).measure().record.notes
    assert [note for note in notes if "Ignoring is to cut 0.2 and cuts 0" in note and "results may be wrong" in note]


def test_quick_checks_end_after_their_time(plugin, monkeypatch):
    monkeypatch.setattr(checking, "LIMIT", -1.0)
    monkeypatch.setattr(checking, "KNOWN", {})
    fine = Catalog.discover([plugin]).get("scorers", "fine")()
    checked = checking.quickly_checked(fine)
    assert (checked.passed, checked.left, checked.flaws) == (0, len(list(findings(fine))), ())
