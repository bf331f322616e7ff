"""Plots: the Pareto front, which are drawn, and drawings that fit the page."""

import re
from itertools import pairwise

import pytest
from prunekit.compress.reporting.front import front
from prunekit.compress.reporting.plots import FLOP_PARTS, LOOKS, TIME_PARTS, draw, outliers, pareto, series_of
from prunekit.compress.reporting.style import HATCHES, HEAT, MARKERS, VARIABLES, drawing, finished, heat_map, percent
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.runs.records import RunResult

PERPLEXITY_PLOTS = ("latency-prefill_ratio", "cost-flops_ratio", "by-ratio")


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 5.0), (0.5, 9.0), (0.7, 6.0), (0.7, 7.0), (0.8, 6.0), (0.9, 5.0)]
    assert pareto(points, higher=False) == [1, 2, 5]
    assert pareto([(x, -y) for x, y in points], higher=True) == [1, 2, 5]


# What is drawn


@pytest.fixture(scope="module")
def drawn():
    """All figures of a study with everything in it, drawn once."""
    return {}


@pytest.fixture
def plots(drawn, make_study):
    if not drawn:
        labels = ("perplexity", "cost", "latency", "overlap")
        drawn["table"] = summarise(make_study(["flap", "pp", "full_batch_probing"], only=labels))
        drawn["plots"] = {plot.name: plot for plot in draw(drawn["table"])}
    return drawn["plots"]


def test_every_figure_is_drawn_where_its_data_is(plots):
    assert set(plots) == {
        *(f"perplexity-perplexity-{name}" for name in PERPLEXITY_PLOTS),
        "where-time", "where-operations", "kept-units", "overlap-full-batch", "overlap-between-batches",
    }  # fmt: skip
    assert all(plot.png.startswith(b"\x89PNG") and plot.caption.endswith(".") for plot in plots.values())


def test_no_figure_is_drawn_without_its_data(make_study):
    source = make_study(["pp"], [0.4], only=["perplexity"])
    assert [plot.name for plot in draw(summarise(source))] == ["kept-units"]
    source = make_study(["pp"], [0.4], only=["strangers_own"])
    source.trials[0].result.layers.clear()
    assert draw(summarise(source)) == []


def test_drawings_take_the_pages_colours_and_own_ids(plots):
    for plot in plots.values():
        inline = plot.inline
        left = [colour for colour in VARIABLES if colour in inline]
        assert not left, f"{plot.name} keeps {left}"
        assert "<style" not in inline and "DejaVu" not in inline and 'role="img"' in inline
        ids = re.findall(r'\bid="([^"]+)"', inline)
        assert len(ids) == len(set(ids)) and all(name.startswith(plot.name) for name in ids)
        used = re.findall(r'(?:url\(#|href="#)([^)"]+)', inline)
        assert set(used) <= set(ids)


def test_the_front_is_named_and_expensive_points_are_on_the_axis(plots):
    caption = plots["perplexity-perplexity-cost-flops_ratio"].caption
    assert "On the Pareto front: FLAP (40%), PP (40%), FLAP (20%), PP (20%). What is" in caption
    assert ">300%<" not in plots["perplexity-perplexity-cost-flops_ratio"].svg  # full-batch probing: 123% and 139%
    assert ">200%<" in plots["perplexity-perplexity-latency-prefill_ratio"].svg  # 233% and 249%


def by_name(configurations, table):
    return [table.name(configuration) for configuration in configurations]


def test_the_front_is_of_significant_differences_with_all_that_tie(make_study, perplexity, run_data):
    def found(flap, pp_flops=0.70):
        source = make_study(["pp", "flap", "wanda_sp"], [0.4], only=["perplexity", "cost"])
        for trial, value, flops in zip(source.trials, (33.6, flap, 36.0), (pp_flops, 0.68, 0.69), strict=True):
            made = RunResult.model_validate({**run_data(), "metrics": [perplexity(value)]}).metrics[0]
            trial.metric("perplexity").details.update(made.details)
            trial.metric("perplexity").pruned.update(made.pruned)
            trial.metric("cost").pruned["flops_ratio"] = flops
        table = summarise(source)
        members, why = front(table, table.metric("perplexity.perplexity"), table.metric("cost.flops_ratio"))
        assert not why
        return by_name(members, table)

    assert found(34.8) == ["FLAP", "PP"]  # Wanda-sp is worse at more cost
    assert found(34.8, pp_flops=0.685) == ["PP"]  # FLAP is worse at about the same cost
    assert found(33.61) == ["FLAP"]  # PP is not significantly better than what costs less


