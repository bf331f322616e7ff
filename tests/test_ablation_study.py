"""Ablation files: the trials that follow from one, their keys, and every mistake at once with its place."""

from pathlib import Path

import pytest
from prunekit.compress.ablation.study import Study
from prunekit.registry import SpecError

pytestmark = pytest.mark.smoke

BASE = "base: {calibration: {sequences: 4, length: 64}, prune: {skip_layers: [0]}, evaluate: [perplexity]}\n"
FULL = "base: {prune: {use: pp, ratio: 0.4}}\n"


@pytest.fixture
def write(tmp_path):
    """Writes an ablation file and returns its path."""

    def file(text: str, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return file


@pytest.fixture
def message(write):
    """The message that a file is refused with."""

    def of(text: str, settings=()) -> str:
        with pytest.raises(SpecError) as caught:
            Study.load(write(text), settings)
        return str(caught.value)

    return of


GRID = """\
base: {calibration: {sequences: 4, length: 64}, prune: {skip_layers: [0]}, evaluate: [perplexity]}
vary:
  prune.use: [pp, magnitude]
  prune.ratio: [0.2, 0.4]
  text:
    other: {calibration.bundled: docstrings-calibration, evaluate.0.window: 64}
    same: {}
  seed: [0, 1]
exclude: [{prune.use: magnitude, text: same}]
trials: [{prune.use: flap, prune.ratio: 0.3, text: other}]
"""


def test_the_grid_without_excludes_and_the_listed_trials_in_order(write):
    study = Study.load(write(GRID))
    assert [trial.label for trial in study.trials] == [
        *(f"pp {ratio} {text} seed {seed}" for ratio in (0.2, 0.4) for text in ("other", "same") for seed in (0, 1)),
        *(f"magnitude {ratio} other seed {seed}" for ratio in (0.2, 0.4) for seed in (0, 1)),
        "flap 0.3 other",
    ]
    assert [trial.number for trial in study.trials] == list(range(1, 14))
    assert len({trial.key for trial in study.trials}) == 13
    first, third = study.trials[0], study.trials[2]
    assert first.settings == {"prune.use": "pp", "prune.ratio": 0.2, "text": "other", "seed": 0}
    assert (first.spec.calibration.bundled, first.spec.evaluate[0].window) == ("docstrings-calibration", 64)
    assert (third.spec.calibration.bundled, third.spec.calibration.sequences) == ("reference-calibration", 4)
    assert (study.trials[1].spec.seed, study.trials[1].spec.calibration.seed) == (1, 1)
    assert study.axes["prune.use"] == ["pp", "magnitude", "flap"]
    assert study.axes["prune.ratio"] == [0.2, 0.4, 0.3]
    assert study.title == "study"


def test_strategies_with_different_options(write):
    study = Study.load(
        write(
            "base: {prune: {ratio: 0.4}}\nvary:\n  method:\n"
            "    pp: {prune.use: pp, prune.selector.rows: 0.1, prune.merger: {name: fixed_ratio, probe: 0.3}}\n"
            "    flap: {prune.use: flap, prune.scorer.weighted: false}\n"
            "    once: {prune.use: pp, prune.selector: null, prune.merger: null}\n"
            "  prune.skip_layers: [[0], []]\n"
        )
    )
    pp, _, flap, _, once, _ = (trial.spec.prune for trial in study.trials)
    assert (pp.selector.rows, pp.merger.probe, flap.scorer.weighted, once.dynamic) == (
        0.1,
        0.3,
        False,
        False,
    )
    assert [trial.spec.prune.skip_layers for trial in study.trials[:2]] == [(0,), ()]
    assert study.trials[1].label == "pp skip_layers []"


def test_any_field_and_whole_sections_can_vary(write):
    study = Study.load(
        write(
            FULL + "vary:\n  prune.selector.rows: [0.1, 1.0]\n  evaluate.1: [{name: cost, length: 32}, latency]\n"
            "  calibration.length: [64]\n  calibration: [{sequences: 3}, {bundled: docstrings-calibration}]\n"
        )
    )
    assert [trial.spec.prune.selector.rows for trial in study.trials[::4]] == [0.1, 1.0]
    assert [evaluator.name for evaluator in study.trials[2].spec.evaluate] == ["perplexity", "latency"]
    assert [trial.spec.calibration.sequences for trial in study.trials[:2]] == [3, 32]
    assert {trial.spec.calibration.length for trial in study.trials} == {64}


def test_the_base_may_be_a_file_of_its_own_with_its_own_paths(write, tmp_path):
    write("prune: {use: pp, ratio: 0.4}\ncalibration: {file: words.txt}\noutput: {trace: true}\n", "bases/pp.yaml")
    write("words", "bases/words.txt")
    trial = Study.load(write("base: bases/pp.yaml\nvary: {prune.ratio: [0.2]}")).trials[0]
    assert trial.spec.calibration.file == tmp_path / "bases" / "words.txt"
    assert not trial.spec.output.trace


def test_the_key_is_of_the_content_and_not_of_the_place(write, tmp_path):
    text = "base: {prune: {ratio: 0.4}, calibration: {file: words.txt}}\nvary: {prune.use: [pp, flap]}\n"

    def keys(folder: str, words: str = "words", study: str = text) -> list[str]:
        write(words, f"{folder}/words.txt")
        return [trial.key for trial in Study.load(write(study, f"{folder}/study.yaml")).trials]

    here = keys("here")
    assert keys("there") == here
    assert keys("here", study=text.replace("ratio: 0.4", "ratio: 0.4, rescale: exact")) == here  # as by default
    assert keys("here", study=text + "title: another\n") == here
    assert not set(keys("there", "other words")) & set(here)
    assert not set(keys("here", study=text.replace("0.4", "0.3"))) & set(here)


def test_a_task_folder_and_a_model_folder_are_part_of_the_key(write):
    files = ("model/config.json", "model/model.safetensors", "tasks/own.yaml", "tasks/own.jsonl")
    for name in files:
        write("{}", name)
    tasks = "{name: zero_shot, tasks: own, task_folder: tasks}"
    base = f"{{model: {{name: model}}, prune: {{use: pp, ratio: 0.2}}, evaluate: [{tasks}]}}"
    path = write(f"base: {base}\ntrials: [{{}}]")
    seen = {Study.load(path).trials[0].key}
    for name in files:
        write("{} ", name)
        seen.add(Study.load(path).trials[0].key)
    assert len(seen) == 1 + len(files)


def test_settings_change_base_and_axes(write):
    path = write(FULL + "vary: {prune.ratio: [0.2, 0.4], seed: [0, 1]}")
    study = Study.load(path, ["calibration.sequences=3", "vary.prune.ratio=[0.1]", "vary.seed=null", "title=Small"])
    assert [trial.label for trial in study.trials] == ["0.1"]
    assert (study.trials[0].spec.calibration.sequences, study.title) == (3, "Small")


def test_an_axis_that_is_cut_short_by_a_setting_needs_no_other_change(write):
    text = (
        "vary: {prune.ratio: [0.2, 0.4], seed: [0, 1]}\nexclude: [{prune.ratio: 0.4, seed: 1}]\n"
        "published: [{where: {prune.ratio: 0.4}, metric: perplexity.loss, value: 1, source: here}]\n"
    )
    study = Study.load(write(FULL + text), ["vary.prune.ratio=[0.2]"])
    assert [trial.label for trial in study.trials] == ["0.2 seed 0", "0.2 seed 1"]


MISTAKES = """\
titel: x
base:
  calibration: {sequences: 0}
  prune: {skip_layers: [0], selector: {rows: 0.2}}
vary:
  prune.use: [pp, flap, ppp]
  prune.ratio: [0.2, 40, 50]
  prune.ratoi: [1]
  rows: [1, 2]
  prune.merger: []
  output.dir: [a]
  evaluate.4.window: [2]
  text:
    a: {calibration.bundled: refrence-calibration}
    b: 3
  calibration.seed: 3
exclude: [{prune.use: magnitude}, {prune.rato: 3}, {}]
trials: [{prune.use: pp, prune.ratio: 0.3, x: 3}]
published:
  - {where: {prune.use: p}, metric: perplexity.loss, value: 16.8, source: a}
  - {where: {prune.use: pp}, metric: perplexity.loss, value: high, source: a}
  - {where: {}, metric: perplexity.loss, value: 16.8}
"""


def test_keys_of_the_base_beside_it(message):
    found = message("base: {prune: {use: pp}}\ncalibration: {sequences: 4}\nvary: {prune.ratio: [0.2]}\n")
    assert "line 2: calibration: is a key of the base; write it under base: base: {calibration: ...}" in found
    found = message("plugins: [mine.py]\nbase: {prune: {use: mine}}\nvary: {prune.ratio: [0.2]}\n")
    assert "line 1: plugins: is a key of the base; write base: {plugins: [...]}" in found and "'mine'" not in found


def test_all_mistakes_at_once_with_their_lines(message):
    found = message(MISTAKES)
    expected = [
        "21 mistakes",
        "line 1: titel: unknown key (did you mean 'title'?",
        "line 3: base.calibration.sequences: should be greater than or equal to 1 (found 0)",
        "line 6: vary.prune.use.1: flap: prune.selector: this strategy has no selector",
        "go on an axis of a free name, such as method: {a:",
        "line 6: vary.prune.use.2: no Strategy is called 'ppp' (did you mean 'pp'?",
        "line 7: vary.prune.ratio.1: 40: the ratio is the share that is cut",
        "line 7: vary.prune.ratio.2: 50: the ratio is the share that is cut",
        "line 8: vary.prune.ratoi: there is no field 'prune.ratoi' (did you mean 'prune.ratio'?",
        "line 9: vary.rows: there is no field 'rows' (did you mean 'prune.selector.rows'?",
        "line 10: vary.prune.merger: has no values, so the grid is empty",
        "line 11: vary.output.dir: cannot be varied",
        "line 12: vary.evaluate.4.window.0: 2: evaluate is a list of 2, there is no place 4",
        "line 14: vary.text.a: calibration.bundled: no bundled text is called 'refrence-calibration' (did you mean",
        "line 15: vary.text.b: expected the fields that the label sets",
        "line 16: vary.calibration.seed: expected a list of values (found 3); write [3]",
        "line 17: exclude.0.prune.use: prune.use has no value magnitude; there are pp, flap, ppp",
        "line 17: exclude.1.prune.rato: no axis is called 'prune.rato' (did you mean 'prune.ratio'?",
        "line 17: exclude.2: would leave out the whole grid",
        "line 18: trials.0.x: there is no field 'x'",
        "line 20: published.0.where.prune.use: prune.use has no value p (did you mean 'pp'?",
        "line 21: published.1.value: should be a number, not text",
        "line 22: published.2.source: is required",
    ]
    for line in expected:
        assert line in found, f"{line}\nis not in\n{found}"


def test_the_same_mistake_in_thirty_trials_is_one_line(message):
    found = message(
        FULL.replace("ratio: 0.4", "skip_layers: [0]")
        + "vary: {prune.ratio: [0.1, 0.2, 1.5], prune.merger.probe: [1, 7], seed: "
        f"{list(range(30))}, prune.merger.name: [fixed_ratio]}}"
    )
    assert found.splitlines()[0].endswith("2 mistakes")
    assert found.count("1.5: the ratio is the share that is cut") == 1
    assert "(trials 121-180)" in found
    assert "merger.probe.1: should be less than or equal to 1 (found 7) (trials 31-60, 91-120, 151-180)" in found


def test_two_values_that_do_not_go_together_are_named_together(message):
    found = message(
        "base: {prune: {use: pp, ratio: 0.4}}\nvary: {prune.scorer: [ppsp, magnitude], prune.merger: "
        "[probe_only, null], prune.selector: [whole_batch, null]}"
    )
    assert "merger.0: probe_only with prune.selector null: prune: deciding per batch needs both a selector" in found
    assert "vary.prune.merger.1: null with prune.selector whole_batch: prune: a selector needs a merger" in found
    assert found.index("exclude (trials 2, 6)") < found.index("exclude (trials 3, 7)")
    assert "magnitude with prune.merger probe_only and prune.selector whole_batch: prune: scorer magnitude" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["ablation file", "is empty", "the smallest ablation file is"]),
        ("vary: {prune.ratio: [0.2]}", ["base: is required: a pipeline or a pipeline file's path, such as"]),
        ("base: none.yaml\nvary: {prune.ratio: [0.2]}", ["yaml: line 1: base: there is no pipeline file", "none.yaml"]),
        (FULL, ["no trials; vary a field"]),
        (FULL + "vary: {}", ["no trials; vary a field"]),
        (FULL + "vary: []", ["line 2: vary: write axes as a mapping: prune.use: [pp, flap]"]),
        (FULL + "exclude: {a: 1}\nvary: {seed: [1]}", ["line 2: exclude: should be a valid list"]),
        (FULL + "vary: {text: {}}", ["vary.text: has no labels"]),
        (FULL + "vary: {seed: [1, 1]}", ["vary.seed.1: 1 is given twice"]),
        (FULL + "vary: {seed: [1]}\nexclude: [{seed: 1}]", ["exclude: no trial of the grid is left"]),
        (FULL + "vary: {text: {a: {}, b: {seed: 0}}}", ["vary: trial 2 (b) is the same pipeline as trial 1 (a)"]),
        (FULL + "vary: {seed: [0, 1]}\ntrials: [{seed: 1}]", ["line 3: trials.0: trial 3", "same pipeline as trial 2"]),
        (FULL + "vary: {seed: [1], x: {a: {seed: 2}}}", ["vary.x: seed is set by the axis seed too"]),
        (FULL + "vary: {text: {a: {seed: 2}}}\ntrials: [{text: b}]", ["trials.0.text: text has no value b"]),
        (FULL + "vary: {plugins: [[a]]}", ["vary.plugins: cannot be varied"]),
        (FULL + f"vary: {{seed: {list(range(200))}, calibration.seed: {list(range(200))}}}", ["40,000 trials"]),
        (
            FULL + "vary: {seed: [1]}\npublished: [{where: {}, metric: costs.flops, value: 1, source: a}]",
            ["published.0.metric: no evaluator of its trials is called 'costs' (did you mean 'cost'?"],
        ),
        (
            FULL + "vary: {seed: [1]}\npublished: [{where: {}, metric: x, value: 1, source: a}]",
            ["published.0.metric: write EVALUATOR.VALUE"],
        ),
        (
            FULL + "vary: {seed: [1, 2], calibration.seed: [3, 4]}\nexclude: [{seed: 1, calibration.seed: 3}]\n"
            "published: [{where: {seed: 1, calibration.seed: 3}, metric: perplexity.loss, value: 1, source: a}]",
            ["published.0.where: no trial has all of these values"],
        ),
    ],
)
def test_files_that_cannot_be_used(message, text, words):
    found = message(text)
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("vary.prune.rato=[0.1]", "--set vary.prune.rato: there is no field 'prune.rato' (did you mean"),
        ("calibraton.seed=1", "there is no 'calibraton.seed'"),
        ("vary.seed=[", "not valid YAML"),
        ("seed=3", "--set base.seed: every trial sets seed; change its axis instead"),
        ("calibration.sequences=0", "--set base.calibration.sequences: should be greater"),
    ],
)
def test_settings_that_cannot_work(message, setting, words):
    found = message(FULL + "vary: {seed: [0, 1]}", [setting])
    assert words in found, found


def test_mistakes_in_a_base_of_its_own_name_that_file(write, message, tmp_path):
    write("prune: {use: pp}\n\ncalibration: {sequenes: 3}\n", "pp.yaml")
    found = message("base: pp.yaml\nvary: {prune.ratio: [0.1, 3]}")
    assert f"{tmp_path / 'pp.yaml'} line 3: base.calibration.sequenes: unknown key (did you mean 'sequences'?" in found
    assert "line 2: vary.prune.ratio.1: 3: the ratio" in found
