"""Rankings and the conclusion: whoever is best, whatever is missing, and no order where none is significant."""

from dataclasses import replace

import pytest
from prunekit.compress.reporting.ranking import conclusion, ranking_table, rankings
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.trials import Trial
from prunekit.compress.runs.records import RunResult

PERPLEXITY, ZERO_SHOT = "perplexity.perplexity", "zero_shot.mean"


def unfinished(source, *numbers, status="failed"):
    """The study, with some trials (by number) not finished."""
    trials = [replace(t, status=status, result=None) if t.number in numbers else t for t in source.trials]
    return replace(source, trials=tuple(trials))


def said(source):
    """The first sentence of the conclusion."""
    sentences = conclusion(summarise(source))
    assert all(text.endswith(".") and text[0].isupper() for text in sentences)
    return sentences[0]


def table_of(source, metric=PERPLEXITY):
    """Rows of the ranking as dictionaries by title."""
    table = summarise(source)
    head, rows = ranking_table(table, table.metric(metric))
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture
def close(make_study, run_result):
    """A study at 40% of strategies that harm perplexity as given."""

    def make(*harms, only=None):
        uses = ["pp", "flap", "wanda_sp"][: len(harms)]
        source = make_study(uses, [0.4], only=only)
        trials = [
            replace(trial, result=run_result(use, 0.4, harm=harm, only=only))
            for trial, use, harm in zip(source.trials, uses, harms, strict=True)
        ]
        return replace(source, trials=tuple(trials))

    return make


@pytest.mark.parametrize(
    ("pp", "flap", "words"),
    [
        (
            1.0,
            1.25,
            "PP (33.60) has the lowest perplexity (dense 24.00), 6.7% below FLAP (36.00) (95% interval 6.1% ",
        ),
        (1.25, 1.0, "FLAP (33.60) has the lowest perplexity (dense 24.00), 6.7% below PP (36.00) (95% interval "),
        (1.0, 1.001, " tie for the best perplexity (dense 24.00)"),
    ],
)
def test_the_conclusion_names_the_best_or_the_ties(close, pp, flap, words):
    text = said(close(pp, flap))
    assert text.startswith("At a requested ratio of 40%, ") and words in text


def test_the_conclusion_is_about_the_highest_ratio(make_study):
    text = said(make_study(["pp", "flap"], [0.2, 0.4, 0.3]))
    assert text.startswith("At a requested ratio of 40%, PP (33.60) has the lowest perplexity")


def test_the_last_sentence_is_about_the_other_measures(make_study):
    assert conclusion(summarise(make_study(["pp", "wanda_sp"])))[-1] == (
        "PP (57.0%) and Wanda-sp (56.5%) tie for the best zero-shot (dense 61.0%), at unequal cost: PP used 70.0% of "
        "dense's FLOPs, Wanda-sp 68.0%."
    )


def test_the_conclusion_states_what_the_best_costs(make_study):
    source = make_study(["pp", "flap"], [0.4])
    first, second, _ = conclusion(summarise(source))
    assert first.endswith(", at unequal cost: PP used 70.0% of dense's FLOPs, FLAP 68.0%.")
    assert second == "PP removed 40.0% of the decoder's parameters and took 0.74x dense's prefill time here."
    source = make_study(["pp", "flap"], [0.4])
    source.trials[0].metric("latency").pruned["prefill_ratio"] = 1.42
    second = conclusion(summarise(source))[1]
    assert second.endswith(" and took 1.42x dense's prefill time here, so it saved no time.")


@pytest.mark.parametrize(
    ("removed", "words"), [(0.31, None), (0.2, "PP removed 30.0% of the decoder's parameters, FLAP 20.0%")]
)
def test_what_removed_more_or_less_is_said_in_the_sentence_itself(make_study, removed, words):
    source = make_study(["pp", "flap"], [0.4], only=["perplexity"])
    trials = []
    for trial, share in zip(source.trials, (0.3, removed), strict=True):
        ratio = trial.result.ratio.model_copy(update={"prunable_parameters_cut": share})
        trials.append(replace(trial, result=trial.result.model_copy(update={"ratio": ratio})))
    source = replace(source, trials=tuple(trials))
    first, *_ = conclusion(summarise(source))
    assert first.endswith(f", at unequal cost: {words}.") if words else "unequal" not in first
    assert [row["removed"] for row in table_of(source)] == ["30.0%", f"{100 * removed:.1f}%"]
    assert ("at unequal cost" in table_of(source)[1]["conclusion"]) == bool(words)


