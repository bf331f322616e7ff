"""What tells two configurations apart: windows, seeds and questions, each paired where they are shared."""

from dataclasses import replace
from math import sqrt

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.contest import compare_best, contests, leading
from prunekit.compress.reporting.evidence import over_questions, over_seeds, over_windows, standard_error

PERPLEXITY, ZERO_SHOT = "perplexity.perplexity", "zero_shot.mean"


def compared(findings, column=PERPLEXITY):
    table = tabulate(findings)
    return compare_best(table.column(column), table.configurations)


def valued(findings, values, details=False):
    """The findings with these perplexities, trial by trial, and without windows unless told."""
    for trial, value in zip(findings.trials, values, strict=True):
        outcome = trial.outcome("perplexity")
        outcome["pruned"]["perplexity"] = value
        outcome["details"] = outcome["details"] if details else {}
    return findings


def cut(findings, count):
    """The findings with the first windows only."""
    for trial in findings.trials:
        side = trial.outcome("perplexity")["details"]["pruned"]
        side.update({name: values[:count] for name, values in side.items()})
    return findings


def test_few_windows_are_doubted(make_findings, run_data):
    close = make_findings(["pp", "flap"], [0.4])
    pp, flap = (replace(t, data=run_data(harm=h)) for t, h in zip(close.trials, (1.0, 1.02), strict=True))
    close = replace(close, trials=(pp, flap))
    assert not compared(close).tied  # thirty windows
    found = compared(cut(close, 2))
    assert found.tied.startswith("the 95% interval of their difference over only 2 windows, ")
    assert compared(cut(close, 1)).tied == "only 1 window was measured"


def test_windows_are_averaged_over_seeds(make_findings):
    table = tabulate(make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2)))
    column, (pp, flap) = table.column(PERPLEXITY), table.configurations
    found = over_windows(column, pp, flap)
    first = over_windows(column, *(replace(c, trials=c.trials[:1]) for c in (pp, flap)))
    assert found.source == "30 windows" and found.certain
    # Noise of single measurements averages out.
    assert 0.35 < (found.high - found.low) / (first.high - first.low) < 0.75


def test_word_perplexity_has_the_interval_of_its_windows(make_findings):
    findings = make_findings(["pp", "flap"], [0.4])
    for trial in findings.trials:
        outcome = trial.outcome("perplexity")
        outcome["pruned"]["word_perplexity"] = outcome["pruned"]["perplexity"] ** 1.5
        outcome["protocol"]["words"] = 3839 / 1.5
    table = tabulate(findings)
    token, word = (over_windows(table.column(f"perplexity.{n}"), *table.configurations)
                   for n in ("perplexity", "word_perplexity"))  # fmt: skip
    for one, other in ((token.low, word.low), (token.high, word.high)):
        assert 1 - other / 100 == pytest.approx((1 - one / 100) ** 1.5)
    findings.trials[0].outcome("perplexity")["protocol"].pop("words")
    assert over_windows(table.column("perplexity.word_perplexity"), *table.configurations) is None


# Seeds


def test_what_wins_with_every_seed_is_no_tie_however_seeds_spread(make_findings):
    findings = make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2))
    found = compared(valued(findings, [30.0, 33.0, 36.0, 30.6, 33.7, 36.7]))
    assert not found.tied and found.evidence[0].source == "3 seeds"
    assert found.best.strategy == "pp"
    assert 1 < found.evidence[0].low < 2 < found.evidence[0].high < 3  # percent of 33.7
    found = compared(valued(findings, [30.0, 33.0, 36.0, 29.0, 34.0, 37.0]))
    assert found.tied.startswith("the 95% interval of their difference over 3 seeds, -") and "holds zero" in found.tied


@pytest.mark.parametrize(
    ("values", "tied", "caution"),
    [
        ([30.0, 36.0, 31.0, 37.0], "they differ by less than seeds do", True),
        ([30.0, 36.0, 29.0, 45.0], "the two seeds disagree", True),
        ([30.0, 30.2, 36.0, 38.0], "", True),
        ([30.0, 31.0, 31.1, 32.1], "", True),  # a gap of 1.1, deviations of 0.71 each
        ([30.0, 30.0, 36.0, 36.0], "", False),  # seeds change nothing
        ([30.0, 30.0, 30.5, 30.5], "", False),
        ([30.0, 30.0, 30.1, 30.1], "they differ by less than 1%", False),
    ],
)
def test_two_seeds_are_no_sample(make_findings, values, tied, caution):
    found = compared(valued(make_findings(["pp", "flap"], [0.4], seeds=(0, 1)), values))
    assert (found.tied, bool(found.caution), found.evidence) == (tied, caution, ())


