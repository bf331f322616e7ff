"""Cross tables: what a cell is the mean of, what it is relative to, and which cells stand out."""

from itertools import product
from math import exp, fsum, log
from pathlib import Path

import pytest
import yaml
from prunekit.compress.reporting.findings import Findings, Trial
from prunekit.compress.reporting.pivot import crossed, shared_settings
from prunekit.compress.reporting.pivot_axes import joined
from prunekit.compress.reporting.pivot_records import Question
from prunekit.compress.reporting.pivot_text import heading, measure, notes, spread_text, value_text

DENSE = {"far": 20.0, "near": 30.0}
FIELDS = {
    "strategy": {"pp": {"prune.use": "pp"}, "flap": {"prune.use": "flap"}},
    "compensation": {"none": {}, "mean": {"prune.compensate": "mean"}},
    "text": {"far": {"calibration.bundled": "docstrings-calibration"}, "near": {}},
}


@pytest.fixture
def study(outcome):
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
            data = {"strategy": settings["strategy"], "metrics": metrics}
            number = len(trials) + 1
            status = (statuses or {}).get(number, "done")
            resolved = yaml.safe_dump({"prune": {"use": settings["strategy"], "ratio": 0.4}, "seed": settings["seed"]})
            trials.append(Trial(number, settings, status, *((data, resolved) if status == "done" else ())))
        text = yaml.safe_dump({"vary": {**FIELDS, "seed": list(seeds)}})
        return Findings("Made", Path(f"{name}.sqlite"), tuple(trials), axes, (), text)

    return make


def tables(findings, rows="strategy", columns="compensation", relative="dense", by=None, metric=None):
    grid = joined(findings if isinstance(findings, list) else [findings])
    reference = grid.relative(relative)
    return crossed(grid, Question(grid.axis(rows, "--rows"), columns, grid.metric(metric, reference), reference, by))


def smooth(strategy, compensation, text, seed, **_):
    """Perplexity by setting, each setting a factor."""
    factor = {"pp": 1.2, "flap": 1.5}.get(strategy, 2.0) * {"none": 1.0, "mean": 0.9}[compensation]
    return DENSE[text] * factor * (1.1 if text == "far" else 1.0) * (1 + 0.01 * seed)


def test_a_cell_is_the_geometric_mean_of_each_trials_ratio_to_its_own_dense_model(study):
    (cross,) = tables(study(smooth))
    ratios = [smooth("pp", "mean", text, seed) / DENSE[text] for text in DENSE for seed in (0, 1)]
    cell = cross.cells[0, 1]
    assert cell.value == pytest.approx(exp(fsum(map(log, ratios)) / 4))
    assert (cell.least, cell.largest, len(cell.effects)) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)), 4)
    assert (cross.rows, cross.columns, cross.settings, cross.left_out) == (["pp", "flap"], ["none", "mean"], 4, 0)
    assert cross.over == {"text": ["far", "near"], "seed": [0, 1]}
    assert notes(cross)[0] == (
        "Averaged over text (far, near); seed (0, 1): 4 settings in each cell, 16 trials in 4 cells."
    )
    assert spread_text(cross, (0, 1)) == f"{min(ratios):.3f} to {max(ratios):.3f}, n 4"


def test_accuracies_and_losses_are_mean_differences(study):
    (cross,) = tables(study(smooth), metric="zero_shot.mean")
    values = [-smooth("flap", "none", text, seed) / 1000 for text in DENSE for seed in (0, 1)]
    assert cross.cells[1, 0].value == pytest.approx(fsum(values) / 4)
    assert value_text(cross, (1, 0)) == f"{100 * fsum(values) / 4:+.1f} ◇"
    assert cross.marks.best == ((0, 1),) and measure(cross.question) == "zero-shot, difference in points from dense"
    (task,) = tables(study(smooth), metric="zero_shot.boolq")
    assert task.cells[0, 0].value == pytest.approx(-0.1) and task.marks.best == ()  # all are the same
    (loss,) = tables(study(smooth), metric="perplexity.loss")
    assert loss.cells[0, 0].value == pytest.approx(3 - (log(20) + log(30)) / 2)


