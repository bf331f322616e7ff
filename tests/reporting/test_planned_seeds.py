"""Seeds that failed or wait: counted, without a mark, and no obstacle for others."""

import csv
import io
from dataclasses import replace

import pytest
from prunekit.compress.reporting.page import markdown
from prunekit.compress.reporting.plots import draw
from prunekit.compress.reporting.ranking import marked as best
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import explanation, table_csv
from prunekit.compress.reporting.trials import Trial
from prunekit.compress.runs.records import RunResult


def trials_of(use, values, run_data, perplexity, status="failed"):
    """A trial for each seed; those without a value failed or wait."""
    made = []
    for seed, value in enumerate(values):
        settings = {"prune.use": use, "prune.ratio": 0.4, "seed": seed}
        state = (status, None)
        if value is not None:
            data = run_data(use, 0.4)
            data["metrics"] = [perplexity(value, seed), *(o for o in data["metrics"] if o["label"] == "cost")]
            state = ("done", RunResult.model_validate(data))
        made.append(Trial(len(made) + 1, settings, *state, error="it broke" if value is None else None))
    return made


@pytest.fixture
def study(make_study, run_data, perplexity):
    """Tables of one ratio: strategy -> perplexity of each planned seed, None where it is not finished."""

    def make(status="failed", **values):
        trials = [t for use, each in values.items() for t in trials_of(use, each, run_data, perplexity, status)]
        source = make_study(list(values), [0.4], seeds=range(max(map(len, values.values()))))
        return replace(source, trials=tuple(trials))

    return make


def marked(table, key="perplexity.perplexity"):
    return [table.name(c) for c in table.configurations if (c.number, key) in best(table)]


@pytest.mark.parametrize("status", ["failed", "waiting"])
def test_the_survivor_of_failed_seeds_gets_no_mark(study, status):
    source = study(status, pp=(20.0, 21.0, 22.0), flap=(19.0, None, None), wanda_sp=(24.0, 24.5, 25.0))
    table = summarise(source)
    column = table.metric("perplexity.perplexity")
    cells = {table.name(c): table.cell(c, column) for c in table.configurations}
    assert cells["FLAP"].text == "19.00 (1 of 3)" and not cells["FLAP"].complete
    assert cells["PP"].text == "21.00 ± 1.00" and cells["PP"].complete
    assert marked(table) == ["PP"]
    assert "**19.00" not in markdown(table, [])
    assert "has a value for every planned repetition" in " ".join(explanation(table))
    rows = {row["prune.use"]: row for row in csv.DictReader(io.StringIO(table_csv(table))) if row["kind"] == "pruned"}
    assert [(row["trials"], row["planned"]) for row in rows.values()] == [("3", "3"), ("1", "3"), ("3", "3")]


def test_two_survivors_have_their_own_spread(study):
    table = summarise(study(pp=(20.0, None, 22.0), flap=(25.0, 26.0, 27.0)))
    assert table.cell(table.configurations[0], table.metric("perplexity.perplexity")).text == "21.00 ± 1.41 (2 of 3)"
    assert marked(table) == []  # nothing that is complete is left to compare with


def test_a_value_that_one_seed_lacks_gets_no_mark(study):
    source = study(pp=(20.0, 21.0), flap=(25.0, 26.0), wanda_sp=(27.0, 28.0))
    source.trials[1].metric("perplexity").pruned["perplexity"] = None
    assert marked(summarise(source)) == ["FLAP"]


def test_what_has_no_finished_trial_is_no_row(study):
    source = study(pp=(20.0, 21.0), flap=(None, None))
    table = summarise(source)
    assert [table.name(c) for c in table.configurations] == ["PP"]
    assert "flap" in markdown(table, []).lower()  # among what was not measured


def test_only_planned_seeds_count(study):
    source = study(pp=(20.0, 21.0, 22.0), flap=(19.0, None, None))
    table = summarise(replace(source, trials=source.trials[:4]))  # as if the others were excluded
    assert [c.planned for c in table.configurations] == [3, 1]
    assert marked(table) == ["FLAP"]


def test_a_failed_trial_finds_its_configuration_without_a_resolved_pipeline(make_study, resolved):
    source = make_study(["pp", "flap"], [0.4], seeds=(0, 1))
    short = [replace(t, settings={k: t.settings[k] for k in ("prune.use", "seed")}) for t in source.trials]
    failed = replace(short[1], status="failed", result=None, resolved=None)
    table = summarise(replace(source, trials=(short[0], failed, *source.trials[2:])))
    assert [(c.settings["prune.ratio"], len(c.trials), c.planned) for c in table.configurations] == [
        (0.4, 1, 2), (0.4, 2, 2)
    ]  # fmt: skip


def test_the_front_passes_by_what_lacks_seeds(study):
    plots = draw(summarise(study(pp=(20.0, 21.0), flap=(19.0, None), wanda_sp=(27.0, 28.0))))
    caption = next(plot.caption for plot in plots if plot.name.endswith("cost-flops_ratio"))
    front = caption.partition("front: ")[2].partition(".")[0]
    assert "FLAP" not in front and "Wanda-sp" in front
    assert "Configurations with missing seeds are not on it." in caption
