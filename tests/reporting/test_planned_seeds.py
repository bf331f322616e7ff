"""Seeds that failed or wait: counted, without a mark, and no obstacle for others."""

import csv
import io
from dataclasses import replace

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.findings import Trial
from prunekit.compress.reporting.plots import draw
from prunekit.compress.reporting.tables import explanation, markdown, table_csv


def trials_of(use, values, run_data, perplexity, status="failed"):
    """A trial for each seed; those without a value failed or wait."""
    made = []
    for seed, value in enumerate(values):
        settings = {"prune.use": use, "prune.ratio": 0.4, "seed": seed}
        data = None
        if value is not None:
            data = run_data(use, 0.4)
            data["metrics"] = [perplexity(value, seed), *(o for o in data["metrics"] if o["label"] == "cost")]
        state = (status, None) if value is None else ("done", data)
        made.append(Trial(len(made) + 1, settings, *state, error="it broke" if value is None else None))
    return made


@pytest.fixture
def study(make_findings, run_data, perplexity):
    """Tables of one ratio: strategy -> perplexity of each planned seed, None where it is not finished."""

    def make(status="failed", **values):
        trials = [t for use, each in values.items() for t in trials_of(use, each, run_data, perplexity, status)]
        findings = make_findings(list(values), [0.4], seeds=range(max(map(len, values.values()))))
        return replace(findings, trials=tuple(trials))

    return make


def marked(table, key="perplexity.perplexity"):
    return [table.name(c) for c in table.configurations if (id(c), key) in table.best]


@pytest.mark.parametrize("status", ["failed", "waiting"])
def test_the_survivor_of_failed_seeds_gets_no_mark(study, status):
    findings = study(status, pp=(20.0, 21.0, 22.0), flap=(19.0, None, None), wanda_sp=(24.0, 24.5, 25.0))
    table = tabulate(findings)
    column = table.column("perplexity.perplexity")
    cells = {table.name(c): c.cell(column) for c in table.configurations}
    assert cells["FLAP"].text == "19.00 (1 of 3)" and not cells["FLAP"].complete
    assert cells["PP"].text == "21.00 ± 1.00" and cells["PP"].complete
    assert marked(table) == ["PP"]
    assert "**19.00" not in markdown(table, [])
    assert "has a value for every planned repetition" in " ".join(explanation(table))
    rows = {row["prune.use"]: row for row in csv.DictReader(io.StringIO(table_csv(table))) if row["kind"] == "pruned"}
    assert [(row["trials"], row["planned"]) for row in rows.values()] == [("3", "3"), ("1", "3"), ("3", "3")]


def test_two_survivors_have_their_own_spread(study):
    table = tabulate(study(pp=(20.0, None, 22.0), flap=(25.0, 26.0, 27.0)))
    assert table.configurations[0].cell(table.column("perplexity.perplexity")).text == "21.00 ± 1.41 (2 of 3)"
    assert marked(table) == []  # nothing that is complete is left to compare with


def test_a_value_that_one_seed_lacks_gets_no_mark(study):
    findings = study(pp=(20.0, 21.0), flap=(25.0, 26.0), wanda_sp=(27.0, 28.0))
    findings.trials[1].outcome("perplexity")["pruned"]["perplexity"] = None
    assert marked(tabulate(findings)) == ["FLAP"]


def test_what_has_no_finished_trial_is_no_row(study):
    findings = study(pp=(20.0, 21.0), flap=(None, None))
    table = tabulate(findings)
    assert [table.name(c) for c in table.configurations] == ["PP"]
    assert "flap" in markdown(table, []).lower()  # among what was not measured


def test_only_planned_seeds_count(study):
    findings = study(pp=(20.0, 21.0, 22.0), flap=(19.0, None, None))
    table = tabulate(replace(findings, trials=findings.trials[:4]))  # as if the others were excluded
    assert [c.planned for c in table.configurations] == [3, 1]
    assert marked(table) == ["FLAP"]


def test_a_failed_trial_finds_its_configuration_without_a_resolved_pipeline(make_findings, resolved):
    findings = make_findings(["pp", "flap"], [0.4], seeds=(0, 1))
    short = [replace(t, settings={k: t.settings[k] for k in ("prune.use", "seed")}) for t in findings.trials]
    failed = replace(short[1], status="failed", data=None, resolved=None)
    table = tabulate(replace(findings, trials=(short[0], failed, *findings.trials[2:])))
    assert [(c.settings["prune.ratio"], len(c.trials), c.planned) for c in table.configurations] == [
        (0.4, 1, 2), (0.4, 2, 2)
    ]  # fmt: skip


def test_the_front_passes_by_what_lacks_seeds(study):
    plots = draw(tabulate(study(pp=(20.0, 21.0), flap=(19.0, None), wanda_sp=(27.0, 28.0))))
    caption = next(plot.caption for plot in plots if plot.name.endswith("cost-flops_ratio"))
    front = caption.partition("in both: ")[2].partition(".")[0]
    assert "FLAP" not in front and "Wanda-sp" in front
    assert "Points of which seeds have no value are not on it." in caption