def test_what_may_be_negative_is_a_difference(study):
    (cross,) = tables(study(smooth), metric="prr.prr", relative="compensation=none")
    assert cross.cells[0, 0].value == 0 and cross.cells[0, 1].value < 0 and "difference from" in measure(cross.question)


def test_the_reference_is_the_trial_with_otherwise_the_same_settings(study):
    (cross,) = tables(study(smooth), relative="compensation=none")
    assert [cross.cells[i, j].value for i in (0, 1) for j in (0, 1)] == pytest.approx([1, 0.9, 1, 0.9])
    assert cross.cells[0, 1].least == pytest.approx(cross.cells[0, 1].largest)
    (both,) = tables(study(smooth), relative="strategy=pp,compensation=none")
    assert [both.cells[i, j].value for i in (0, 1) for j in (0, 1)] == pytest.approx([1, 0.9, 1.25, 1.125])
    assert "by its own reference: the largest gain" in " ".join(notes(cross))
    assert "own reference" not in " ".join(notes(both))


def test_all_cells_are_averaged_over_the_settings_that_all_have(study):
    # Trial 1 is pp, none, far, seed 0: it is out of every cell's mean, and of those of its own as a reference.
    (cross,) = tables(study(smooth, statuses={1: "failed"}))
    assert {len(cell.effects) for cell in cross.cells.values()} == {3} and (cross.settings, cross.left_out) == (3, 1)
    assert {*map(frozenset, (cell.effects for cell in cross.cells.values()))} == {frozenset(cross.cells[0, 0].effects)}
    assert spread_text(cross, (0, 0)).endswith("n 3, 1 failed") and "failed" not in spread_text(cross, (0, 1))
    said = " ".join(notes(cross))
    assert "1 of 4 are left out; no more are in PP x none." in said and "1 trial failed: PP x none." in said
    (cross,) = tables(study(smooth, statuses={1: "waiting"}), relative="compensation=none")
    assert cross.cells[0, 1].troubles == {"without a reference": 1} and cross.cells[0, 0].troubles == {"waiting": 1}
    assert "n 3, 1 without a reference" in spread_text(cross, (0, 1))


def test_empty_cells_stay_empty_and_narrow_nothing(study):
    (cross,) = tables(study(smooth, without=[{"strategy": "flap", "compensation": "mean"}]))
    assert value_text(cross, (1, 1)) == "-" and spread_text(cross, (1, 1)) == ""
    assert cross.settings == 4 and cross.left_out == 0
    infinite = study(smooth)
    for trial in infinite.trials:
        if (trial.settings["strategy"], trial.settings["compensation"]) == ("flap", "mean"):
            trial.data["metrics"][0]["pruned"]["perplexity"] = "inf"
    (cross,) = tables(infinite)
    assert value_text(cross, (1, 1)) == "-" and spread_text(cross, (1, 1)) == "4 without a finite value"


def test_cells_that_share_nothing_are_left_out_and_named(study):
    assert shared_settings([{"a", "b", "c"}, {"a", "b"}]) == {"a", "b"}
    assert shared_settings([{"a", "b"}, {"a", "b"}, {"c"}]) == {"a", "b"} and shared_settings([]) == set()
    without = [{"strategy": "pp", "text": "far"}, {"strategy": "flap", "compensation": "mean", "text": "near"},
               {"strategy": "flap", "compensation": "none", "text": "far"}]  # fmt: skip
    (cross,) = tables(study(smooth, without=without))
    assert [len(cell.effects) for cell in cross.cells.values()] == [2, 2, 2, 0] and cross.cells[1, 1].spare == 2
    assert spread_text(cross, (1, 1)) == "shares no setting with the others"
    assert "No setting in common with the other cells, so left empty: FLAP x mean." in notes(cross)


