"""What an ablation says of its mistakes: each once, at its cause, and none that only follows from another."""

import re

import pytest
from prunekit.compress.ablation.display import brief
from prunekit.compress.ablation.published import Published, unmeasured
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.trials import StoredTrial
from prunekit.compress.cli import main
from prunekit.registry import SpecError
from typer.testing import CliRunner

from tests.run_records import run_record

FULL = "base: {prune: {use: pp, ratio: 0.4}}\n"
NO_RATIO = "base: {prune: {use: pp}}\n"


@pytest.fixture
def study(tmp_path):
    """Reads an ablation file with this text."""

    def of(text):
        (tmp_path / "study.yaml").write_text(text)
        return Study.load(tmp_path / "study.yaml")

    return of


@pytest.mark.parametrize(
    ("text", "only"),
    [
        (NO_RATIO + "vary: {prune.ratio: []}", "line 2: vary.prune.ratio: has no values"),
        (NO_RATIO + "vary: {prune.ratoi: [0.2], seed: [0, 1]}", "line 2: vary.prune.ratoi: there is no field"),
        ("base: {prune: {ratio: 0.4}}\nvary: {prune.us: [pp], seed: [0]}", "line 2: vary.prune.us: there is no field"),
        (FULL + "vary: {text: {a: {prune.rato: 0.2}, b: {prune.ratio: 0.4}}}", "vary.text.a.prune.rato: there is no"),
        (
            FULL + "vary: {prune.ratio: [], seed: [0]}\nexclude: [{prune.ratio: 0.2}]\n"
            "published: [{where: {prune.ratio: 0.2}, metric: perplexity.loss, value: 1, source: a}]",
            "vary.prune.ratio: has no values",
        ),
        (FULL + "vary: {text: {a: 3, b: {}}}\ntrials: [{text: a}]", "vary.text.a: expected the fields"),
        (FULL + "vary: [prune.use, pp]", "vary: write axes as a mapping: prune.use: [pp, flap] (found ['prune.use'"),
    ],
)
def test_a_broken_axis_is_the_only_mistake(study, text, only):
    with pytest.raises(SpecError) as caught:
        study(text)
    assert only in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ratio_that_nothing_sets_is_still_missed(study):
    with pytest.raises(SpecError, match=r"base\.prune\.ratio: is required"):
        study(NO_RATIO + "vary: {seed: [0, 1]}")


def test_numbers_have_no_near_matches(study):
    with pytest.raises(SpecError) as caught:
        study(FULL + "vary: {seed: [10, 11]}\nexclude: [{seed: 101}]")
    assert "seed has no value 101; there are 10, 11" in str(caught.value)


def test_a_missing_plugin_file_of_the_base_has_its_place(study, tmp_path):
    said = (
        r"study\.yaml: line 2: base\.plugins\.1: plugin file .*gone\.py does not exist; name a Python file, by a path"
    )
    (tmp_path / "mine.py").write_text("")
    base = "base:\n  plugins: [mine.py, gone.py]\n  prune: {use: pp, ratio: 0.4}\n"
    with pytest.raises(SpecError, match=said):
        study(base + "vary: {seed: [0, 1]}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("prune: {use: pp, ratio: 0.4}\nplugins: [gone.py]\n")
    said = r"study\.yaml: .*base\.yaml line 2: base\.plugins\.0: plugin file .*/folder/gone\.py .* starts at .*/folder$"
    with pytest.raises(SpecError, match=said):
        study("base: folder/base.yaml\nvary: {seed: [0, 1]}")


PUBLISHED = "published: [{{where: {{{}}}, metric: perplexity.loss, value: 1, source: a}}]\n"


def test_published_values_may_name_fields_that_are_no_axis(study):
    axes = FULL + "vary: {seed: [0, 1]}\ntrials: [{prune.ratio: 0.3}]\n"
    for where in ("prune.ratio: 0.4", "calibration.sequences: 32", "seed: 0, prune.ratio: 0.3", "prune.use: pp"):
        assert study(axes + PUBLISHED.format(where)).published[0].where
    with pytest.raises(SpecError, match=r"published\.0\.where: no trial has all of these values"):
        study(axes + PUBLISHED.format("calibration.sequences: 33"))
    with pytest.raises(SpecError, match=r"published\.0\.where\.calibration\.sequenes: no axis is called"):
        study(axes + PUBLISHED.format("calibration.sequenes: 32"))


def test_a_value_that_its_evaluator_does_not_have_is_told():
    entries = [
        Published(where={}, metric=metric, value=1, source="a")
        for metric in ("perplexity.perplexty", "perplexity.loss", "latency.prefil")
    ]
    measured = {"evaluator": "perplexity", "label": "perplexity", "pruned": {"perplexity": 1.0, "loss": 2.0}}
    trial = StoredTrial(number=1, key="", settings={}, status="done", result=run_record(metrics=[measured]))
    said = list(unmeasured(entries, [trial]))
    assert said == [
        "published.0.metric: perplexity has no value perplexty (did you mean 'perplexity'?); it has perplexity, loss"
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RuntimeError: shapes differ (a.py line 3)\nmore", "RuntimeError"),
        ("model.device: 'gpu' is not a device", "model.device: 'gpu' is not a device"),
        ("model.name: folder x does not exist; name a folder with config.json, or a hub id", None),
    ],
)
def test_errors_in_brief(error, said):
    assert len(brief(error)) <= 60
    assert brief(error) == said or (said is None and brief(error).endswith(" ...") and error.startswith("model.name"))


def test_validate_knows_ablations_and_run_points_to_ablate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(FULL + "vary: {prune.ratio: [0.2, 0.4], seed: [0, 1]}")
    result = CliRunner().invoke(main.app, ["validate", "study.yaml"])
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[:2] == ["study.yaml: valid ablation, 4 trials", "1  0.2 seed 0"]
    assert len(lines) == 6 and lines[-1].startswith("not looked at: the weights")
    result = CliRunner().invoke(main.app, ["run", "study.yaml"])
    assert result.exit_code == 2
    assert re.search(r"study\.yaml is an ablation file; use prunekit ablate study\.yaml", result.stderr)
    (tmp_path / "study.yaml").write_text(FULL + "vary: {prune.ratoi: [0.2]}")
    assert CliRunner().invoke(main.app, ["validate", "study.yaml"]).exit_code == 2


def test_ablate_points_to_run(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("prune: {use: pp, ratio: 0.4}")
    result = CliRunner().invoke(main.app, ["ablate", str(tmp_path / "pipeline.yaml")])
    assert result.exit_code == 2 and "pipeline.yaml is a pipeline file; use prunekit run " in result.stderr
