"""The sentences: whoever wins, whatever is missing, and no order where none is known."""

from dataclasses import replace

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.findings import Trial
from prunekit.compress.reporting.verdict import conclusion, findings_in_detail


def unfinished(findings, *numbers, status="failed"):
    """The findings, with some trials (by number) not finished."""
    trials = [replace(t, status=status, data=None) if t.number in numbers else t for t in findings.trials]
    return replace(findings, trials=tuple(trials))


def only(findings, label):
    """The findings with one evaluator's outcomes."""
    for trial in findings.trials:
        trial.data["metrics"] = [o for o in trial.data["metrics"] if o["label"] == label]
    return findings


@pytest.mark.parametrize(
    ("pp", "flap", "words"),
    [
        (1.0, 1.25, "PP has the lowest perplexity (33.60), 6.7% below the next, FLAP (95% interval 6.1% to 7.2% over"),
        (1.25, 1.0, "FLAP has the lowest perplexity (33.60), 6.7% below the next, PP (95% interval "),
        (1.0, 1.001, "tie for the best perplexity: the 95% interval of their difference over 30 windows, -"),
    ],
)
def test_the_conclusion_says_who_wins(make_findings, run_data, pp, flap, words):
    findings = make_findings(["pp", "flap"], [0.4])
    trials = [
        replace(t, data=run_data(u, 0.4, harm=h))
        for t, u, h in zip(findings.trials, ["pp", "flap"], [pp, flap], strict=True)
    ]
    said = conclusion(tabulate(replace(findings, trials=tuple(trials))))
    assert said.startswith("At 40% pruning, ") and words in said and said.endswith("; the dense model has 24.00.")
    assert said.count(". ") == 0  # one sentence


def test_the_conclusion_is_about_the_highest_ratio(make_findings):
    said = conclusion(tabulate(make_findings(["pp", "flap"], [0.2, 0.4, 0.3])))
    assert said.startswith("At 40% pruning, PP has the lowest perplexity (33.60)")


def test_details_have_a_sentence_for_every_ratio_and_measure(make_findings):
    said = findings_in_detail(tabulate(make_findings(["pp", "wanda_sp"])))
    assert len(said) == 4 and said[0].startswith("20%: PP has the lowest perplexity (28.80), ")
    assert said[2].startswith(
        "20%: PP (59.0%) and Wanda-sp (58.8%) tie for the best zero-shot: they differ by less than two standard errors"
    )


def test_the_highest_accuracy_is_best(make_findings):
    findings = make_findings(["pp", "flap"], [0.4])
    for trial, mean in zip(findings.trials, (0.4, 0.6), strict=True):
        trial.outcome("zero_shot")["pruned"]["mean"] = mean
    said = findings_in_detail(tabulate(findings))
    assert said[1] == "40%: FLAP has the highest zero-shot (60.0%), 20.0 points above the next, PP."


# What is missing


@pytest.mark.parametrize("status", ["failed", "waiting"])
def test_who_lacks_seeds_is_left_out(make_findings, status):
    findings = make_findings(["pp", "flap", "wanda_sp"], [0.4], seeds=(0, 1, 2))
    said = conclusion(tabulate(unfinished(findings, 1, 2, status=status)))
    assert "FLAP has the lowest" not in said and "Wanda-sp has the lowest perplexity" in said
    assert said.endswith("; PP has 1 of 3 seeds and is left out; the dense model has 24.00.")
    said = conclusion(tabulate(unfinished(findings, 1, 2, 4, status=status)))
    assert said.endswith("; PP (1 of 3 seeds) and FLAP (2 of 3 seeds) are left out.")


def test_a_seed_without_a_finite_value_counts_as_missing(make_findings):
    findings = make_findings(["pp", "flap", "wanda_sp"], [0.4], seeds=(0, 1))
    findings.trials[0].outcome("perplexity")["pruned"]["perplexity"] = "inf"
    said = conclusion(tabulate(findings))
    assert "Wanda-sp has the lowest" in said and "; PP has 1 of 2 seeds and is left out" in said
    findings.trials[1].outcome("perplexity")["pruned"]["perplexity"] = None
    assert "; PP has no finite perplexity and is left out" in conclusion(tabulate(findings))


def test_where_nothing_is_complete_nothing_is_called_best(make_findings):
    findings = unfinished(make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2)), 3, 5, 6)
    said = conclusion(tabulate(findings))
    assert said.startswith(
        "At 40% pruning, nothing has a perplexity for all its seeds, so none is called best: PP (33.65 from 2 of 3 "
    )
    assert "lowest" not in said and "and FLAP (36.00 from 1 of 3 seeds); the dense" in said


