"""Dense rows: one for each model and protocol, labelled, with values that were measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prunekit.compress.ablation.published import Published
from prunekit.compress.reporting.plots import draw
from prunekit.compress.reporting.protocols import Protocols
from prunekit.compress.reporting.published import compare_with_published
from prunekit.compress.reporting.ranking import conclusion, ranking_table
from prunekit.compress.reporting.ranking import marked as best
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import table_rows
from prunekit.compress.reporting.trials import Study, Trial
from prunekit.compress.runs.records import RunResult


@pytest.fixture
def study(run_data):
    """A study of trials, each given as its settings and a change to what was measured (label -> change)."""

    def make(*planned, axes=None, resolved=None):
        trials = []
        for settings, change in planned:
            use, ratio = settings.get("prune.use", "pp"), settings.get("prune.ratio", 0.4)
            data = run_data(use, ratio)
            for outcome in data["metrics"]:
                change(outcome)
            data["metrics"] = [outcome for outcome in data["metrics"] if outcome["label"] != "gone"]
            result = RunResult.model_validate(data)
            trials.append(Trial(len(trials) + 1, settings, "done", result, resolved(settings) if resolved else None))
        names = dict.fromkeys(name for settings, _ in planned for name in settings)
        axes = {name: list(dict.fromkeys(s[name] for s, _ in planned if name in s)) for name in names}
        return Study("A study", Path("study.sqlite"), tuple(trials), axes)

    return make


def changed(label, dense=None, **protocol):
    """A change of one evaluator's protocol and dense values."""

    def change(outcome):
        if outcome["label"] == label:
            outcome["protocol"] |= protocol
            outcome["dense"] = {**(outcome["dense"] or {}), **(dense or {})}

    return change


def nothing(outcome):
    pass


def shown(table, title):
    """First cells of every row, and its value in one column."""
    rows = table_rows(table, table.metrics, Protocols())
    index = [column.title for column in table.metrics].index(title)
    return [(*row.settings, row.cells[index].text) for row in rows]


def limits(study, uses=("pp", "flap"), ratios=(0.4,)):
    return study(
        *(
            (
                {"prune.use": use, "prune.ratio": ratio, "evaluate.1.limit": n},
                changed("zero_shot", {"mean": m}, limit=n),
            )
            for use in uses
            for ratio in ratios
            for n, m in ((10, 0.5), (60, 0.533))
        )
    )


def test_no_dense_value_is_made_of_two_protocols(study):
    table = summarise(limits(study))
    assert shown(table, "zero-shot")[:2] == [("dense", "10", "50.0%"), ("dense", "60", "53.3%")]
    assert [c.reference for c in table.configurations] == [0, 0, 1, 1]
    assert all(len({c.reference for c in block}) == 1 for block in table.blocks())


@pytest.mark.parametrize(
    ("label", "key"), [("latency", "length"), ("cost", "batch_size"), ("memory", "decode_steps"), ("prr", "latency")]
)
def test_every_evaluators_protocol_tells_dense_models_apart(study, label, key):
    values = [{"length": n} if label == "prr" else n for n in (64, 256)]
    table = summarise(
        study(
            *(({"prune.use": use, "on": str(v)}, changed(label, **{key: v})) for use in ("pp", "flap") for v in values)
        )
    )
    assert [d.settings for d in table.dense] == [{"on": str(v)} for v in values]
    names = [[table.name(c) for c in block] for block in table.blocks()]
    assert names == [[f"{use} ({value})" for use in ("PP", "FLAP")] for value in map(str, values)]


@pytest.mark.parametrize(
    ("label", "facts"),
    [
        ("latency", [{"processor": "one", "threads": 1, "torch": "2.6"}, {"processor": "two", "accelerator": "H"}]),
        ("cost", [{"text": "random ids, seed 0"}, {"text": "random ids, seed 1"}]),
        ("zero_shot", [{"seed": 1}, {"seed": 2}]),
        ("prr", [{"dense_seconds": 0.1, "pruned_perplexity": 3.0}, {"dense_seconds": 0.2, "pruned_perplexity": 4.0}]),
        ("overlap", [{"sites": 14}, {"sites": 9}]),
        ("strangers_own", [{"seconds_it_took": 1.5}, {"seconds_it_took": 2.5}]),
    ],
)
def test_machines_seeds_and_measured_values_do_not(study, label, facts):
    table = summarise(
        study(*(({"prune.use": u}, changed(label, **f)) for u, f in zip(("pp", "flap"), facts, strict=True)))
    )
    assert len(table.dense) == 1 and len(table.blocks()) == 1


