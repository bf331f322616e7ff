"""Metrics: which value a name means, and its value for the dense model."""

from dataclasses import replace

import pytest
from prunekit.compress.ablation.published import Published
from prunekit.compress.reporting.metrics import all_metrics
from prunekit.compress.reporting.published import compare_with_published
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import explanation
from prunekit.compress.runs.records import EvaluatorResult


@pytest.fixture
def twice(make_study, perplexity):
    """Two evaluators of one kind."""
    source = make_study(["pp"], [0.4])
    for trial in source.trials:
        trial.result.metrics[:] = [
            EvaluatorResult(**{**perplexity(value, ids=ids), "label": f"perplexity {n}"})
            for n, value, ids in ((1, 30.0, "a"), (2, 40.0, "b"))
        ]
    return source


@pytest.mark.parametrize(
    ("metric", "ours"),
    [
        ("perplexity.perplexity", "30.00"),
        ("perplexity 1.perplexity", "30.00"),
        ("perplexity 2.perplexity", "40.00"),
        ("perplexity 3.perplexity", "not measured"),
    ],
)
def test_published_values_find_evaluators_that_are_listed_twice(twice, metric, ours):
    entry = Published(where={}, metric=metric, value=20.0, source="A")
    assert [row.ours for row in compare_with_published(summarise(replace(twice, published=(entry,))))] == [ours]


def test_an_exact_label_goes_before_the_kind(make_study, outcome):
    source = make_study(["pp"], [0.4])
    labels = {"strange 2": 2.0, "strange": 1.0}
    source.trials[0].result.metrics.extend(
        EvaluatorResult(**outcome("strange", {}, {"x": value}, label=name)) for name, value in labels.items()
    )
    table = summarise(source)
    assert table.metric("strange.x").label == "strange" and table.metric("strange 2.x").label == "strange 2"


def test_a_plugins_ratio_keeps_its_own_dense_value(make_study, outcome):
    source = make_study(["pp", "flap"], [0.4])
    for trial in source.trials:
        added = outcome("odd", {"odds_ratio": 3.0}, {"odds_ratio": 4.0, "bare_ratio": 2.0})
        trial.result.metrics.append(EvaluatorResult(**added))
    table = summarise(source)
    dense = {metric.key: table.dense_cell(0, metric).mean for metric in table.metrics}
    assert dense["odd.odds_ratio"] == 3.0 and dense["odd.bare_ratio"] is None
    assert not any("odd" in text for text in explanation(table))
    every = {metric.key: table.dense_cell(0, metric).mean for metric in all_metrics(source)}
    assert every["cost.flops_ratio"] == every["cost.floor_ratio"] == every["latency.decode_ratio"] == 1.0


@pytest.mark.parametrize(
    ("peak", "dense", "text"), [(3.6e8, 4e8, "90.0%"), (4e8 * 11.4, 4e8, "1,140.0%"), (3.6e8, 0, "-")]
)
def test_extra_memory_is_relative_to_dense(make_study, peak, dense, text):
    source = make_study(["pp", "flap"], [0.4])
    source.trials[0].metric("memory").pruned["prefill_peak"] = peak
    source.trials[0].metric("memory").dense["prefill_peak"] = dense
    table = summarise(source)
    metric = table.metric("memory.prefill_peak")
    assert table.cell(table.configurations[0], metric).text == text
    assert table.dense_cell(0, metric).text == "100.0%"
