"""Columns: which value a name means, and what stands in the dense row."""

from dataclasses import replace

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.columns import all_columns
from prunekit.compress.reporting.published import beside
from prunekit.compress.reporting.tables import explanation


@pytest.fixture
def twice(make_findings, perplexity):
    """Two evaluators of one kind."""
    findings = make_findings(["pp"], [0.4])
    for trial in findings.trials:
        trial.data["metrics"] = [
            {**perplexity(value, ids=ids), "label": f"perplexity {n}"}
            for n, value, ids in ((1, 30.0, "a"), (2, 40.0, "b"))
        ]
    return findings


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
    entry = {"where": {}, "metric": metric, "value": 20.0, "source": "A"}
    assert [row.ours for row in beside(tabulate(replace(twice, published=(entry,))))] == [ours]


def test_a_label_of_its_own_goes_before_the_kind(make_findings, outcome):
    findings = make_findings(["pp"], [0.4])
    labels = {"strange 2": 2.0, "strange": 1.0}
    findings.trials[0].data["metrics"] += [outcome("strange", {}, {"x": v}, label=name) for name, v in labels.items()]
    table = tabulate(findings)
    assert table.column("strange.x").label == "strange" and table.column("strange 2.x").label == "strange 2"


def test_a_strangers_ratio_keeps_its_own_dense_value(make_findings, outcome):
    findings = make_findings(["pp", "flap"], [0.4])
    for trial in findings.trials:
        trial.data["metrics"].append(outcome("odd", {"odds_ratio": 3.0}, {"odds_ratio": 4.0, "bare_ratio": 2.0}))
    table = tabulate(findings)
    dense = {column.key: table.dense[0].cell(column).mean for column in table.columns}
    assert dense["odd.odds_ratio"] == 3.0 and dense["odd.bare_ratio"] is None
    assert not any("odd" in said for said in explanation(table))
    every = {column.key: table.dense[0].cell(column).mean for column in all_columns(findings)}
    assert every["cost.flops_ratio"] == every["cost.floor_ratio"] == every["latency.decode_ratio"] == 1.0


def test_extra_memory_is_relative_to_dense(make_findings):
    findings = make_findings(["pp", "flap"], [0.4])
    table = tabulate(findings)
    column = table.column("memory.prefill_peak")
    cell = table.configurations[0].cell(column)
    assert cell.mean == pytest.approx(0.9) and cell.text == "90%" and table.dense[0].cell(column).text == "100%"
    for trial in findings.trials:
        trial.outcome("memory")["pruned"]["prefill_peak"] = 4e8 * 11.4
    assert table.configurations[0].cell(column).text == "1,140%"
    findings.trials[0].outcome("memory")["dense"]["prefill_peak"] = 0
    assert table.configurations[0].cell(column).text == "-"
