"""When the difference of two configurations is significant: windows, seeds and questions, paired where shared."""

from dataclasses import replace
from math import sqrt

import pytest
from prunekit.compress.reporting.ranking import rankings
from prunekit.compress.reporting.statistics import Sample, difference
from prunekit.compress.reporting.summary import summarise
from scipy import stats

PERPLEXITY, ZERO_SHOT = "perplexity.perplexity", "zero_shot.mean"


def compared(source, key=PERPLEXITY):
    """The difference of the first two configurations, the better one first."""
    table = summarise(source)
    metric = table.metric(key)
    samples = sorted((table.sample(c, metric) for c in table.configurations[:2]), key=lambda s: metric.sign * s.mean)
    return difference(metric, *samples)


def intervals(source, key=PERPLEXITY):
    """The intervals of the difference, by what they are over."""
    return {interval.unit: interval for interval in compared(source, key).intervals}


def valued(source, values):
    """The study with these perplexities, trial by trial, and without windows."""
    for trial, value in zip(source.trials, values, strict=True):
        trial.metric("perplexity").pruned["perplexity"] = value
        trial.metric("perplexity").details.clear()
    return source


def cut(source, count):
    """The study with the first windows only."""
    for trial in source.trials:
        side = trial.metric("perplexity").details["pruned"]
        side.update({name: values[:count] for name, values in side.items()})
    return source


def test_few_windows_are_doubted(make_study, run_result):
    close = make_study(["pp", "flap"], [0.4])
    pp, flap = (replace(t, result=run_result(harm=h)) for t, h in zip(close.trials, (1.0, 1.02), strict=True))
    close = replace(close, trials=(pp, flap))
    assert not compared(close).doubt  # thirty windows
    assert compared(cut(close, 2)).doubt == "the interval includes 0"
    assert compared(cut(close, 1)).doubt == "only 1 window measured"


def test_windows_are_averaged_over_seeds(make_study):
    table = summarise(make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2)))
    metric = table.metric(PERPLEXITY)
    samples = [table.sample(c, metric) for c in table.configurations]
    found = difference(metric, *samples).intervals[0]
    first = difference(metric, *(Sample(s.trials[:1], s.values[:1]) for s in samples)).intervals[0]
    assert found.over == "30 windows" and found.low > 0
    # Noise of single measurements averages out.
    assert 0.35 < (found.high - found.low) / (first.high - first.low) < 0.75


def test_word_perplexity_has_the_interval_of_its_windows(make_study):
    source = make_study(["pp", "flap"], [0.4])
    for trial in source.trials:
        found = trial.metric("perplexity")
        found.pruned["word_perplexity"] = found.pruned["perplexity"] ** 1.5
        found.protocol["words"] = 3839 / 1.5
    token, word = (intervals(source, f"perplexity.{n}")["window"] for n in ("perplexity", "word_perplexity"))
    for one, other in ((token.low, word.low), (token.high, word.high)):
        assert 1 - other / 100 == pytest.approx((1 - one / 100) ** 1.5)
    source.trials[0].metric("perplexity").protocol.pop("words")
    assert "window" not in intervals(source, "perplexity.word_perplexity")


# Seeds


def test_what_is_better_with_every_seed_is_significant_however_seeds_spread(make_study):
    source = make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2))
    found = compared(valued(source, [30.0, 33.0, 36.0, 30.6, 33.7, 36.7]))
    (interval,) = found.intervals
    assert not found.doubt and interval.over == "3 seeds"
    expected = stats.ttest_rel([30.6, 33.7, 36.7], [30.0, 33.0, 36.0]).confidence_interval(0.95)
    mean = (30.6 + 33.7 + 36.7) / 3
    assert (interval.low, interval.high) == pytest.approx((100 * expected.low / mean, 100 * expected.high / mean))
    found = compared(valued(replace(source), [30.0, 33.0, 36.0, 29.0, 34.0, 37.0]))
    assert found.doubt == "the interval includes 0" and found.intervals[0].text.startswith("-")


@pytest.mark.parametrize(
    ("values", "doubt", "caution"),
    [
        ([30.0, 36.0, 31.0, 37.0], "within the deviation over seeds", False),
        ([30.0, 36.0, 29.0, 45.0], "the two seeds disagree", False),
        ([30.0, 30.2, 36.0, 38.0], "", True),
        ([30.0, 31.0, 31.1, 32.1], "", True),  # a gap of 1.1, deviations of 0.71 each
        ([30.0, 30.0, 36.0, 36.0], "", False),  # seeds change nothing
        ([30.0, 30.0, 30.5, 30.5], "", False),
        ([30.0, 30.0, 30.1, 30.1], "less than 1% apart", False),
    ],
)
def test_two_seeds_are_too_few_for_an_interval(make_study, values, doubt, caution):
    found = compared(valued(make_study(["pp", "flap"], [0.4], seeds=(0, 1)), values))
    assert (found.doubt, bool(found.caution), found.intervals) == (doubt, caution, ())


