"""Which axes of a study compete and which are conditions, and what is said of many contenders."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.axis_kinds import is_circumstance, is_method
from prunekit.compress.reporting.figures import Plot
from prunekit.compress.reporting.findings import Findings, Trial
from prunekit.compress.reporting.page import html
from prunekit.compress.reporting.tables import explanation, markdown
from prunekit.compress.reporting.verdict import bounds, conclusion, findings_in_detail

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
def study(run_data):
    """A study of strategies, compensations and texts, all of a free name, with the resolved compensation."""

    def make(strategies=("pp", "flap"), ratios=(0.4,), missing=()):
        trials = []
        for values in product(strategies, HARM, ("far", "near"), ratios):
            strategy, compensation, text, ratio = values
            settings = dict(zip(("strategy", "compensation", "text", "prune.ratio"), values, strict=True))
            harm = HARM[compensation] * {"pp": 1.0, "flap": 1.2}.get(strategy, 0.9) * (2 if text == "far" else 1)
            data = run_data(strategy, ratio, harm=harm)
            resolved = yaml.safe_dump({"prune": {"use": strategy, "compensate": {"name": compensation}}})
            done = values[:3] not in missing
            trials.append(Trial(len(trials) + 1, settings, *(("done", data, resolved) if done else ("waiting",))))
        axes = {n: list(dict.fromkeys(t.settings[n] for t in trials)) for n in trials[0].settings}
        text = yaml.safe_dump({"vary": {name: FIELDS[name] for name in ("strategy", "compensation", "text")}})
        return Findings("Made", Path("my study.sqlite"), tuple(trials), axes, (), text)

    return make


@pytest.mark.parametrize(
    ("name", "method", "circumstance"),
    [
        ("prune.use", True, False), ("prune.skip_layers", True, False), ("prune.selector.name", True, False),
        ("strategy", True, False), ("compensation", True, False), ("arm", True, False), ("text", False, True),
        ("prune.ratio", False, False), ("ratio", False, False), ("ratios", False, False), ("measured", False, True),
        ("model.name", False, True), ("evaluate.0.window", False, True), ("calibration.length", False, True),
        ("seed", False, False), ("prune.seed", False, False), ("empty", False, True), ("unknown", False, True),
    ],
)  # fmt: skip
def test_what_sets_pruning_alone_is_a_method(name, method, circumstance):
    known = Findings("", Path("s"), (), {}, (), yaml.safe_dump({"vary": FIELDS}))
    assert (is_method(name, known), is_circumstance(name, known)) == (method, circumstance)


@pytest.mark.parametrize("text", [None, "", "a: [", "- 1", "vary: 3", "vary: {compensation: [none]}"])
def test_a_study_that_says_nothing_of_its_axes_has_only_named_methods(text):
    known = Findings("", Path("s"), (), {}, (), text)
    assert [name for name in ("strategy", "compensation", "prune.compensate") if is_method(name, known)] == [
        "strategy", "prune.compensate"
    ]  # fmt: skip


def test_compensations_compete_and_texts_do_not(study):
    table = tabulate(study())
    assert (table.methods, table.circumstances) == (["strategy", "compensation"], ["text"])
    assert [len(block) for block in table.blocks()] == [4, 4]
    marked = {table.name(c) for c in table.configurations if (id(c), "perplexity.perplexity") in table.best}
    assert marked == {"PP, mean, far", "PP, mean, near"}
    assert explanation(table)[-1].startswith("Bold: the best mean at the same ratio and text, among")


def test_the_best_is_compared_with_pp_without_compensation(study):
    said = [one for one in findings_in_detail(tabulate(study())) if "perplexity" in one]
    assert len(said) == 2 and said[0].startswith("40%: with text far, PP, mean has the lowest perplexity (33.60), ")
    assert "the next, FLAP, mean (95%" in said[0]
    assert "; the best is 22% below PP, none (43.20), which does not compensate" in said[0]
    better = study(["pp", "wanda_sp"])
    assert "% below PP, none (43.20), which" in conclusion(tabulate(better))  # though Wanda-sp without is better
    unprobed = [t.resolved + "prune.selector: null\n" for t in better.trials]
    static = tuple(replace(t, resolved=r) for t, r in zip(better.trials, unprobed, strict=True))
    assert "% below Wanda-sp, none (" in conclusion(tabulate(replace(better, trials=static)))
    others = [one for one in findings_in_detail(tabulate(study(["flap", "wanda_sp"]))) if "perplexity" in one]
    assert "below Wanda-sp, none (" in others[0]  # no PP: the best without


def test_a_reference_is_named_once_and_only_where_compensation_varies(study):
    two = study(["pp"])
    assert all("does not compensate" not in one for one in findings_in_detail(tabulate(two)))  # it is the next
    alike = replace(study(), trials=tuple(replace(t, resolved=None) for t in study().trials))
    assert all("does not compensate" not in one for one in findings_in_detail(tabulate(alike)))


def test_missing_methods_are_named_whole(study):
    said = findings_in_detail(tabulate(study(missing=[("pp", "mean", "near"), ("flap", "mean", "near")])))
    far, near = (one for one in said if "perplexity" in one)
    assert "not measured" not in far and "; PP, mean and FLAP, mean are not measured." in near
    assert "with text near, PP, none has the lowest perplexity" in near


def test_bounds_are_named_by_their_strategy(study):
    said = bounds(tabulate(study(["pp", "full_batch_probing"])))
    assert said.startswith("full-batch probing computes more than the dense model")


def test_a_study_of_one_ratio_points_to_the_cross_table(study):
    table = tabulate(study())
    line = "prunekit pivot 'my study.sqlite' --rows strategy --columns compensation"
    assert f"`{line}`" in markdown(table, []) and "--columns compensation</code>" in html(table, [])
    drawn = Plot("perplexity-perplexity-cost-flops_ratio", "", "", b"", b"")
    assert "prunekit pivot" not in markdown(table, [drawn])
    assert "prunekit pivot" not in markdown(tabulate(study(ratios=(0.2, 0.4))), [])


def test_calibrations_compete_where_nothing_else_does(study):
    findings = study(["pp"])
    trials = tuple(
        replace(t, settings={"text": t.settings["text"]})
        for t in findings.trials
        if t.settings["compensation"] == "none"
    )
    table = tabulate(replace(findings, trials=trials, axes={"text": ["far", "near"]}))
    assert table.circumstances == [] and [len(block) for block in table.blocks()] == [2]
    assert conclusion(table).startswith("At 40% pruning, near has the lowest perplexity")
