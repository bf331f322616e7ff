"""Cross tables: what a cell is the mean of, what it is relative to, and which cells stand out."""

from dataclasses import replace
from itertools import product
from math import exp, fsum, log
from pathlib import Path

import pandas as pd
import pytest
import yaml
from prunekit.compress.reporting.pivot import cross, join, shared_settings
from prunekit.compress.reporting.pivot_tables import cell_lines, heading, measure, notes
from prunekit.compress.reporting.trials import Study, Trial
from prunekit.compress.runs.records import EvaluatorResult

DENSE = {"far": 20.0, "near": 30.0}
FIELDS = {
    "strategy": {"pp": {"prune.use": "pp"}, "flap": {"prune.use": "flap"}},
    "compensation": {"none": {}, "mean": {"prune.compensate": "mean"}},
    "text": {"far": {"calibration.bundled": "docstrings-calibration"}, "near": {}},
}


@pytest.fixture
def study(outcome, run_result):
    """A study of two strategies, compensations, texts and seeds, whose perplexities ``value`` gives by setting."""

    def make(value, without=(), statuses=None, name="study", strategies=("pp", "flap"), seeds=(0, 1), **more):
        axes = {"strategy": list(strategies), "compensation": ["none", "mean"], **more,
                "text": ["far", "near"], "seed": list(seeds)}  # fmt: skip
        trials = []
        for values in product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            if any(entry.items() <= settings.items() for entry in without):
                continue
            found = value(**settings)
            dense = DENSE[settings["text"]]
            metrics = [
                outcome("perplexity", {"perplexity": dense, "loss": log(dense)}, {"perplexity": found, "loss": 3.0}),
                outcome("zero_shot", {"mean": 0.6, "boolq": 0.6}, {"mean": 0.6 - found / 1000, "boolq": 0.5}),
                outcome("prr", {}, {"prr": found - 25}),
            ]
            found = [EvaluatorResult(**metric) for metric in metrics]
            data = run_result(settings["strategy"]).model_copy(update={"metrics": found})
            number = len(trials) + 1
            status = (statuses or {}).get(number, "done")
            resolved = yaml.safe_dump({"prune": {"use": settings["strategy"], "ratio": 0.4}, "seed": settings["seed"]})
            trials.append(Trial(number, settings, status, *((data, resolved) if status == "done" else ())))
        text = yaml.safe_dump({"vary": {**FIELDS, "seed": list(seeds)}})
        return Study("Made", Path(f"{name}.sqlite"), tuple(trials), axes, (), text)

    return make


def tables(source, rows="strategy", columns="compensation", relative="dense", by=None, metric=None):
    grid = join(source if isinstance(source, list) else [source])
    return cross(grid, grid.question(rows, columns, by, metric, relative))


def values(table, *places):
    return [table.cells[place]["value"] for place in places or table.cells]


def counts(table):
    return [cell["trials"] for cell in table.cells.values()]


def smooth(strategy, compensation, text, seed, **_):
    """Perplexity by setting, each setting a factor."""
    factor = {"pp": 1.2, "flap": 1.5}.get(strategy, 2.0) * {"none": 1.0, "mean": 0.9}[compensation]
    return DENSE[text] * factor * (1.1 if text == "far" else 1.0) * (1 + 0.01 * seed)


def test_a_cell_is_the_geometric_mean_of_each_trials_ratio_to_its_own_dense_model(study):
    (table,) = tables(study(smooth))
    ratios = [smooth("pp", "mean", text, seed) / DENSE[text] for text in DENSE for seed in (0, 1)]
    cell = table.cells[0, 1]
    assert cell["value"] == pytest.approx(exp(fsum(map(log, ratios)) / 4))
    assert (cell["least"], cell["largest"], cell["trials"]) == (
        pytest.approx(min(ratios)), pytest.approx(max(ratios)), 4
    )  # fmt: skip
    assert (table.rows, table.columns, table.settings, table.left_out) == (["pp", "flap"], ["none", "mean"], 4, 0)
    assert table.over == {"text": ["far", "near"], "seed": [0, 1]}
    assert notes(table)[0] == (
        "Averaged over text (far, near); seed (0, 1): 4 settings in each cell, 16 trials in 4 cells."
    )
    assert cell_lines(table, (0, 1))[1:] == [f"{min(ratios):.3f} to {max(ratios):.3f}", "n 4", "40.0% removed"]