def test_seeds_that_are_not_shared_are_not_paired(make_findings):
    findings = valued(make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2)), [30.0, 33.0, 36.0, 30.6, 33.7, 36.7])
    others = [replace(t, settings={**t.settings, "seed": 7 + i}) for i, t in enumerate(findings.trials[3:])]
    findings = replace(findings, trials=(*findings.trials[:3], *others))
    assert compared(findings).tied == "they differ by less than seeds do"


# Questions


@pytest.fixture
def answered(make_findings):
    """Two strategies whose answers to the questions of two tasks are given."""

    def make(answers, seeds=(0,)):
        findings = make_findings(["pp", "flap"], [0.4], seeds=seeds)
        for trial, scores in zip(findings.trials, answers, strict=True):
            outcome = trial.outcome("zero_shot")
            values = {task: sum(each) / len(each) for task, each in scores.items()}
            outcome["pruned"].update(values, mean=sum(values.values()) / len(values))
            outcome["details"] = {"pruned": {"scores": scores}}
        return findings

    return make


def tasks(first, second):
    """Scores of 100 and 50 questions, so many of them answered rightly, the easy ones."""
    return {"boolq": [1.0] * first + [0.0] * (100 - first), "piqa": [1.0] * second + [0.0] * (50 - second)}


def test_questions_are_paired_task_by_task(answered):
    table = tabulate(answered([tasks(60, 30), tasks(54, 27)]))
    column, (pp, flap) = table.column(ZERO_SHOT), table.configurations
    found = over_questions(column, pp, flap)
    # 6 of 100 and 3 of 50 differ: both tasks 0.06, variances of a share of 0.06.
    error = sqrt(0.06 * 0.94 / 99 + 0.06 * 0.94 / 49) / 2
    assert (found.low, found.high) == pytest.approx((100 * (0.06 - 2.086 * error), 100 * (0.06 + 2.086 * error)))
    assert found.source == "150 questions" and found.certain and not compare_best(column, [flap, pp]).tied
    for configuration in (pp, flap):
        configuration.first.outcome("zero_shot")["details"] = {}
    assert standard_error(column, pp, flap) == pytest.approx(sqrt(4 * 0.02**2) / 2)  # as if independent
    assert not compare_best(column, [pp, flap]).tied


def test_answers_are_averaged_over_seeds(answered):
    table = tabulate(answered([tasks(60, 30), tasks(50, 20), tasks(54, 27), tasks(50, 20)], seeds=(0, 1)))
    found = over_questions(table.column(ZERO_SHOT), *table.configurations)
    assert (found.low + found.high) / 2 == pytest.approx(3.0)


@pytest.mark.parametrize(("gap", "tied"), [(0.03, True), (0.0385, True), (0.0415, False)])
def test_without_answers_two_standard_errors_decide(make_findings, gap, tied):
    findings = make_findings(["pp", "flap"], [0.4])
    for trial, mean in zip(findings.trials, (0.5 + gap, 0.5), strict=True):
        trial.outcome("zero_shot")["pruned"]["mean"] = mean
    assert compared(findings, ZERO_SHOT).best.strategy == "pp"
    # Two tasks of 0.02 each: 0.02 for the difference of the means, not 0.04.
    assert bool(compared(findings, ZERO_SHOT).tied) == tied


def test_answers_that_are_few_or_do_not_match_are_not_paired(answered):
    few = {"boolq": [1.0] * 9, "piqa": [1.0] * 9}
    none = {task: [0.0] * 9 for task in few}
    assert compared(answered([few, none]), ZERO_SHOT).tied == "only 18 questions were measured"
    findings = answered([tasks(60, 30), {**tasks(54, 27), "piqa": [1.0] * 9}])
    table = tabulate(findings)
    assert over_questions(table.column(ZERO_SHOT), *table.configurations) is None
    findings = answered([tasks(60, 30), tasks(54, 27)])
    findings.trials[0].outcome("zero_shot")["pruned"]["mean"] = 0.7  # a group, weighed otherwise
    table = tabulate(findings)
    assert over_questions(table.column(ZERO_SHOT), *table.configurations) is None


def test_the_leading_contest_holds_the_best_whichever_way_is_better(make_findings):
    table = tabulate(make_findings(["pp", "flap"], [0.2, 0.4, 0.6]))
    for key in (PERPLEXITY, ZERO_SHOT):
        column = table.column(key)
        assert leading(column, contests(table, column)[::-1]).contenders[0].ratio == 0.2
    assert over_seeds(table.column(PERPLEXITY), *table.configurations[:2]) is None