def test_strategies_that_were_never_finished_are_named(make_findings):
    findings = make_findings(["pp", "flap", "wanda_sp", "full_batch_probing"], [0.2, 0.4])
    table = tabulate(unfinished(findings, 4, 6, 8, status="waiting"))
    assert conclusion(table).startswith("At 40% pruning, PP has a perplexity of 33.60; FLAP and Wanda-sp are not meas")
    assert "not measured" not in findings_in_detail(table)[0]
    assert findings_in_detail(tabulate(unfinished(findings, 2)))[1].endswith("; PP is not measured.")


# What the clauses say


def test_dense_models_that_differ_are_cited_each_in_its_clause(make_findings, perplexity):
    findings = make_findings(["pp", "flap"], [0.4])
    trials = []
    for window, dense in ((32, 50.0), (64, 37.0)):
        for strategy, value in (("pp", 1.2 * dense), ("flap", 1.5 * dense)):
            base = findings.trials[0].data
            outcome = perplexity(value, dense=dense, ids=f"{window:064}")
            outcome["protocol"]["window"] = window
            settings = {"prune.use": strategy, "prune.ratio": 0.4, "evaluate.perplexity.window": window}
            data = {**base, "strategy": strategy, "metrics": [outcome]}
            trials.append(Trial(len(trials) + 1, settings, "done", data))
    said = conclusion(tabulate(replace(findings, trials=tuple(trials), axes={})))
    first, second = said.split("; ")
    assert first.startswith("At 40% pruning, with window 32, PP has the lowest perplexity (60.00)")
    assert first.endswith("where the dense model has 50.00")
    assert second.startswith("with window 64, PP has") and second.endswith("where the dense model has 37.00.")


@pytest.mark.parametrize(
    ("others", "names"),
    [
        (1, "PP (33.60) and FLAP (33.60) tie for the best perplexity: they differ by less than 1%"),
        (2, "PP (33.60), FLAP (33.60) and Wanda-sp (33.60) tie for the best perplexity: they differ from the first by"),
        (4, "PP (33.60), FLAP (33.60), Wanda-sp (33.60), magnitude (33.60) and 1 other tie for the best perplexity"),
        (5, "PP (33.60), FLAP (33.60), Wanda-sp (33.60), magnitude (33.60) and 2 others tie for the best perplexity"),
    ],
)
def test_all_that_tie_are_named(make_findings, others, names):
    strategies = ["pp", "flap", "wanda_sp", "magnitude", "random", "mine"]
    findings = only(make_findings([*strategies[: others + 1], "theirs"], [0.4], harm=1.0), "perplexity")
    for trial in findings.trials:
        trial.outcome("perplexity")["details"] = {}
    findings.trials[-1].outcome("perplexity")["pruned"]["perplexity"] = 50.0
    assert names in conclusion(tabulate(findings))


def test_several_are_told_from_the_best_by_windows(make_findings, run_data):
    findings = make_findings(["pp", "flap", "wanda_sp"], [0.4])
    trials = [
        replace(t, data=run_data(t.settings["prune.use"], 0.4, harm=h))
        for t, h in zip(findings.trials, (1.0, 1.001, 1.002), strict=True)
    ]
    said = conclusion(tabulate(replace(findings, trials=tuple(trials))))
    assert "tie for the best perplexity: 30 windows are too few to tell the others from the first; the dense" in said


def test_two_seeds_are_no_certainty(make_findings):
    said = conclusion(tabulate(make_findings(["pp", "flap"], [0.4], seeds=(0, 1))))
    assert "PP has the lowest perplexity" in said
    assert "over 30 windows; both seeds agree, but two are too few to be sure)" in said
    said = conclusion(tabulate(make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2))))
    assert "over 30 windows, " in said and "over 3 seeds)" in said


@pytest.mark.parametrize(
    ("flap", "words"), [(0.669, "; PP keeps 70.0% of the parameters, FLAP 66.9%."), (0.695, "windows).")]
)
def test_what_keeps_fewer_parameters_is_said_to(make_findings, flap, words):
    findings = make_findings(["pp", "flap"], [0.4])
    findings.trials[1].outcome("cost")["pruned"]["parameters_ratio"] = flap
    assert findings_in_detail(tabulate(findings))[0].endswith(words)