def test_seeds_that_are_not_shared_are_not_paired(make_study):
    source = valued(make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2)), [30.0, 33.0, 36.0, 30.6, 33.7, 36.7])
    others = [replace(t, settings={**t.settings, "seed": 7 + i}) for i, t in enumerate(source.trials[3:])]
    source = replace(source, trials=(*source.trials[:3], *others))
    assert compared(source).doubt == "within the deviation over seeds"


# Questions


@pytest.fixture
def answered(make_study):
    """Two strategies whose answers to the questions of two tasks are given."""

    def make(answers, seeds=(0,)):
        source = make_study(["pp", "flap"], [0.4], seeds=seeds)
        for trial, scores in zip(source.trials, answers, strict=True):
            found = trial.metric("zero_shot")
            values = {task: sum(each) / len(each) for task, each in scores.items()}
            found.pruned.update(values, mean=sum(values.values()) / len(values))
            found.details["pruned"] = {"scores": scores}
        return source

    return make


def tasks(first, second):
    """Scores of 100 and 50 questions, so many of them answered correctly, the easy ones."""
    return {"boolq": [1.0] * first + [0.0] * (100 - first), "piqa": [1.0] * second + [0.0] * (50 - second)}


def test_questions_are_paired_task_by_task(answered):
    source = answered([tasks(60, 30), tasks(54, 27)])
    found = intervals(source, ZERO_SHOT)["question"]
    # 6 of 100 and 3 of 50 differ: both tasks 0.06, variances of a share of 0.06; 148 degrees of freedom.
    reach = stats.t.ppf(0.975, 148) * sqrt(0.06 * 0.94 / 99 + 0.06 * 0.94 / 49) / 2
    assert (found.low, found.high) == pytest.approx((100 * (0.06 - reach), 100 * (0.06 + reach)))
    assert found.over == "150 questions" and not compared(source, ZERO_SHOT).doubt
    for trial in source.trials:
        trial.metric("zero_shot").details.clear()
    assert not compared(source, ZERO_SHOT).doubt  # two standard errors, as if independent: 4 points


def test_answers_are_averaged_over_seeds(answered):
    source = answered([tasks(60, 30), tasks(50, 20), tasks(54, 27), tasks(50, 20)], seeds=(0, 1))
    found = intervals(source, ZERO_SHOT)["question"]
    assert (found.low + found.high) / 2 == pytest.approx(3.0)


@pytest.mark.parametrize(("gap", "doubted"), [(0.03, True), (0.0385, True), (0.0415, False)])
def test_without_answers_two_standard_errors_decide(make_study, gap, doubted):
    source = make_study(["pp", "flap"], [0.4])
    for trial, mean in zip(source.trials, (0.5 + gap, 0.5), strict=True):
        trial.metric("zero_shot").pruned["mean"] = mean
    # Two tasks of 0.02 each: 0.02 for the difference of the means, not 0.04.
    doubt = compared(source, ZERO_SHOT).doubt
    assert doubt == ("within two standard errors (4.0 points)" if doubted else "")


def test_answers_that_are_few_or_do_not_correspond_are_not_paired(answered):
    few = {"boolq": [1.0] * 9, "piqa": [1.0] * 9}
    none = {task: [0.0] * 9 for task in few}
    assert compared(answered([few, none]), ZERO_SHOT).doubt == "only 18 questions measured"
    source = answered([tasks(60, 30), {**tasks(54, 27), "piqa": [1.0] * 9}])
    assert "question" not in intervals(source, ZERO_SHOT)
    source = answered([tasks(60, 30), tasks(54, 27)])
    source.trials[0].metric("zero_shot").pruned["mean"] = 0.7  # a group, weighed differently
    assert "question" not in intervals(source, ZERO_SHOT)


def test_the_best_is_first_whichever_direction_is_better(make_study):
    table = summarise(make_study(["flap", "pp"], [0.4]))
    for key in (PERPLEXITY, ZERO_SHOT):
        (block,) = rankings(table, table.metric(key))
        assert block.best.strategy == "pp" and len(block.ranked) == 2