def test_by_gives_a_table_for_each_value_and_one_over_all(study):
    found = tables(study(smooth), by="text")
    assert [heading(cross) for cross in found] == ["text far", "text near", "Over all of text"]
    assert [len(cross.trials) for cross in found] == [8, 8, 16] and found[0].over == {"seed": [0, 1]}
    assert found[0].cells[0, 0].value == pytest.approx(found[1].cells[0, 0].value * 1.1)


def test_seeds_are_no_evidence_of_their_own(study):
    def value(strategy, text, seed, **_):
        better = {"far": 0.9, "near": 0.99}[text]  # sure with every seed, unsure over texts
        return 30 * (better if strategy == "pp" else 1.0) * (1 + 0.0001 * seed)

    (cross,) = tables(study(value, seeds=range(8)))
    assert (cross.marks.tested, cross.marks.units, cross.marks.axes) == (2, "group", ("text",))
    assert cross.marks.best == ((0, 0), (0, 1)) and cross.marks.tied == ((1, 0), (1, 1))
    said = " ".join(notes(cross))
    assert "over 2 groups (text, each the mean over seed) holds 0" in said and "2 groups are too few for much" in said


def test_what_all_groups_agree_on_is_told(study):
    (cross,) = tables(study(smooth))
    assert cross.marks.best == ((0, 1),) and cross.marks.tied == ()
    assert value_text(cross, (0, 1)).endswith(" ◆")


def test_one_group_is_tested_by_its_seeds_and_says_so(study):
    def value(strategy, compensation, seed, **_):
        return 25.0 + {"pp": 0.0, "flap": 0.1}[strategy] * (-1) ** seed + 5 * (compensation == "none") + 0.01 * seed

    without = [{"text": "far"}]
    (cross,) = tables(study(value, without, seeds=range(3)))
    assert (cross.marks.tested, cross.marks.units) == (3, "seed")
    assert cross.marks.best == ((0, 1),) and cross.marks.tied == ((1, 1),)
    assert "3 seeds (seed) holds 0; it says nothing of other models and texts" in " ".join(notes(cross))
    (cross,) = tables(study(value, without, seeds=range(2)))
    assert cross.marks.tested == 0 and cross.marks.tied == ()
    assert "allow no test of how sure it is." in " ".join(notes(cross))


def test_ratios_texts_and_models_have_a_best_each(study):
    findings = study(lambda strategy, **s: smooth(strategy, **s) * (1 + s["ratio"]), ratio=[0.2, 0.4])
    (cross,) = tables(findings, columns="ratio")
    assert cross.marks.best == ((0, 0), (0, 1)) and cross.marks.apart == ("ratio",)
    assert "◆ best mean of each ratio" in " ".join(notes(cross))
    (cross,) = tables(findings, columns="text")
    assert cross.marks.best == ((0, 0), (0, 1)) and cross.marks.apart == ("text",)


def test_what_computes_more_than_the_dense_model_is_no_contender(study, outcome):
    findings = study(smooth, strategies=("full_batch_probing", "pp", "flap"))
    for trial in findings.trials:
        trial.data["metrics"][0]["pruned"]["perplexity"] *= 0.5 if trial.data["strategy"].startswith("full") else 1
    (cross,) = tables(findings)
    assert cross.marks.best == ((1, 1),) and cross.marks.bounds == ((0, 0), (0, 1))
    for trial in findings.trials:  # measured operations count more than the name
        share = 1.2 if trial.data["strategy"] == "pp" else 0.7
        trial.data["metrics"].append(outcome("cost", {"flops": 1.0}, {"flops": share, "flops_ratio": share}))
    (cross,) = tables(findings)
    assert cross.marks.best == ((0, 1),) and cross.marks.bounds == ((1, 0), (1, 1))
