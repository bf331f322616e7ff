"""What happens in each layer: how many units stay, and how far two choices of them agree."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import Colormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .aggregate import Table
from .configurations import Configuration
from .figures import LINES, MUTED, PAPER, WIDTH, Plot, drawing, finished
from .findings import finite
from .plot_quality import Series

KINDS = ("attention", "mlp")
MOST_ROWS = 40
"""Configurations that fit a heat map."""
MOST_LINES = 8
"""Configurations that can be told apart as lines in one panel."""
WRITTEN = 16
"""Most layers for which a heat map's cells carry their number."""
PROBES_ALL = "full_batch_probing"
OVERLAPS = {"full_batch": "with full-batch probing", "between_batches": "between batches"}


def layer_plots(table: Table) -> list[Plot]:
    """Heat maps of the kept units, and overlap per layer."""
    return [plot for plot in (_kept(table), *(_overlap(table, what) for what in OVERLAPS)) if plot is not None]


def _kept(table: Table) -> Plot | None:
    folded: dict[str, list[Configuration]] = {}
    for c in table.configurations:
        folded.setdefault(repr([c.kept(kind) for kind in KINDS]), []).append(c)
    groups = list(folded.values())[:MOST_ROWS]
    rows = [group[0] for group in groups]
    kinds = [kind for kind in KINDS if any(share is not None for c in rows for share in c.kept(kind))]
    layers = max((len(c.kept(kinds[0])) for c in rows), default=0) if kinds else 0
    if not layers:
        return None
    names = [_together([table.name(c) for c in group]) for group in groups]
    with drawing(2 * WIDTH + 0.4, 0.9 + 0.27 * len(rows)) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        colours = colormap()
        for panel, kind in zip(panels, kinds, strict=True):
            shares = [[share if share is not None else float("nan") for share in c.kept(kind)] for c in rows]
            shares = [row + [float("nan")] * (layers - len(row)) for row in shares]
            mesh = panel.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.8)
            panel.set(xlabel="layer", title={"attention": "attention", "mlp": "MLP"}[kind])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
            step = 1 if layers <= WRITTEN else 4
            panel.set_xticks([i + 0.5 for i in range(0, layers, step)], [str(i) for i in range(0, layers, step)])
            panel.set_yticks([i + 0.5 for i in range(len(rows))], names)
            if layers <= WRITTEN:
                _write(panel, shares, colours)
        panels[0].invert_yaxis()
        if layers > WRITTEN:
            bar = figure.colorbar(mesh, ax=panels, location="bottom", shrink=0.35, aspect=40, pad=0.02)
            bar.outline.set_visible(False)
            bar.set_label("share of the layer's units that stay")
        left_out = len(table.configurations) - sum(map(len, groups))
        note = f" {left_out} more configurations are in table.csv." if left_out else ""
        caption = (
            f"Units that each layer keeps, in percent (attention: heads or key/value groups; MLP: channels).{note}"
            f"{_folded(table, groups)}"
        )
        return finished(figure, "kept-units", "Kept units per layer", caption, wide=True)


def _together(names: list[str]) -> str:
    """One name for configurations that share a row."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _folded(table: Table, groups: list[list[Configuration]]) -> str:
    said = ["; ".join(map(table.name, group)) for group in groups if len(group) > 1]
    return f" Configurations that keep as many everywhere share a row: {' - '.join(said)}." if said else ""


def _write(panel: Any, shares: list[list[float]], colours: Colormap) -> None:
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share == share:
                ink = ink_on(colours(share))
                panel.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=7)


def ink_on(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is read on a colour (red, green, blue, opacity from 0 to 1)."""
    red, green, blue, _ = colour
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def colormap() -> Colormap:
    """The colours of all heat maps."""
    import matplotlib

    return matplotlib.colormaps["cividis"]