def test_of_many_rivals_the_range_of_costs_is_said(make_study):
    source = make_study(["pp", "flap", "wanda_sp", "random"], [0.4], harm=1.0, only=["perplexity", "cost"])
    assert said(source).endswith(", at unequal cost: they used 68.0% to 70.0% of dense's FLOPs.")


def test_every_block_is_ranked_with_intervals(make_study):
    rows = table_of(make_study())
    assert [row["at"] for row in rows] == ["20%"] * 6 + ["40%"] * 6
    assert [row["configuration"] for row in rows[6:]] == [
        "PP", "Wanda-sp", "FLAP", "random", "magnitude", "full-batch probing"
    ]  # fmt: skip
    best, second, *_, bound = rows[6:]
    assert (best["perplexity"], best["conclusion"], best["behind the best"]) == ("33.60", "best", "")
    assert second["behind the best"] == "3.3%" and second["95% interval"].endswith("(30 windows)")
    assert second["conclusion"] == "significantly worse; at unequal cost" and second["FLOPs"] == "68.0%"
    assert bound["conclusion"] == "not cheaper than dense, not ranked" and bound["FLOPs"] == "123.0%"


def test_the_highest_accuracy_is_best(make_study):
    source = make_study(["pp", "flap"], [0.4])
    for trial, mean in zip(source.trials, (0.4, 0.6), strict=True):
        trial.metric("zero_shot").pruned["mean"] = mean
    rows = table_of(source, ZERO_SHOT)
    assert [(row["configuration"], row["zero-shot"], row["behind the best"]) for row in rows] == [
        ("FLAP", "60.0%", ""), ("PP", "40.0%", "20.0 points")
    ]  # fmt: skip
    assert conclusion(summarise(source))[-1].startswith(
        "FLAP (60.0%) has the highest zero-shot (dense 61.0%), 20.0 points"
    )


# What is missing


@pytest.mark.parametrize("status", ["failed", "waiting"])
def test_incomplete_configurations_are_not_ranked(make_study, status):
    source = make_study(["pp", "flap", "wanda_sp"], [0.4], seeds=(0, 1, 2))
    text = said(unfinished(source, 1, 2, status=status))
    assert "Wanda-sp (34.86 ± 0.11) has the lowest perplexity" in text
    assert text.endswith("; not ranked: PP (1 of 3 seeds).")
    text = said(unfinished(source, 1, 2, 4, status=status))
    assert text.endswith("; not ranked: PP (1 of 3 seeds) and FLAP (2 of 3 seeds).")
    rows = table_of(unfinished(source, 1, 2, status=status))
    assert (rows[-1]["configuration"], rows[-1]["conclusion"]) == ("PP", "1 of 3 seeds, not ranked")


def test_a_seed_without_a_finite_value_counts_as_missing(make_study):
    source = make_study(["pp", "flap", "wanda_sp"], [0.4], seeds=(0, 1))
    source.trials[0].metric("perplexity").pruned["perplexity"] = "inf"
    text = said(source)
    assert "Wanda-sp (34.81 ± 0.08) has the lowest" in text and text.endswith("; not ranked: PP (1 of 2 seeds).")
    source.trials[1].metric("perplexity").pruned["perplexity"] = None
    assert said(replace(source)).endswith("; not ranked: PP (no finite perplexity).")


def test_where_nothing_is_complete_nothing_is_called_best(make_study):
    source = unfinished(make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2)), 3, 5, 6)
    assert said(source) == (
        "At a requested ratio of 40%, no configuration has a perplexity for all its seeds, so none is called best."
    )
    assert [row["conclusion"] for row in table_of(source)] == ["incomplete, none is called best"] * 2


