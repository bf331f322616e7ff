"""How figures look and how they are written: the same bytes for the same data, for pages, print and slides."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#16191d", "#59616b", "#d8dce1", "#fdfefe"
"""Text, secondary text, grid lines and background; each is found again in the SVG by its value."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4e9b", "#8c6d46")
"""Okabe and Ito's palette without yellow and black, which are hard to see on white and on black, and two more."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
FILLS = ("full", "none", "left", "top")
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
HATCHES = ("", "///", "xxx", "\\\\\\", "---", "|||", "//", "+++", "\\\\")

VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    colour: f"--c{index}" for index, colour in enumerate(COLOURS)
}
"""Colour in a drawing -> the page's variable, which light, dark and print set."""

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "prunekit",
    "figure.constrained_layout.use": True,
}

WIDTH = 5.2
"""Inches: two figures beside each other on a desktop's page, one across a phone's, both readable."""


@dataclass(frozen=True)
class Plot:
    """One drawn figure."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    svg: str
    """The whole file, with a background."""
    png: bytes
    wide: bool = False
    """Whether it takes the page's whole width."""

    @property
    def inline(self) -> str:
        """The drawing for a page: no background, colours and font of the page, ids of its own."""
        body = self.svg[self.svg.index("<svg") :]
        body = body.replace(f'style="fill: {PAPER}"', 'style="fill: none"', 1)  # the background is drawn first
        for colour, variable in VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        body = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r'(xlink:href="#|url\(#)', rf"\1{self.name}-", body)
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
        body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
        label = f'role="img" aria-label="{escape(self.title)}"'
        return re.sub(r"<svg ([^>]*)>", lambda found: f"<svg {label} {_sized(found[1])}>", body, count=1)


def percent(value: float, _place: int = 0) -> str:
    """A tick's share in percent, with the decimals that it has: 35%, 37.5%."""
    return f"{round(100 * value, 4) + 0:g}%"


def _sized(attributes: str) -> str:
    """An svg element's attributes without its fixed size: the page gives it one."""
    return re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)


@contextmanager
def drawing(width: float = WIDTH, height: float = 3.7) -> Iterator[Figure]:
    """An empty figure, in inches, within the reports' style."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        yield Figure(figsize=(width, height))


def finished(figure: Figure, name: str, title: str, caption: str, wide: bool = False) -> Plot:
    """The figure's files; call it within :func:`drawing`."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both files
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return Plot(name, title, caption, svg.getvalue(), png.getvalue(), wide)


def safe_name(name: str) -> str:
    """A file name of what a figure shows."""
    return "".join(c if c.isalnum() or c == "-" else "_" for c in name.replace(".", "-"))
