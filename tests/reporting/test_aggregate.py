"""Tables: seeds together, dense models apart, marks, whatever was measured."""

from dataclasses import replace
from statistics import stdev

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.findings import Trial
from prunekit.compress.reporting.protocols import Protocols
from prunekit.compress.reporting.published import beside
from prunekit.compress.reporting.rows import rows_of
from prunekit.compress.reporting.verdict import bounds, conclusion


def by_name(table):
    return {table.name(configuration): configuration for configuration in table.configurations}


def test_seeds_are_taken_together(make_findings):
    table = tabulate(make_findings(["pp", "flap"], [0.4], seeds=(0, 1, 2)))
    assert table.axes == ["prune.use"] and table.repeated == ["seed"]
    pp = by_name(table)["PP"]
    column = table.column("perplexity.perplexity")
    values = [trial.outcome("perplexity")["pruned"]["perplexity"] for trial in pp.trials]
    cell = pp.cell(column)
    assert len(pp.trials) == 3
    assert cell.mean == pytest.approx(sum(values) / 3) and cell.sd == pytest.approx(stdev(values))
    assert cell.text == f"{cell.mean:.2f} ± {cell.sd:.2f}"
    flops = table.column("cost.flops_ratio")
    assert pp.cell(flops).sd is None and pp.cell(flops).text == "70%"  # the same for every seed: no spread to show


def test_rows_begin_with_dense_and_say_their_protocol(make_findings):
    table = tabulate(make_findings(["pp", "wanda_sp"]))
    protocols = Protocols()
    rows = rows_of(table, table.columns, protocols)
    assert [row.dense for row in rows] == [True, False, False, False, False]
    assert [text for text, _ in rows[0].settings] == ["dense", ""]
    assert [[text for text, _ in row.settings] for row in rows[1:]] == [
        ["PP", "20%"], ["Wanda-sp", "20%"], ["PP", "40%"], ["Wanda-sp", "40%"]
    ]  # fmt: skip
    titles = [column.title for column in table.columns]
    dense = dict(zip(titles, rows[0].cells, strict=True))
    assert dense["FLOPs"].text == "100%" and dense["prefill time"].text == "1.00" and dense["zero-shot"].text == "61.0%"
    assert dense["perplexity"].protocol.facts[:2] == (("text", "bundled reference-evaluation"), ("window", "128"))
    assert (
        "from 0.71 to 0.78 over the repetitions" in dict(zip(titles, rows[3].cells, strict=True))["prefill time"].about
    )
    assert [row.starts_block for row in rows] == [False, False, False, True, False]
    assert {"strangers own: score", "strangers own: shape"} <= set(titles)


def test_the_best_of_every_ratio_is_marked_among_what_saves(make_findings):
    table = tabulate(make_findings())
    marked = {(table.name(c), key) for c in table.configurations for i, key in table.best if i == id(c)}
    quality = {pair for pair in marked if pair[1] in ("perplexity.perplexity", "zero_shot.mean")}
    assert quality == {(f"PP, {r}", key) for r in ("20%", "40%") for key in ("perplexity.perplexity", "zero_shot.mean")}
    assert not {pair for pair in marked if pair[1] == "cost.flops_ratio"}  # four share the least
    assert bounds(table) == (
        "full-batch probing computes more than the dense model: a bound to compare with, no contender here."
    )


def test_prr_says_that_no_time_is_saved(make_findings):
    table = tabulate(make_findings(["full_batch_probing"]))
    assert table.configurations[0].cell(table.column("prr.prr")).text == "no time saved"


def test_two_texts_have_two_dense_rows(make_findings, run_data):
    findings = make_findings(["pp"], [0.4])
    other = [
        Trial(9 + i, {"prune.use": "pp", "prune.ratio": r, "on": "other"}, "done", run_data("pp", r, ids="b" * 64))
        for i, r in enumerate((0.2, 0.4))
    ]
    first = replace(findings.trials[0], settings={**findings.trials[0].settings, "on": "same"})
    table = tabulate(replace(findings, trials=(first, *other), axes={}))
    assert [reference.settings["on"] for reference in table.dense] == ["same", "other"]
    assert [c.reference for c in table.configurations] == [0, 1, 1]


def test_any_subset_of_evaluators_makes_a_table(make_findings):
    findings = make_findings(["pp", "flap"])
    for label in ("perplexity", "strangers_own", "overlap"):
        trials = [
            replace(t, data={**t.data, "metrics": [o for o in t.data["metrics"] if o["label"] == label]})
            for t in findings.trials
        ]
        table = tabulate(replace(findings, trials=tuple(trials)))
        assert {column.label for column in table.columns} == {label}
        assert conclusion(table).endswith(".")


def test_values_that_are_no_numbers_are_shown_and_never_best(make_findings):
    findings = make_findings(["pp", "flap"], [0.4])
    findings.trials[0].outcome("perplexity")["pruned"]["perplexity"] = "inf"
    table = tabulate(findings)
    column = table.column("perplexity.perplexity")
    assert by_name(table)["PP"].cell(column).text == "inf"
    assert conclusion(table).startswith("FLAP at 40% moves perplexity from 24.00 to 36.00")


# Published values


def test_published_values_stand_beside_ours(make_findings):
    where = {"prune.use": "pp", "prune.ratio": 0.4}
    findings = make_findings(
        ["pp", "flap"],
        published=[
            {"where": where, "metric": "perplexity.perplexity", "value": 16.8, "source": "A"},
            {"where": {}, "dense": True, "metric": "perplexity.perplexity", "value": 6.0, "source": "B"},
            {"where": {**where, "prune.skip_layers": [0]}, "metric": "zero_shot.mean", "value": 0.5, "source": "C"},
            {"where": {**where, "prune.skip_layers": [1]}, "metric": "zero_shot.mean", "value": 0.5, "source": "D"},
        ],
    )
    ours = findings.trials[1].outcome("perplexity")["pruned"]["perplexity"]
    rows = beside(tabulate(findings))
    assert [row.source for row in rows] == ["A", "B", "C", "D"]
    assert rows[0].theirs == "16.80" and rows[0].ours == f"{ours:.2f}"
    assert rows[0].difference == f"{ours - 16.8:+.3g} ({100 * (ours / 16.8 - 1):+.0f}%)"
    assert rows[1].where == "dense"
    assert rows[2].ours == "57.0%" and rows[2].difference == "+7.0 points"
    assert rows[3].ours == "not measured"
