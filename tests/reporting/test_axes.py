"""Which axes of a study are methods, which are conditions, and how methods compete."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from prunekit.compress.reporting.answers import answers
from prunekit.compress.reporting.axes import is_condition, is_method
from prunekit.compress.reporting.ranking import conclusion, ranking_table
from prunekit.compress.reporting.ranking import marked as best
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import explanation
from prunekit.compress.reporting.trials import Study, Trial

FIELDS = {
    "strategy": {
        "pp": {"prune.use": "pp"},
        "flap": {"prune.use": "flap", "calibration.sequences": 9},
        "full_batch_probing": {"prune.use": "full_batch_probing"},
    },
    "compensation": {"none": {}, "mean": {"prune.compensate": "mean"}},
    "text": {"far": {"calibration.bundled": "a"}, "near": {"calibration.bundled": "b"}},
    "ratios": {"low": {"prune.ratio": 0.2}, "high": {"prune": {"ratio": 0.4}}},
    "arm": {"a": {"prune.selector": {}, "prune.ratio": 0.4}, "b": {"prune": {"use": "pp"}}},
    "measured": {"short": {"prune.use": "pp", "evaluate.0.window": 64}},
    "empty": {"x": {}},
    "prune.selector.name": ["random", "spread"],
}
HARM = {"none": 1.0, "mean": 0.5}


@pytest.fixture
def study(run_result):
    """A study of strategies, compensations and texts, all of a free name, with the resolved compensation."""

    def make(strategies=("pp", "flap"), ratios=(0.4,), missing=()):
        trials = []
        for values in product(strategies, HARM, ("far", "near"), ratios):
            strategy, compensation, text, ratio = values
            settings = dict(zip(("strategy", "compensation", "text", "prune.ratio"), values, strict=True))
            harm = HARM[compensation] * {"pp": 1.0, "flap": 1.2}.get(strategy, 0.9) * (2 if text == "far" else 1)
            data = run_result(strategy, ratio, harm=harm)
            resolved = yaml.safe_dump({"prune": {"use": strategy, "compensate": {"name": compensation}}})
            done = values[:3] not in missing
            trials.append(Trial(len(trials) + 1, settings, *(("done", data, resolved) if done else ("waiting",))))
        axes = {n: list(dict.fromkeys(t.settings[n] for t in trials)) for n in trials[0].settings}
        text = yaml.safe_dump({"vary": {name: FIELDS[name] for name in ("strategy", "compensation", "text")}})
        return Study("Made", Path("my study.sqlite"), tuple(trials), axes, (), text)

    return make


@pytest.mark.parametrize(
    ("name", "method", "condition"),
    [
        ("prune.use", True, False), ("prune.skip_layers", True, False), ("prune.selector.name", True, False),
        ("strategy", True, False), ("compensation", True, False), ("arm", True, False), ("text", False, True),
        ("prune.ratio", False, False), ("ratio", False, False), ("ratios", False, False), ("measured", False, True),
        ("model.name", False, True), ("evaluate.0.window", False, True), ("calibration.length", False, True),
        ("seed", False, False), ("prune.seed", False, False), ("empty", False, True), ("unknown", False, True),
    ],
)  # fmt: skip
def test_what_sets_pruning_alone_is_a_method(name, method, condition):
    text = yaml.safe_dump({"vary": FIELDS})
    assert (is_method(name, text), is_condition(name, text)) == (method, condition)


@pytest.mark.parametrize("text", [None, "", "a: [", "- 1", "vary: 3", "vary: {compensation: [none]}"])
def test_a_study_that_says_nothing_of_its_axes_has_only_named_methods(text):
    assert [name for name in ("strategy", "compensation", "prune.compensate") if is_method(name, text)] == [
        "strategy", "prune.compensate"
    ]  # fmt: skip


def test_compensations_compete_and_texts_do_not(study):
    table = summarise(study())
    assert (table.methods, table.conditions) == (["strategy", "compensation"], ["text"])
    assert [len(block) for block in table.blocks()] == [4, 4]
    marked = {table.name(c) for c in table.configurations if (c.number, "perplexity.perplexity") in best(table)}
    assert marked == {"PP (mean, far)", "PP (mean, near)"}
    bold = "Bold: the best mean at the same ratio and text, and all that are not significantly worse"
    assert explanation(table)[-1].startswith(bold)


def test_each_axis_of_methods_has_an_answer_in_one_sentence(study):
    assert answers(summarise(study(ratios=(0.2, 0.4)))) == [
        "Compensation, against none: mean changes perplexity by -14.9% (PP) and -16.8% (FLAP).",
        "As a cross table: prunekit pivot my study.sqlite --rows strategy --columns compensation --by prune.ratio.",
    ]
    assert answers(summarise(study(["pp"]))) == []  # nothing but compensation varies, and it is ranked


def test_every_method_is_ranked_within_its_condition(study):
    table = summarise(study())
    head, rows = ranking_table(table, table.metric("perplexity.perplexity"))
    assert head[:2] == ["at", "configuration"]
    assert [row[:2] for row in rows] == [
        [f"text = {text}", name]
        for text in ("far", "near")
        for name in ("PP (mean)", "FLAP (mean)", "PP (none)", "FLAP (none)")
    ]
    said = conclusion(table)
    start = "At a requested ratio of 40%, where text = far, PP (mean; 33.60) has the lowest perplexity (dense 24.00), "
    assert said[0].startswith(start)
    assert any(one.startswith("Where text = near, PP (mean; 28.80) has the lowest perplexity") for one in said)


def test_missing_methods_are_named_whole(study):
    table = summarise(study(missing=[("pp", "mean", "near"), ("flap", "mean", "near")]))
    _, rows = ranking_table(table, table.metric("perplexity.perplexity"))
    assert [(row[0], row[1]) for row in rows if "not measured" in row] == [
        ("text = near", "PP (mean)"), ("text = near", "FLAP (mean)")
    ]  # fmt: skip
    assert "; not ranked: PP (mean) (not measured) and FLAP (mean) (not measured)" in " ".join(conclusion(table))


def test_calibrations_compete_where_nothing_else_does(study):
    source = study(["pp"])
    trials = tuple(
        replace(t, settings={"text": t.settings["text"]}) for t in source.trials if t.settings["compensation"] == "none"
    )
    table = summarise(replace(source, trials=trials, axes={"text": ["far", "near"]}))
    assert table.conditions == [] and [len(block) for block in table.blocks()] == [2]
    assert conclusion(table)[0].startswith("At a requested ratio of 40%, near (33.60) has the lowest perplexity")
