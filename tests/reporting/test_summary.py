"""Tables: seeds together, dense models apart, marks, whatever was measured."""

from dataclasses import replace
from statistics import stdev

import pytest
from prunekit.compress.reporting.protocols import Protocols
from prunekit.compress.reporting.published import compare_with_published
from prunekit.compress.reporting.ranking import conclusion, ranking_table
from prunekit.compress.reporting.ranking import marked as best
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import table_rows
from prunekit.compress.reporting.trials import Trial


def by_name(table):
    return {table.name(configuration): configuration for configuration in table.configurations}


def test_seeds_are_taken_together(make_study):
    table = summarise(make_study(["pp", "flap"], [0.4], seeds=(0, 1, 2)))
    assert table.axes == ["prune.use"] and table.repeated == ["seed"]
    pp = by_name(table)["PP"]
    column = table.metric("perplexity.perplexity")
    values = [trial.metric("perplexity").pruned["perplexity"] for trial in pp.trials]
    cell = table.cell(pp, column)
    assert len(pp.trials) == 3
    assert cell.mean == pytest.approx(sum(values) / 3) and cell.sd == pytest.approx(stdev(values))
    assert cell.text == f"{cell.mean:.2f} ± {cell.sd:.2f}"
    flops = table.metric("cost.flops_ratio")
    assert table.cell(pp, flops).sd is None and table.cell(pp, flops).text == "70.0%"  # no spread


def test_rows_begin_with_dense_and_say_their_protocol(make_study):
    table = summarise(make_study(["pp", "wanda_sp"]))
    protocols = Protocols()
    rows = table_rows(table, table.metrics, protocols)
    assert [row.dense for row in rows] == [True, False, False, False, False]
    assert rows[0].settings == ["dense", ""]
    assert [row.settings for row in rows[1:]] == [
        ["PP", "20%"], ["Wanda-sp", "20%"], ["PP", "40%"], ["Wanda-sp", "40%"]
    ]  # fmt: skip
    titles = [column.title for column in table.metrics]
    dense = dict(zip(titles, rows[0].cells, strict=True))
    assert (
        dense["FLOPs"].text == "100.0%" and dense["prefill time"].text == "1.00" and dense["zero-shot"].text == "61.0%"
    )
    assert dense["perplexity"].protocol.facts[:2] == (("text", "bundled reference-evaluation"), ("window", "128"))
    assert (
        "from 0.71 to 0.78 over the repetitions" in dict(zip(titles, rows[3].cells, strict=True))["prefill time"].about
    )
    assert [row.starts_block for row in rows] == [False, False, False, True, False]
    assert {"strangers own: score", "strangers own: shape"} <= set(titles)


def test_the_best_of_every_ratio_is_marked_among_what_saves(make_study):
    table = summarise(make_study())
    marked = {(table.name(c), key) for c in table.configurations for i, key in best(table) if i == c.number}
    assert {name for name, key in marked if key == "perplexity.perplexity"} == {"PP (20%)", "PP (40%)"}
    least = {f"{use} ({ratio})" for use in ("random", "magnitude", "Wanda-sp", "FLAP") for ratio in ("20%", "40%")}
    assert {name for name, key in marked if key == "cost.flops_ratio"} == least  # equal counts are marked alike
    assert not {key for _, key in marked if key.startswith(("latency", "prr"))}
    head, rows = ranking_table(table, table.metric("perplexity.perplexity"))
    bound = [row for row in rows if row[1] == "full-batch probing"]
    assert {row[5] for row in bound} == {"not cheaper than dense, not ranked"}
    assert [row[0] for row in bound] == ["20%", "40%"] and head[5] == "conclusion"


def test_what_ties_is_marked_alike_and_nothing_where_all_tie(make_study):
    for value, names in ((33.61, ["PP", "Wanda-sp"]), (40.0, ["PP"])):
        source = make_study(["pp", "wanda_sp", "flap"], [0.4], only=["perplexity"])
        for trial, perplexity in zip(source.trials, (33.6, value, 36.0), strict=True):
            trial.metric("perplexity").details.clear()
            trial.metric("perplexity").pruned["perplexity"] = perplexity
        table = summarise(source)
        assert [
            table.name(c) for c in table.configurations if (c.number, "perplexity.perplexity") in best(table)
        ] == names
    table = summarise(make_study(["pp", "wanda_sp", "flap"], [0.4], harm=1.0, only=["perplexity"]))
    assert not best(table)


def test_prr_says_that_no_time_is_saved(make_study):
    table = summarise(make_study(["full_batch_probing"]))
    assert table.cell(table.configurations[0], table.metric("prr.prr")).text == "no time saved"


def test_two_texts_have_two_dense_rows(make_study, run_result):
    source = make_study(["pp"], [0.4])
    other = [
        Trial(9 + i, {"prune.use": "pp", "prune.ratio": r, "on": "other"}, "done", run_result("pp", r, ids="b" * 64))
        for i, r in enumerate((0.2, 0.4))
    ]
    first = replace(source.trials[0], settings={**source.trials[0].settings, "on": "same"})
    table = summarise(replace(source, trials=(first, *other), axes={}))
    assert [reference.settings["on"] for reference in table.dense] == ["same", "other"]
    assert [c.reference for c in table.configurations] == [0, 1, 1]


def test_any_subset_of_evaluators_makes_a_table(make_study):
    for label in ("perplexity", "strangers_own", "overlap"):
        table = summarise(make_study(["pp", "flap"], only=[label]))
        assert {column.label for column in table.metrics} == {"cut", label}
        assert conclusion(table)[0].endswith(".")


def test_values_that_are_no_numbers_are_shown_and_never_best(make_study):
    source = make_study(["pp", "flap"], [0.4])
    source.trials[0].metric("perplexity").pruned["perplexity"] = "inf"
    table = summarise(source)
    column = table.metric("perplexity.perplexity")
    assert table.cell(by_name(table)["PP"], column).text == "inf"
    assert conclusion(table)[0].startswith("At a requested ratio of 40%, FLAP changes perplexity from 24.00 to 36.00")


# Published values


def test_published_values_stand_beside_ours(make_study):
    where = {"prune.use": "pp", "prune.ratio": 0.4}
    source = make_study(
        ["pp", "flap"],
        published=[
            {"where": where, "metric": "perplexity.perplexity", "value": 16.8, "source": "A"},
            {"where": {}, "dense": True, "metric": "perplexity.perplexity", "value": 6.0, "source": "B"},
            {"where": {**where, "prune.skip_layers": [0]}, "metric": "zero_shot.mean", "value": 0.5, "source": "C"},
            {"where": {**where, "prune.skip_layers": [1]}, "metric": "zero_shot.mean", "value": 0.5, "source": "D"},
        ],
    )
    ours = source.trials[1].metric("perplexity").pruned["perplexity"]
    rows = compare_with_published(summarise(source))
    assert [row.source for row in rows] == ["A", "B", "C", "D"]
    assert rows[0].theirs == "16.80" and rows[0].ours == f"{ours:.2f}"
    assert rows[0].difference == f"{ours - 16.8:+.3g} ({100 * (ours / 16.8 - 1):+.0f}%)"
    assert rows[1].where == "dense"
    assert rows[2].ours == "57.0%" and rows[2].difference == "+7.0 points"
    assert rows[3].ours == "not measured"
