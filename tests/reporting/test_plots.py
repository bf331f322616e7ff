"""Plots: the Pareto front, which are drawn, and drawings that fit the page."""

import re
from itertools import pairwise

import pytest
from prunekit.compress.reporting.plots import FLOP_PARTS, LOOKS, TIME_PARTS, draw, pareto, series_of
from prunekit.compress.reporting.style import COLOURS, HATCHES, MARKERS, VARIABLES, percent
from prunekit.compress.reporting.summary import summarise

PERPLEXITY_PLOTS = ("latency-prefill_ratio", "cost-flops_ratio", "by-ratio")


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 5.0), (0.5, 9.0), (0.7, 6.0), (0.7, 7.0), (0.8, 6.0), (0.9, 5.0)]
    assert pareto(points, higher=False) == [1, 2, 5]
    assert pareto([(x, -y) for x, y in points], higher=True) == [1, 2, 5]


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
    assert "On the Pareto front: FLAP (40%); PP (40%); FLAP (20%); PP (20%); dense." in caption
    assert ">300%<" not in plots["perplexity-perplexity-cost-flops_ratio"].svg  # full-batch probing: 123% and 139%
    assert ">200%<" in plots["perplexity-perplexity-latency-prefill_ratio"].svg  # 233% and 249%


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


def test_series_differ_by_more_than_colour(plots, drawn):
    styles = [series.style["marker"] for series in series_of(drawn["table"])]
    assert len(set(styles)) == len(styles) == 3
    assert len(set(zip(COLOURS * 11, MARKERS * 8, strict=True))) == 88  # colours and markers do not repeat together
    assert len(set(HATCHES)) == len(HATCHES)
