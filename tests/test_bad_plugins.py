"""Bad plugins in a run and in a study: one message each, the rest works, and nothing that was finished is lost."""

import json
import sys

import pytest
import yaml
from prunekit.compress.ablation.store import Store

SCORER = '''
from typing import Literal
from prunekit.registry import FittedScorer, hookimpl, linear_at

class Mine(FittedScorer):
    """Scores by weights, and may do wrong."""
    name: Literal["NAME"] = "NAME"
    how: str = ""
    def fit(self, model, sites, batches):
        if self.how == "raises":
            raise RuntimeError("no luck")
        if self.how == "writes":
            model.model.norm.weight.data.mul_(2)
        return [linear_at(model, site.consumer).weight.abs().sum(0) for site in sites]

@hookimpl
def scorers():
    return [Mine]
'''

STRATEGY = '''
from typing import Literal
from prunekit.registry import hookimpl
from prunekit.strategies.pp import PP

class Writes(PP):
    """Writes to a weight that no site has."""
    name: Literal["writes"] = "writes"
    def install(self, model, layers, sites, padding_of):
        model.model.norm.weight.data.mul_(2)
        return []

@hookimpl
def strategies():
    return [Writes]
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts plugins on the path as if pip had installed them."""
    site = tmp_path / "site"
    monkeypatch.delenv("PRUNEKIT_BLOCK", raising=False)
    monkeypatch.syspath_prepend(site)
    names = []

    def install(name, source):
        info = site / f"{name}_dist-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[prunekit]\n{name} = bad_plugin_{name}\n")
        (site / f"bad_plugin_{name}.py").write_text(source)
        names.append(f"bad_plugin_{name}")

    yield install
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def pipeline(small_pipeline, tmp_path):
    """Writes a pipeline file."""

    def write(**strategy):
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(small_pipeline(**strategy)))
        return tmp_path / "pipeline.yaml"

    return write


def test_installed_plugins_of_another_api_and_of_one_name_leave_the_rest(installed, pipeline, command, tmp_path):
    installed("later", "PLUGIN_API = 2\n" + SCORER.replace("NAME", "later"))
    installed("one", SCORER.replace("NAME", "same"))
    installed("two", SCORER.replace("NAME", "same"))
    installed("well", SCORER.replace("NAME", "well"))
    code, output = command("run", pipeline(use="wanda_sp", scorer="well"), "--out", tmp_path / "out")
    assert code == 0
    assert output.count("plugin later of later-dist 1.0 is written for plugin API 2, and this prunekit has 1") == 1
    who = "plugin one of one-dist 1.0 and plugin two of two-dist 1.0"
    assert output.count(f"Scorer 'same' is provided twice, by {who}; switch one off with PRUNEKIT_BLOCK=PLUGIN") == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"][0]["pruned"]
    code, output = command("run", pipeline(use="wanda_sp", scorer="same"), "--out", tmp_path / "no")
    assert code == 2 and "'same' is provided twice" in output and not (tmp_path / "no").exists()
    code, output = command("run", pipeline(use="wanda_sp", scorer="later"), "--out", tmp_path / "no")
    assert code == 2 and "no Scorer is called 'later'" in output and "written for plugin API 2" in output


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "scorer 'bad' of plugin file bad.py raised RuntimeError: no luck (bad.py line "),
        ("writes", "scorer 'bad' of plugin file bad.py: its fit has written to model.norm.weight"),
    ],
)
def test_a_plugin_that_fails_in_a_run_is_one_message(pipeline, command, tmp_path, how, words):
    (tmp_path / "bad.py").write_text(SCORER.replace("NAME", "bad"))
    file = pipeline(use="wanda_sp", scorer={"name": "bad", "how": how})
    code, output = command("run", file, "--plugin", tmp_path / "bad.py", "--out", tmp_path / "out")
    assert code == 2 and words in output and "Traceback" not in output and not (tmp_path / "out").exists()
    assert output.count("error:") == 1


def test_a_plugin_that_changes_the_model_is_named_and_the_results_stay(pipeline, command, tmp_path):
    (tmp_path / "bad.py").write_text(STRATEGY)
    code, output = command("run", pipeline(use="writes"), "--plugin", tmp_path / "bad.py", "--out", tmp_path / "out")
    words = "model.norm.weight has been written to. What ran on it: strategy 'writes' of plugin file bad.py"
    assert code == 1 and output.count(f"warning: the model is not what it was before pruning: {words}") == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"][0]["pruned"] and any(f"{words}; all values may be wrong" in n for n in results["notes"])


def test_a_plugin_that_fails_in_a_study_leaves_the_other_trials(small_pipeline, command, tmp_path):
    (tmp_path / "bad.py").write_text(SCORER.replace("NAME", "bad"))
    base = small_pipeline(use="wanda_sp", scorer={"name": "bad"}) | {"plugins": ["bad.py"]}
    study = {"base": base, "vary": {"prune.scorer.how": ["", "raises", "writes", "nothing"]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    code, output = command("ablate", tmp_path / "study.yaml", "--out", tmp_path / "store")
    assert code == 1 and "Traceback" not in output
    with Store.open(tmp_path / "store") as store:
        trials = store.trials
    assert [trial.error is None for trial in trials] == [True, False, False, True]
    assert "raised RuntimeError: no luck" in trials[1].error
    assert "has written to model.norm.weight" in trials[2].error
    first, last = (trial.result.metrics[0] for trial in (trials[0], trials[3]))
    assert (first.dense, first.pruned) == (last.dense, last.pruned)  # a fresh model after the one that was changed
