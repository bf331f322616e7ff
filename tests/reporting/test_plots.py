"""Figures: the Pareto front, which are drawn, the same bytes again, and drawings that fit any page."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.figures import COLOURS, HATCHES, MARKERS, VARIABLES, percent
from prunekit.compress.reporting.plot_costs import FLOP_PARTS, LOOKS, TIME_PARTS
from prunekit.compress.reporting.plot_layers import chance_level
from prunekit.compress.reporting.plot_quality import Series, label_beyond, pareto
from prunekit.compress.reporting.plots import draw

PERPLEXITY_PLOTS = ("latency-prefill_ratio", "cost-flops_ratio", "by-ratio")


def only(findings, *labels):
    """The findings with what some evaluators found."""
    trials = [
        replace(t, data={**t.data, "metrics": [o for o in t.data["metrics"] if o["label"] in labels]})
        for t in findings.trials
    ]
    return replace(findings, trials=tuple(trials))


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 5.0), (0.5, 9.0), (0.7, 6.0), (0.7, 7.0), (0.8, 6.0), (0.9, 5.0)]
    assert pareto(points, higher=False) == [1, 2, 5]
    assert pareto([(x, -y) for x, y in points], higher=True) == [1, 2, 5]


@pytest.fixture(scope="module")
def drawn():
    """All figures of a study with everything in it, drawn once."""
    return {}


@pytest.fixture
def plots(drawn, make_findings):
    if not drawn:
        findings = make_findings(["flap", "pp", "full_batch_probing"])
        drawn["table"] = tabulate(only(findings, "perplexity", "cost", "latency", "overlap"))
        drawn["plots"] = {plot.name: plot for plot in draw(drawn["table"])}
    return drawn["plots"]


def test_every_figure_is_drawn_where_its_data_is(plots):
    assert set(plots) == {
        *(f"perplexity-perplexity-{name}" for name in PERPLEXITY_PLOTS),
        "where-time", "where-operations", "kept-units", "overlap-full-batch", "overlap-between-batches",
    }  # fmt: skip
    assert all(plot.png.startswith(b"\x89PNG") and plot.caption.endswith(".") for plot in plots.values())


def test_no_figure_is_drawn_without_its_data(make_findings):
    findings = make_findings(["pp"], [0.4])
    assert [plot.name for plot in draw(tabulate(only(findings, "perplexity")))] == ["kept-units"]
    for trial in findings.trials:
        trial.data["layers"] = []
    assert draw(tabulate(only(findings, "strangers_own"))) == []


def test_the_same_findings_give_the_same_bytes(make_findings):
    table = tabulate(only(make_findings(["pp", "flap"]), "perplexity"))
    first, second = draw(table), draw(table)
    assert [(p.name, p.svg, p.png) for p in first] == [(p.name, p.svg, p.png) for p in second]
    assert not re.search(r"\d\d:\d\d:\d\d", first[0].svg)


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


def test_the_front_is_named(plots):
    caption = plots["perplexity-perplexity-cost-flops_ratio"].caption
    assert "Pareto front, which nothing beats in both: FLAP, 40%; PP, 40%; FLAP, 20%; PP, 20%; dense." in caption
    assert "at 1" not in plots["perplexity-perplexity-cost-flops_ratio"].svg  # 123% and 139% are on the axis


def test_what_is_beyond_the_edge_is_named_without_overprinting(plots):
    svg = plots["perplexity-perplexity-latency-prefill_ratio"].svg  # full-batch probing: 233% and 249%
    assert "at 233%" in svg and "at 249%" in svg
    axes = Figure().subplots()
    axes.set(xlim=(0.5, 1.6), ylim=(20, 30))
    label_beyond(axes, [(2.0, 25.2), (1.7, 25.0), (3.0, 29.0), (1.8, 25.4), (1.9, 25.5)])
    assert [text.get_text() for text in axes.texts] == ["at 170% to 200%", "at 300%"]


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
    # Print leaves hatches out by their ids: no pattern is drawn without one.
    inline = plots["where-time"].inline
    hatched = re.findall(r'<g id="([^"]+)">\s*<path [^>]*style="fill: url', inline)
    assert hatched and all("-hatch-" in name for name in hatched)
    assert len(hatched) == inline.count("fill: url(")


def test_configurations_that_keep_as_many_share_a_row(make_findings):
    findings = make_findings(["random", "pp", "flap"], [0.2, 0.4])
    kept = next(plot for plot in draw(tabulate(only(findings, "similarity"))) if plot.name == "kept-units")
    assert "random, 20% and 2 more" in kept.svg and "random, 40% and 2 more" in kept.svg
    assert "PP, 20%" not in kept.svg and "random, 20%; PP, 20%; FLAP, 20% - random, 40%;" in kept.caption


def test_series_differ_by_more_than_colour(plots, drawn):
    series = Series(drawn["table"])
    styles = [style.marker["marker"] for style in series.groups(drawn["table"])]
    assert len(set(styles)) == len(styles) == 3
    assert len(set(zip(COLOURS * 11, MARKERS * 8, strict=True))) == 88  # colours and markers do not repeat together
    assert len(set(HATCHES)) == len(HATCHES)


def test_chance_is_as_measured_or_computed(drawn, plots):
    table = drawn["table"]
    configuration = table.configurations[0]
    assert chance_level(table, configuration, "mlp")[1] == 0.43
    bare = SimpleNamespace(first=SimpleNamespace(outcomes=[]), kept=lambda kind: [1.0, 0.5, None])
    assert chance_level(table, bare, "mlp")[:2] == [1.0, pytest.approx(1 / 3)]
