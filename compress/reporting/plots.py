"""All figures of a report: those whose data is there."""

from __future__ import annotations

from .aggregate import Table
from .figures import Plot
from .plot_costs import cost_plots
from .plot_layers import layer_plots
from .plot_quality import quality_plots


def draw(table: Table) -> list[Plot]:
    """Quality against cost and by ratio, what happens per layer, where time and operations go."""
    return [*quality_plots(table), *cost_plots(table), *layer_plots(table)]
