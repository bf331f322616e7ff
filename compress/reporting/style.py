"""The style of all plots, and how a figure becomes files and a drawing in the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..output.reading import brief

INK, MUTED, RULE, PAPER = "#16191d", "#59616b", "#d8dce1", "#fdfefe"
"""Text, secondary text, grid lines and background; the page replaces each of them by its value."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4e9b", "#8c6d46")
"""Okabe and Ito's palette without yellow and black, which have little contrast on white and black, and two more."""
MARKERS = ("o", "s", "^")
"""They differ clearly at the smallest size; further series have open ones."""
FILLS = ("full", "none")
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "///", "xxx", "\\\\\\")
HEAT = LinearSegmentedColormap.from_list("calm", ("#eef3f7", "#8fb9d3", "#0b4f7d"))
"""From light for small values to dark for large ones."""

VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--c{index}" for index, colour in enumerate(COLOURS)
}
"""The page's variable for each colour; its values follow light, dark and print."""

STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.facecolor": "none", "figure.facecolor": PAPER, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.5, "lines.markersize": 6,
    "text.parse_math": False,  # a dollar sign in a label does not start mathematics
    "hatch.linewidth": 0.6, "svg.fonttype": "none", "figure.constrained_layout.use": True,
}  # fmt: skip

WIDTH = 5.2
"""Inches: two figures side by side on a desktop's page, one across a phone's."""


@dataclass(frozen=True)
class Plot:
    """One figure as files."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    svg: str
    png: bytes
    wide: bool = False
    """Whether it takes the page's whole width."""

    @property
    def inline(self) -> str:
        """The drawing for the page: without background, with the page's colours and font, and ids of its own."""
        body = self.svg[self.svg.index("<svg") :]
        body = body.replace(f'style="fill: {PAPER}"', 'style="fill: none"', 1)  # the background is drawn first
        for colour, variable in VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        body = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r'(xlink:href="#|url\(#)', rf"\1{self.name}-", body)
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
        body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
        start, rest = body.split(">", 1)
        start = re.sub(r'\s(width|height)="[^"]*"', "", start)
        return f'{start} role="img" aria-label="{escape(self.title)}">{rest}'


@contextmanager
def drawing(width: float = WIDTH, *, height: float) -> Iterator[Figure]:
    """An empty figure in the reports' style; sizes in inches."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height))


def finished(figure: Figure, name: str, title: str, caption: str, wide: bool = False) -> Plot:
    """The figure's files; call it within :func:`drawing`."""
    for text in figure.findobj(Text):
        text.set_text(brief(text.get_text()))  # a name of a hundred thousand characters would take minutes to draw
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg")
    figure.savefig(png, format="png", dpi=200)
    file_name = "".join(c if c.isalnum() or c == "-" else "_" for c in name.replace(".", "-"))
    return Plot(file_name, title, caption, svg.getvalue(), png.getvalue(), wide)


def percent(value: float, _place: float = 0) -> str:
    """A share as a tick's label, with the decimals it needs: 35%, 37.5%."""
    return f"{round(100 * value, 4) + 0:g}%"


def ink_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is readable on a colour (red, green, blue, opacity from 0 to 1)."""
    red, green, blue, _ = colour
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def heat_map(
    panel: Axes,
    values: Sequence[Sequence[float]],
    colours: Colormap,
    ends: tuple[float, float],
    columns: Sequence[str],
    rows: Sequence[str],
) -> QuadMesh:
    """Draw cells of colour, dark for good ones, with the titles of columns and rows; ``ends`` are of the scale."""
    mesh = panel.pcolormesh(values, cmap=colours, vmin=ends[0], vmax=ends[1], edgecolors=PAPER, linewidth=0.8)
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_xticks([i + 0.5 for i in range(len(columns))], [*map(brief, columns)])
    panel.set_yticks([i + 0.5 for i in range(len(rows))], [*map(brief, rows)])
    return mesh


def colour_bar(figure: Figure, mesh: QuadMesh, panels: Any, label: str, shrink: float = 0.35) -> Colorbar:
    """The scale of a heat map below its panels."""
    bar = figure.colorbar(mesh, ax=panels, location="bottom", shrink=shrink, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return bar