def test_no_front_where_all_tie_or_questions_are_few(make_study):
    source = make_study(["pp", "flap"], [0.2, 0.4], only=["zero_shot", "cost"])
    for trial in source.trials:
        trial.metric("zero_shot").pruned.update({"mean": 0.5, "boolq_stderr": 0.1, "piqa_stderr": 0.1})
    table = summarise(source)
    cost = table.metric("cost.flops_ratio")
    assert front(table, table.metric("zero_shot.mean"), cost) == ([], "all configurations tie in zero-shot")
    for trial, mean in zip(source.trials, (1.0, 0.5, 0.75, 0.25), strict=True):
        scores = {"boolq": [float(i < 12 * mean) for i in range(12)], "piqa": [float(i < 12 * mean) for i in range(12)]}
        trial.metric("zero_shot").details["pruned"] = {"scores": scores}
        trial.metric("zero_shot").pruned["mean"] = mean
    table = summarise(source)
    assert front(table, table.metric("zero_shot.mean"), cost) == ([], "24 questions are too few")
    caption = {plot.name: plot.caption for plot in draw(table)}["zero_shot-mean-cost-flops_ratio"]
    assert "No Pareto front: 24 questions are too few." in caption


def test_a_few_values_far_above_are_written_beyond_the_axis(make_study):
    assert outliers({0: 30.0, 1: 31.0, 2: 33.0, 3: 36.0, 4: 75.0}, dense=28.0) == [4]
    assert outliers({0: 30.0, 1: 31.0, 2: 70.0, 3: 75.0}, dense=28.0) == []  # half of them are not an exception
    source = make_study(["pp", "flap", "wanda_sp", "random"], [0.2, 0.4], harm=1.0, only=["perplexity", "cost"])
    source.trials[-1].metric("perplexity").pruned["perplexity"] = 999.5
    plot = next(plot for plot in draw(summarise(source)) if plot.name.endswith("by-ratio"))
    assert ">999.5<" in plot.svg and ">1000<" not in plot.svg and "not to scale" in plot.caption


def test_the_ratio_is_encoded_in_the_size(plots):
    svg = plots["perplexity-perplexity-cost-flops_ratio"].svg
    assert ">requested 20%<" in svg and ">requested 40%<" in svg


def test_many_bars_are_divided_by_ratio(make_study):
    source = make_study([f"own_{i}" for i in range(8)], [0.2, 0.4], only=["cost"], harm=1.0)
    names = {plot.name for plot in draw(summarise(source))}
    assert {"where-operations-20", "where-operations-40"} <= names and "where-operations" not in names


def test_long_texts_are_shortened():
    with drawing(30, height=20) as figure:
        panel = figure.subplots()
        panel.plot([1, 2], label="begin " + "x" * 100_000 + " end")
        heat_map(panel, [[0.5]], HEAT, (0, 1), ["y" * 100_000], ["y" * 100_000])
        figure.legend()
        svg = finished(figure, "long", "title", "caption").svg
    assert "begin xx" in svg and "xx end" in svg and "x" * 120 not in svg and "y" * 120 not in svg


def test_ticks_say_the_decimals_that_they_have():
    assert [percent(value) for value in (0, -0.0, 0.35, 0.375, 0.4, 0.1 + 0.2, 1)] == [
        "0%", "0%", "35%", "37.5%", "40%", "30%", "100%"
    ]  # fmt: skip


def test_a_part_looks_the_same_in_every_figure(plots):
    assert LOOKS["attention"] == LOOKS["attention_projections"]
    for parts in (TIME_PARTS, FLOP_PARTS):
        looks = [LOOKS[part] for part in parts]
        assert len(set(looks)) == len(looks)
        colours = [colour for colour, _ in looks]
        assert all(one != other for one, other in pairwise(colours))


def test_configurations_that_keep_as_many_share_a_row(make_study):
    source = make_study(["random", "pp", "flap"], [0.2, 0.4], only=["similarity"])
    (kept,) = draw(summarise(source))
    assert "random (20%) and 2 more" in kept.svg and "random (40%) and 2 more" in kept.svg
    assert "PP (20%)" not in kept.svg and "share a row" in kept.caption


def test_series_differ_by_more_than_colour(plots, drawn, make_study):
    styles = [series.style["marker"] for series in series_of(drawn["table"])]
    assert len(set(styles)) == len(styles) == 3
    table = summarise(make_study([f"own_{i}" for i in range(24)], [0.4], only=["perplexity"], harm=1.0))
    looks = {tuple(series.style[key] for key in ("color", "marker", "fillstyle")) for series in series_of(table)}
    assert len(looks) == 24 and len(set(MARKERS)) == 3
    assert len(set(HATCHES)) == len(HATCHES)