def test_what_differs_by_the_seed_does_not(study):
    table = summarise(
        study(
            *(
                ({"prune.use": use, "seed": seed}, changed("perplexity", ids_sha256=str(seed)))
                for use, seeds in (("pp", (0, 1)), ("flap", (0,)))
                for seed in seeds
            )
        )
    )
    assert len(table.dense) == 1 and len(table.blocks()) == 1


def test_a_strangers_options_tell_dense_models_apart(study):
    def pipeline(settings):
        return yaml.safe_dump({"evaluate": [{"name": "strangers_own", "depth": settings["on"], "seed": 3}]})

    table = summarise(study(*(({"prune.use": "pp", "on": n}, nothing) for n in (1, 2)), resolved=pipeline))
    assert [d.settings for d in table.dense] == [{"on": 1}, {"on": 2}]


def test_two_models_are_two_dense_rows(study):
    source = study(*(({"prune.use": u, "model": m}, nothing) for m in ("a", "b") for u in ("pp", "flap")))
    trials = []
    for trial in source.trials:
        model = trial.result.model.model_copy(update={"fingerprint": trial.settings["model"] * 64})
        trials.append(replace(trial, result=trial.result.model_copy(update={"model": model})))
    table = summarise(replace(source, trials=tuple(trials)))
    assert [d.settings for d in table.dense] == [{"model": "a"}, {"model": "b"}]
    assert [c.reference for c in table.configurations] == [0, 0, 1, 1]


def test_two_circumstances_label_four_dense_rows(study):
    table = summarise(
        study(
            *(
                ({"prune.use": u, "text": t, "evaluate.0.window": w}, changed("perplexity", text=t, window=w))
                for t in "ab"
                for w in (32, 64)
                for u in ("pp", "flap")
            )
        )
    )
    assert [tuple(d.settings.values()) for d in table.dense] == [("a", 32), ("a", 64), ("b", 32), ("b", 64)]


def test_dense_rows_say_so_where_every_axis_tells_them_apart(study):
    source = study(
        *(
            ({"evaluate.0.window": w}, changed("perplexity", {"perplexity": d}, window=w))
            for w, d in ((32, 50.0), (64, 37.0))
        )
    )
    table = summarise(source)
    assert [row[:2] for row in shown(table, "perplexity")] == [
        ("dense, 32", "50.00"), ("dense, 64", "37.00"), ("32", "33.60"), ("64", "33.60")
    ]  # fmt: skip
    about = table_rows(table, table.metrics, Protocols())[1].cells[1].about
    assert about.startswith("dense (window = 64), perplexity: 37.00")


def test_a_study_of_seeds_alone_has_labels(study):
    table = summarise(study(*(({"seed": seed}, nothing) for seed in (0, 1))))
    assert [row[:2] for row in shown(table, "FLOPs")] == [("dense", ""), ("PP", "40%")]


def without(label, **protocol):
    """A change that takes away what one evaluator found; the text of another's protocol changes with it."""

    def change(outcome):
        changed("perplexity", **protocol)(outcome)
        outcome["label"] = "gone" if outcome["label"] == label else outcome["label"]

    return change


def test_what_lacks_an_evaluator_joins_what_has_it(study):
    planned = [({"prune.use": u, "text": t}, changed("perplexity", text=t)) for t in "ab" for u in ("pp", "flap")]
    table = summarise(study(({"prune.use": "random", "text": "b"}, without("perplexity")), *planned))
    assert [d.settings for d in table.dense] == [{"text": "b"}, {"text": "a"}]
    assert [table.name(c) for c in table.configurations if c.reference == 0] == ["random (b)", "PP (b)", "FLAP (b)"]