def test_strategies_that_were_never_finished_are_named(make_study):
    source = make_study(["pp", "flap", "wanda_sp", "full_batch_probing"], [0.2, 0.4])
    waiting = unfinished(source, 4, 6, 8, status="waiting")
    text = said(waiting)
    assert text.startswith("At a requested ratio of 40%, PP changes perplexity from 24.00 to 33.60; ")
    assert text.endswith("; not ranked: FLAP (not measured) and Wanda-sp (not measured).")
    rows = table_of(waiting)
    assert [row["configuration"] for row in rows if row["conclusion"] == "not measured"] == ["FLAP", "Wanda-sp"]


# What the sentences contain


def test_dense_models_that_differ_are_each_in_their_clause(make_study, run_data, perplexity):
    trials = []
    for window, dense in ((32, 50.0), (64, 37.0)):
        for strategy, value in (("pp", 1.2 * dense), ("flap", 1.5 * dense)):
            outcome = perplexity(value, dense=dense, ids=f"{window:064}")
            outcome["protocol"]["window"] = window
            settings = {"prune.use": strategy, "prune.ratio": 0.4, "evaluate.perplexity.window": window}
            result = RunResult.model_validate({**run_data(strategy), "metrics": [outcome]})
            trials.append(Trial(len(trials) + 1, settings, "done", result))
    first, _, second, _ = conclusion(summarise(replace(make_study(["pp"]), trials=tuple(trials), axes={})))
    start = (
        "At a requested ratio of 40%, where perplexity window = 32, PP (60.00) has the lowest perplexity (dense 50.00)"
    )
    assert first.startswith(start)
    assert "window = 64, PP (44.40)" in second and "(dense 37.00)" in second


@pytest.mark.parametrize(
    ("others", "names"),
    [
        (1, "PP (33.60) and FLAP (33.60) tie for the best perplexity"),
        (2, "PP (33.60), FLAP (33.60) and Wanda-sp (33.60) tie for the best perplexity"),
        (4, "PP (33.60), FLAP (33.60), Wanda-sp (33.60), magnitude (33.60) and 1 more tie for the best perplexity"),
        (5, "PP (33.60), FLAP (33.60), Wanda-sp (33.60), magnitude (33.60) and 2 more tie for the best perplexity"),
    ],
)
def test_all_ties_are_named_or_counted(make_study, others, names):
    strategies = ["pp", "flap", "wanda_sp", "magnitude", "random", "mine"]
    source = make_study([*strategies[: others + 1], "theirs"], [0.4], harm=1.0, only=["perplexity"])
    for trial in source.trials:
        trial.metric("perplexity").details.clear()
    source.trials[-1].metric("perplexity").pruned["perplexity"] = 50.0
    assert names in said(source)
    assert table_of(source)[1]["conclusion"] == "not significantly worse: less than 1% apart"


def test_ties_are_shown_with_their_interval(close):
    rows = table_of(close(1.0, 1.001, 1.002))
    for row in rows[1:]:
        assert row["conclusion"] == "not significantly worse; at unequal cost"
        assert row["95% interval"].startswith("-")
        assert row["95% interval"].endswith("(30 windows)")


def test_two_seeds_are_not_certain(make_study):
    text = said(make_study(["pp", "flap"], [0.4], seeds=(0, 1)))
    assert "PP (33.65 ± 0.07) has the lowest perplexity" in text
    assert "over 30 windows; both seeds agree, but two are too few to be certain)" in text
    text = said(make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2)))
    assert "over 30 windows; " in text and "over 3 seeds)" in text


def test_the_conclusion_of_many_conditions_is_about_the_best_one(make_study):
    source = make_study(["pp", "flap"], [0.4], only=["perplexity"])
    trials = [replace(trial, settings={**trial.settings, "text": text}) for text in "abc" for trial in source.trials]
    trials = [replace(trial, number=number) for number, trial in enumerate(trials, 1)]
    table = summarise(replace(source, trials=tuple(trials)))
    assert len(rankings(table, table.metric(PERPLEXITY))) == 3 and " ".join(conclusion(table)).count("lowest") == 1
