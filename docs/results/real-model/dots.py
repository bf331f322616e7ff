"""A plot of a study: a row for each strategy, a mark for each trial, a panel for each ratio; lower values lie left.

python docs/results/real-model/dots.py strategies.csv strategies.svg --marks text

The table is trials.csv of `prunekit report`. Rows are sorted by the worst mark of the first panel. The line is dense.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pandas
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

SHAPES = ("o", "s", "D", "^", "v")
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", type=Path, help="trials.csv of a report")
    made.add_argument("plot", type=Path, help="the file to write (.svg, .png)")
    made.add_argument("--value", default="perplexity.perplexity", help="the column that is drawn (perplexity)")
    made.add_argument("--rows", default="strategy", help="the axis whose values are rows (strategy)")
    made.add_argument("--marks", default="text", help="the axis whose values have marks of their own (text)")
    made.add_argument("--panels", default="prune.ratio", help="the axis whose values are panels (prune.ratio)")
    return made.parse_args()


def main() -> None:
    chosen = options()
    table = pandas.read_csv(chosen.table)
    table = table[table.status == "done"]
    dense = float(table[f"{chosen.value}.dense"].iloc[0])
    panels, marks = list(table[chosen.panels].unique()), list(table[chosen.marks].unique())
    first = table[table[chosen.panels] == panels[0]]
    rows = list(first.groupby(chosen.rows)[chosen.value].max().sort_values().index)
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "prunekit", "svg.fonttype": "none"})
    height = 1.3 + 0.27 * len(rows)
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, figsize=(8, height), layout="constrained")
    for axis, panel in zip(axes if len(panels) > 1 else [axes], panels, strict=True):
        for mark, shape, colour in zip(marks, SHAPES, COLOURS, strict=False):
            here = table[(table[chosen.panels] == panel) & (table[chosen.marks] == mark)]
            places = [rows.index(row) for row in here[chosen.rows]]
            axis.scatter(here[chosen.value], places, marker=shape, color=colour, s=28, alpha=0.8, zorder=3)
        axis.axvline(dense, color="#555", linestyle=":", linewidth=1)
        axis.set(xscale="log", title=f"{panel:.0%} cut", xlabel=chosen.value.partition(".")[2])
        wide = axis.get_xlim()[1] > 5 * axis.get_xlim()[0]
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if wide else (1, 2, 3, 4, 5, 6, 7, 8, 9)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, color="#ddd", linewidth=0.6)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D([], [], marker=shape, color=colour, linestyle="", label=str(mark))
        for mark, shape, colour in zip(marks, SHAPES, COLOURS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(chosen.plot, metadata={"Date": None} if chosen.plot.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