def test_what_joins_makes_no_bridge_between_protocols(study):
    table = summarise(
        study(
            ({"prune.use": "pp", "on": "x"}, changed("perplexity", text="a")),
            ({"prune.use": "random", "on": "x"}, without("perplexity")),
            ({"prune.use": "flap", "on": "y"}, without("zero_shot", text="b")),
        )
    )
    assert [[c.strategy for c in table.configurations if c.reference == i] for i in range(len(table.dense))] == [
        ["pp", "random"], ["flap"]
    ]  # fmt: skip


def test_dense_rows_are_named_after_what_is_measured_not_after_what_is_pruned(study):
    bound = (("pp", "a"), ("flap", "b"))
    trials = [({"prune.use": u, "text": t}, changed("perplexity", text=t)) for u, t in bound]
    assert [d.settings for d in summarise(study(*trials)).dense] == [{"text": "a"}, {"text": "b"}]
    trials = [({"prune.use": u}, change) for (u, _), (_, change) in zip(bound, trials, strict=True)]
    assert [d.settings for d in summarise(study(*trials)).dense] == [{"prune.use": "pp"}, {"prune.use": "flap"}]


def test_protocols_behind_a_free_name_never_compete(study):
    table = summarise(study(*(({"measured": w}, changed("perplexity", window=w)) for w in ("short", "long"))))
    assert table.conditions == [] and [len(block) for block in table.blocks()] == [1, 1]


def test_protocols_never_compete(study):
    shots = [
        ({"evaluate.1.num_fewshot": n, "prune.ratio": 0.4}, changed("zero_shot", tasks={"t": {"num_fewshot": n}}))
        for n in (0, 5)
    ]
    source = study(*shots)
    for trial, mean in zip(source.trials, (0.4, 0.6), strict=True):
        trial.metric("zero_shot").pruned.update({"mean": mean, "boolq_stderr": 0.001, "piqa_stderr": 0.001})
    table = summarise(source)
    assert table.conditions == ["evaluate.1.num_fewshot"] and not best(table)
    assert [len(block) for block in table.blocks()] == [1, 1]
    assert ranking_table(table, table.metric("zero_shot.mean"))[1] == []
    assert "highest" not in " ".join(conclusion(table))


def test_circumstances_part_what_one_dense_model_shares(study):
    table = summarise(
        study(*(({"prune.use": u, "calibrated": t}, nothing) for t in ("same", "other") for u in ("pp", "flap")))
    )
    assert len(table.dense) == 1
    assert [[table.name(c) for c in block] for block in table.blocks()] == [
        ["PP (same)", "FLAP (same)"], ["PP (other)", "FLAP (other)"]
    ]  # fmt: skip
    marked = {table.name(c) for c in table.configurations if (c.number, "perplexity.perplexity") in best(table)}
    assert marked == {"PP (same)", "PP (other)"}


def test_of_repeated_times_the_median_stands(study):
    seconds = (0.3, 0.1, 0.2)
    table = summarise(
        study(
            *(
                ({"prune.use": "pp", "seed": i}, changed("latency", {"prefill_seconds": s}))
                for i, s in enumerate(seconds)
            )
        )
    )
    metric = replace(table.metric("latency.prefill_ratio"), name="prefill_seconds")
    assert table.dense_cell(0, metric).mean == 0.2


def test_bars_and_published_values_name_their_dense_model(study):
    source = limits(study, ratios=(0.2, 0.4))
    entry = Published(where={}, dense=True, metric="zero_shot.mean", value=0.5, source="A")
    table = summarise(replace(source, published=(entry,)))
    rows = [(row.where, row.ours) for row in compare_with_published(table)]
    assert rows == [("dense (limit = 10)", "50.0%"), ("dense (limit = 60)", "53.3%")]
    drawn = {plot.name: plot.svg for plot in draw(table)}
    assert all(f"dense (limit = {n})" in drawn[f"where-{what}"] for n in (10, 60) for what in ("time", "operations"))