def test_accuracies_and_losses_are_mean_differences(study):
    (table,) = tables(study(smooth), metric="zero_shot.mean")
    expected = [-smooth("flap", "none", text, seed) / 1000 for text in DENSE for seed in (0, 1)]
    assert values(table, (1, 0)) == pytest.approx([fsum(expected) / 4])
    assert cell_lines(table, (1, 0))[0] == f"{100 * fsum(expected) / 4:+.1f} ◇"
    assert table.marks.best == ((0, 1),) and measure(table.question) == "zero-shot, difference in points from dense"
    (task,) = tables(study(smooth), metric="zero_shot.boolq")
    assert values(task, (0, 0)) == pytest.approx([-0.1]) and task.marks.best == ()  # all are the same
    (loss,) = tables(study(smooth), metric="perplexity.loss")
    assert values(loss, (0, 0)) == pytest.approx([3 - (log(20) + log(30)) / 2])


def test_what_may_be_negative_is_a_difference(study):
    (table,) = tables(study(smooth), metric="prr.prr", relative="compensation=none")
    none, mean = values(table, (0, 0), (0, 1))
    assert none == 0 and mean < 0 and "difference from" in measure(table.question)


def test_the_reference_is_the_trial_with_otherwise_the_same_settings(study):
    (table,) = tables(study(smooth), relative="compensation=none")
    assert values(table) == pytest.approx([1, 0.9, 1, 0.9])
    assert table.cells[0, 1]["least"] == pytest.approx(table.cells[0, 1]["largest"])
    (both,) = tables(study(smooth), relative="strategy=pp,compensation=none")
    assert values(both) == pytest.approx([1, 0.9, 1.25, 1.125])
    assert "the largest gain over its own reference" in " ".join(notes(table))
    assert "own reference" not in " ".join(notes(both))


def test_all_cells_are_averaged_over_the_settings_that_all_have(study):
    # Trial 1 is pp, none, far, seed 0: it is out of every cell's mean, and of those of its own as a reference.
    (table,) = tables(study(smooth, statuses={1: "failed"}))
    assert counts(table) == [3, 3, 3, 3] and (table.settings, table.left_out) == (3, 1)
    ratios = [smooth("flap", "mean", text, seed) / DENSE[text] for text, seed in (("far", 1), ("near", 0), ("near", 1))]
    assert values(table, (1, 1)) == pytest.approx([exp(fsum(map(log, ratios)) / 3)])
    assert cell_lines(table, (0, 0))[-2] == "n 3, 1 failed" and cell_lines(table, (0, 1))[-2] == "n 3"
    assert notes(table)[0].endswith("; 1 of 4 settings are left out, as some cells lack them.")
    (table,) = tables(study(smooth, statuses={1: "waiting"}), relative="compensation=none")
    assert table.cells[0, 1]["without a reference"] == 1 and table.cells[0, 0]["waiting"] == 1
    assert cell_lines(table, (0, 1))[-2] == "n 3, 1 without a reference"


def test_empty_cells_stay_empty_and_narrow_nothing(study):
    (table,) = tables(study(smooth, without=[{"strategy": "flap", "compensation": "mean"}]))
    assert cell_lines(table, (1, 1)) == ["-"]
    assert table.settings == 4 and table.left_out == 0
    infinite = study(smooth)
    for trial in infinite.trials:
        if (trial.settings["strategy"], trial.settings["compensation"]) == ("flap", "mean"):
            trial.metric("perplexity").pruned["perplexity"] = "inf"
    (table,) = tables(infinite)
    assert cell_lines(table, (1, 1)) == ["-", "4 without a finite value"]