def _overlap(table: Table, what: str) -> Plot | None:
    found = [(c, _details(table, c, what)) for c in table.configurations]
    found = [(c, details) for c, details in found if any(_numbers(values) for values in details.values())]
    once = [c for c, details in found if what == "between_batches" and _always_one(details)]
    found = sorted((pair for pair in found if pair[0] not in once), key=lambda pair: -(pair[0].ratio or 0))
    rows = _few(found)
    if not rows:
        return None
    series = Series(table)
    ratios = list(dict.fromkeys(c.ratio for c, _ in rows))
    styles = [{**series.style(c).marker, "linestyle": LINES[ratios.index(c.ratio) % len(LINES)]} for c, _ in rows]
    kinds = [kind for kind in KINDS if any(_numbers(details.get(kind)) for _, details in rows)]
    with drawing(2 * WIDTH + 0.4, 3.4) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            for style, (configuration, details) in zip(styles, rows, strict=True):
                values = [finite(value) for value in details.get(kind) or ()]
                points = [(layer, value) for layer, value in enumerate(values) if value is not None]
                if points:
                    panel.plot(*zip(*points, strict=True), **style)
                    chance = chance_level(table, configuration, kind)
                    panel.plot(range(len(chance)), chance, color=MUTED, linewidth=0.8, linestyle=":")
            panel.set(xlabel="layer", title={"attention": "attention", "mlp": "MLP"}[kind], ylim=(0, 1.04))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("Jaccard overlap")
        handles = [Line2D([], [], **style, label=table.name(c)) for style, (c, _) in zip(styles, rows, strict=True)]
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":", label="chance"))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), handlelength=2.6)
        caption = (
            f"Overlap of the kept units {OVERLAPS[what]}, per layer: 1 is the same units, dotted is what choosing as "
            "many at random gives."
        )
        itself = [details for c, details in rows if c.strategy == PROBES_ALL]
        if what == "full_batch" and not all(map(_always_one, itself)):
            caption += (
                " Full-batch probing is not 1 with itself: its own decisions take earlier batches in, those it is "
                "compared with do not."
            )
        if once:
            caption += " Configurations that decide once have 1 everywhere and are left out."
        if len(found) > len(rows):
            caption += f" Shown are {len(rows)} of {len(found)} configurations, those cut hardest."
        name = "overlap-" + what.replace("_", "-")
        return finished(figure, name, f"Overlap per layer, {OVERLAPS[what]}", caption, wide=True)


def _few(found: list[tuple[Configuration, dict]]) -> list[tuple[Configuration, dict]]:
    """All configurations of the highest ratios, as many whole ratios as can be told apart in one figure."""
    rows: list[tuple[Configuration, dict]] = []
    for ratio in dict.fromkeys(configuration.ratio for configuration, _ in found):
        same = [pair for pair in found if pair[0].ratio == ratio]
        if rows and len(rows) + len(same) > MOST_LINES:
            break
        rows += same
    return rows[:MOST_LINES]


def _details(table: Table, configuration: Configuration, what: str) -> dict[str, list]:
    for outcome in configuration.first.outcomes:
        if outcome["evaluator"] == "overlap":
            found = ((outcome.get("details") or {}).get("pruned") or {}).get(what)
            return found if isinstance(found, dict) else {}
    return {}


def _always_one(details: dict[str, list]) -> bool:
    return all(value == 1 for values in details.values() for value in _numbers(values))


def _numbers(values: Any) -> list[float]:
    return [value for value in values or () if finite(value) is not None]


def chance_level(table: Table, configuration: Configuration, kind: str) -> list[float]:
    """Per layer, the overlap of two random choices: as measured, else k / (2 - k) for a share k, for many units."""
    stated = _details(table, configuration, "chance").get(kind)
    shares = configuration.kept(kind)
    if stated and len(stated) == len(shares):
        return [float("nan") if finite(value) is None else value for value in stated]
    return [share / (2 - share) if share is not None else float("nan") for share in shares]
