"""Running a study: what trials share, what goes wrong in one, and a run that is killed in the middle."""

import subprocess
import sys

import pytest
from prunekit.compress.ablation import worker as worker_module
from prunekit.compress.ablation.command import ablate
from prunekit.compress.ablation.display import Display, Forecast
from prunekit.compress.ablation.store import Store
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.trials import StoredTrial
from prunekit.compress.ablation.worker import Outcome, Worker, in_order, read_trial, run_local
from prunekit.compress.bundled import MODEL
from prunekit.compress.cli.studies import show_trials
from prunekit.compress.output import printing
from prunekit.compress.output.pace import duration

from tests.run_records import run_record

PLUGIN = '''
from typing import Literal
from prunekit.compress.output.pace import duration
from prunekit.registry import Evaluator, Measurement, SpecError, hookimpl

CALLS = []

class Fragile(Evaluator):
    """Breaks when it is told to."""
    name: Literal["fragile"] = "fragile"
    breaks: Literal["", "badly", "as foreseen", "by hand"] = ""
    def evaluate(self, subject):
        CALLS.append(self.breaks)
        if self.breaks == "badly":
            raise RuntimeError("no luck")
        if self.breaks == "as foreseen":
            raise SpecError("evaluate.0: this cannot work; do otherwise")
        if self.breaks == "by hand":
            raise KeyboardInterrupt
        return Measurement({"size": subject.parameters(), "odd": float("nan")}, {})

@hookimpl
def evaluators(): return [Fragile]
'''

FRAGILE = """\
base: {plugins: [fragile.py], prune: {use: random}, evaluate: [fragile]}
vary: {prune.ratio: [0.2, 0.4], evaluate.0.breaks: ["", badly, as foreseen]}
"""

SMALL = """\
base:
  calibration: {sequences: 2, length: 32}
  prune: {ratio: 0.4}
  evaluate: [{name: perplexity, window: 32, batch_size: 2, limit: 4}]
vary: {prune.use: [pp, flap], seed: [0, 1, 2]}
"""


@pytest.fixture
def study(tmp_path):
    """The study of a file with this text, next to a plugin that can break."""

    def of(text: str) -> Study:
        (tmp_path / "fragile.py").write_text(PLUGIN)
        (tmp_path / "study.yaml").write_text(text)
        return Study.load(tmp_path / "study.yaml")

    return of


class Heard:
    """A watch that remembers."""

    def __init__(self):
        self.said = []
        self.progress = lambda items, label, total: items

    def started(self, planned):
        self.said.append(("started", planned.label))

    def finished(self, planned, outcome):
        self.said.append(("finished", planned.label))


def results(store) -> list:
    """What a store has found out, times left out."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "started")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    with Store.open(store) as opened:
        return [timeless(trial.model_dump()) for trial in opened.trials]


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_others_run(study):
    planned, outcomes, heard = study(FRAGILE).trials, [], Heard()
    run_local(planned, lambda trial, outcome: outcomes.append(outcome), heard)
    good, badly, foreseen = outcomes[:3]
    assert good.error is None
    assert good.result.metrics[0].pruned["odd"] == "nan"
    assert good.result.metrics[0].pruned["size"] < good.result.metrics[0].dense["size"]
    assert "use: random" in good.resolved
    assert "raised RuntimeError: no luck (fragile.py line " in badly.error
    assert foreseen.error == "evaluate.0: this cannot work; do otherwise"
    assert badly.result is None
    assert [outcome.error is None for outcome in outcomes] == [True, False, False] * 2
    assert outcomes[3].result.metrics[0].dense == good.result.metrics[0].dense
    fresh = Worker().run(planned[3].spec)  # a failure leaves the model as it was
    assert outcomes[3].result.metrics[0].pruned == fresh.result.metrics[0].pruned
    assert outcomes[3].result.model == fresh.result.model
    assert heard.said[:3] == [("started", planned[0].label), ("finished", planned[0].label), ("started", "0.2 badly")]


def test_an_interruption_gets_through(study):
    trial = study(FRAGILE.replace('"", badly, as foreseen', "by hand")).trials[0]
    with pytest.raises(KeyboardInterrupt):
        Worker().run(trial.spec)


def test_one_model_one_dense_baseline(study, monkeypatch):
    loads = []
    load = worker_module.load
    monkeypatch.setattr(worker_module, "load", lambda source: loads.append(source) or load(source))
    models = f"model: {{bundled: {{}}, folder: {{model.name: {MODEL}}}}}"
    planned = study(FRAGILE.replace('evaluate.0.breaks: ["", badly, as foreseen]', models)).trials
    outcomes = {}
    run_local(planned[::-1], lambda trial, outcome: outcomes.__setitem__(trial.number, outcome), Heard())
    assert [source.name for source in loads] == [None, str(MODEL)]
    calls = sys.modules["prunekit_plugin_fragile"].CALLS
    assert len(calls) == 2 * 3  # two models: dense once, pruned twice
    assert all(outcome.error is None for outcome in outcomes.values())


@pytest.mark.slow
def test_another_model_shares_nothing(study, monkeypatch):
    load = worker_module.load

    def loading(source):
        """The folder's model computes something else than the bundled one."""
        loaded = load(source)
        if source.name:
            weight = loaded.model.get_input_embeddings().weight
            weight.data = weight.data.flip(0)
        return loaded

    monkeypatch.setattr(worker_module, "load", loading)
    models = f"vary: {{prune.use: [wanda_sp], model: {{bundled: {{}}, folder: {{model.name: {MODEL}}}}}}}"
    planned = study(SMALL.replace("vary: {prune.use: [pp, flap], seed: [0, 1, 2]}", models)).trials
    worker = Worker()
    first, second = (worker.run(trial.spec).result.metrics for trial in planned)
    alone = Worker().run(planned[1].spec).result.metrics
    assert (second[0].dense, second[0].pruned) == (alone[0].dense, alone[0].pruned)
    assert second[0].dense != first[0].dense


