"""Figures: the Pareto front, which are drawn, the same bytes again, and drawings that fit any page."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prunekit.compress.reporting.aggregate import tabulate
from prunekit.compress.reporting.figures import COLOURS, HATCHES, MARKERS, VARIABLES
from prunekit.compress.reporting.plot_layers import chance_level
from prunekit.compress.reporting.plot_quality import Series, pareto
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
    assert "at 123%" in plots["perplexity-perplexity-cost-flops_ratio"].svg  # full-batch probing, beyond the edge


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