def test_cells_that_share_nothing_are_left_out_and_named(study):
    def shared(**cells):
        return list(
            shared_settings(pd.DataFrame({name: pd.Series(1.0, index=list(has)) for name, has in cells.items()}))
        )

    assert shared(x="abc", y="ab") == ["x", "y"] and shared(x="ab", y="ab", z="c") == ["x", "y"]
    without = [{"strategy": "pp", "text": "far"}, {"strategy": "flap", "compensation": "mean", "text": "near"},
               {"strategy": "flap", "compensation": "none", "text": "far"}]  # fmt: skip
    (table,) = tables(study(smooth, without=without))
    assert counts(table) == [2, 2, 2, 0] and table.cells[1, 1]["not_shared"] == 2
    assert cell_lines(table, (1, 1)) == ["-", "shares no setting with the others"]


def test_by_gives_a_table_for_each_value_and_one_over_all(study):
    found = tables(study(smooth), by="text")
    assert [heading(table) for table in found] == ["text far", "text near", "Over all of text"]
    assert [len(table.trials) for table in found] == [8, 8, 16] and found[0].over == {"seed": [0, 1]}
    assert values(found[0], (0, 0)) == pytest.approx([1.1 * value for value in values(found[1], (0, 0))])


def test_seeds_are_not_units_of_the_test(study):
    def value(strategy, text, seed, **_):
        better = {"far": 0.9, "near": 0.99}[text]  # certain with every seed, uncertain over texts
        return 30 * (better if strategy == "pp" else 1.0) * (1 + 0.0001 * seed)

    (table,) = tables(study(value, seeds=range(8)))
    assert (table.marks.tested, table.marks.unit, table.marks.axes) == (2, "group", ("text",))
    assert table.marks.best == ((0, 0), (0, 1)) and table.marks.ties == ((1, 0), (1, 1))
    assert "over 2 groups (text, each the mean over seed), very few, includes 0" in notes(table)[1]


def test_what_all_groups_agree_on_is_significant(study):
    (table,) = tables(study(smooth))
    assert table.marks.best == ((0, 1),) and table.marks.ties == ()
    assert cell_lines(table, (0, 1))[0].endswith(" ◆")


def test_one_group_is_tested_by_its_seeds_and_says_so(study):
    def value(strategy, compensation, seed, **_):
        return 25.0 + {"pp": 0.0, "flap": 0.1}[strategy] * (-1) ** seed + 5 * (compensation == "none") + 0.01 * seed

    without = [{"text": "far"}]
    (table,) = tables(study(value, without, seeds=range(3)))
    assert (table.marks.tested, table.marks.unit) == (3, "seed")
    assert table.marks.best == ((0, 1),) and table.marks.ties == ((1, 1),)
    assert "3 seeds (seed) includes 0; seeds show nothing about other models and texts" in notes(table)[1]
    (table,) = tables(study(value, without, seeds=range(2)))
    assert table.marks.tested == 0 and table.marks.ties == ()
    assert "allow no test" in notes(table)[1]


def test_ratios_texts_and_models_have_a_best_each(study):
    source = study(lambda strategy, **s: smooth(strategy, **s) * (1 + s["ratio"]), ratio=[0.2, 0.4])
    (table,) = tables(source, columns="ratio")
    assert table.marks.best == ((0, 0), (0, 1)) and table.marks.apart == ("ratio",)
    assert "◆ best mean of each ratio" in notes(table)[1]
    (table,) = tables(source, columns="text")
    assert table.marks.best == ((0, 0), (0, 1)) and table.marks.apart == ("text",)


def test_what_computes_more_than_the_dense_model_is_not_ranked(study, outcome):
    source = study(smooth, strategies=("full_batch_probing", "pp", "flap"))
    for trial in source.trials:
        if trial.settings["strategy"].startswith("full"):
            trial.metric("perplexity").pruned["perplexity"] *= 0.5
    (table,) = tables(source)
    assert table.marks.best == ((1, 1),) and table.marks.above_dense == ((0, 0), (0, 1))
    assert cell_lines(table, (0, 0))[0].endswith(" †") and "† computes no less than the dense model" in notes(table)[1]
    for trial in source.trials:  # measured operations count more than the name
        share = 1.2 if trial.settings["strategy"] == "pp" else 0.7
        trial.result.metrics.append(
            EvaluatorResult(**outcome("cost", {"flops": 1.0}, {"flops": 1.0, "flops_ratio": share}))
        )
    (table,) = tables(replace(source))  # a frame made anew
    assert table.marks.best == ((0, 1),) and table.marks.above_dense == ((1, 0), (1, 1))