def test_trials_that_share_run_in_a_row(study):
    planned = study(
        "base: {prune: {use: pp}}\nvary: {prune.ratio: [0.2, 0.4], calibration.length: [64, 32], "
        f"model: {{a: {{}}, b: {{model.name: {MODEL}}}}}}}"
    ).trials
    assert [trial.number for trial in in_order(planned)] == [1, 5, 3, 7, 2, 6, 4, 8]


def test_a_trial_runs_from_its_yaml_in_a_process_that_knows_nothing(study):
    first, second = (read_trial(trial.spec.to_yaml()) for trial in study(FRAGILE).trials[::3])
    assert type(first.evaluate[0]) is type(second.evaluate[0])  # so that dense is measured once there too
    assert first.to_yaml() == study(FRAGILE).trials[0].spec.to_yaml()
    assert Worker().run(first).error is None


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(study, tmp_path, capfd):
    file = study(SMALL).file
    command = f"from prunekit.compress.cli.main import main; main()  # {tmp_path}"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "ablate", file, "--out", tmp_path / "killed.sqlite"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("2/6"):
            process.kill()
    assert process.wait() == -9
    with Store.open(tmp_path / "killed.sqlite") as store:
        before = [trial for trial in store.trials if trial.status == "done"]
    assert 2 <= len(before) < 6

    ablate(file, out=tmp_path / "whole.sqlite", show=show_trials)
    whole = capfd.readouterr().out
    ablate(file, out=tmp_path / "killed.sqlite", show=show_trials)
    resumed = capfd.readouterr().out
    assert results(tmp_path / "killed.sqlite") == results(tmp_path / "whole.sqlite")
    with Store.open(tmp_path / "killed.sqlite") as store:
        kept = {trial.key: trial for trial in store.trials}
    assert [kept[trial.key] for trial in before] == before  # times too: none has run again
    assert f"6 trials, {len(before)} done, {6 - len(before)} to run" in resumed
    assert whole.splitlines()[1:-1] == resumed.splitlines()[1:-1]
    assert "±" in whole


# Progress


def test_time_left_is_by_strategy_and_shared_between_workers():
    forecast = Forecast()
    assert forecast.left(["pp"]) is None
    for strategy, seconds in (("pp", 10), ("pp", 20), ("pp", 90), ("flap", 2)):
        forecast.learn(strategy, seconds)
    assert forecast.left(["pp", "flap", "flap"]) == 24
    assert forecast.left(["pp", "flap", "flap"], running=[3, 100]) == 24 - 3 - 15
    assert forecast.left(["pp", "pp"], workers=2) == 20
    assert forecast.left(["unknown"]) == 15
    assert [duration(s) for s in (0.42, 61, 150, 7500)] == ["0.4 s", "61 s", "2 min", "2 h 5 min"]


def test_a_line_for_each_trial_where_there_is_no_terminal(study, capfd, monkeypatch):
    monkeypatch.setattr(printing, "err", printing.Console(stderr=True, width=100))
    planned = study(FRAGILE).trials
    stored = [StoredTrial(number=1, key=planned[0].key, settings={}, status="done", seconds=30.0)]
    with Display(planned, stored, planned[1:]) as watch:
        assert watch.left == "about 2 min left"
        watch.started(planned[1])
        watch.finished(planned[1], Outcome(None, None, "it broke\nin two lines", 1.0))
        watch.started(planned[2])
        watch.finished(planned[2], Outcome(run_record(), "", None, 10.0))
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "2/6 trial 2 (0.2 badly): failed (it broke), about 2 min left",
        "3/6 trial 3 (0.2 as foreseen): done in 10 s, about 60 s left",
    ]
