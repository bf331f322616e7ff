"""What cutting every site alone costs, and whether the sum of these increases predicts a cut of all sites.

python docs/results/real-model/sites.py novel-1.txt novel-2.txt --plot sites.svg

Units are cut by PP's score, calibrated on the sequences of the texts; the loss is measured on further sequences of
theirs, with all other sites whole. Then all sites are cut to the ratio, with the counts of ``uniform`` (without the
first three layers, where there are more), of ``sensitivity``, which adds up what was measured, and, with --greedy, of
``greedy``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from prunekit.compress.calibration.losses import CutLosses
from prunekit.compress.calibration.passes import calibrate, no_progress
from prunekit.compress.engine.runtime import Runtime
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.pruning.prune import engine_of
from prunekit.compress.reporting.style import HEAT, colour_bar, drawing, finished, heat_map
from prunekit.compress.runs.text import in_batches
from prunekit.registry import MEASURED_LENGTH, Catalog, Site, SiteScores
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.greedy import Greedy
from prunekit.strategies.sensitivity import Sensitivity
from sources import mixture, parser, run, started, table
from torch import Tensor

LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
WHOLE = (0, 1, 2)
"""Layers that uniform counts leave whole, as in PP's paper."""

Increases = dict[int, float]
"""By number of cut units: what the cut of one site adds to the loss, in nats."""


def options() -> argparse.Namespace:
    made = parser(__doc__)
    rows = f"sequences whose first {MEASURED_LENGTH} tokens are measured (4)"
    made.add_argument("--rows", type=int, default=4, help=rows)
    made.add_argument("--ratio", type=float, default=0.4, help="of the cuts of all sites (0.4)")
    made.add_argument("--greedy", action="store_true", help="measure greedy counts, too")
    made.add_argument("--plot", type=Path, help="draw the increases here, as SVG")
    return made.parse_args()


@contextmanager
def measuring(model: object, sequences: Tensor, measured: Tensor) -> Iterator[tuple[list[SiteScores], CutLosses]]:
    """The scores of all sites by the sequences, and the losses of cuts on the rows that are measured."""
    catalog = Catalog.discover()
    score_once = build_strategy(catalog, "pp", {"ratio": 0.0, "selector": None, "merger": None})
    engine, _ = engine_of(model, score_once, catalog, None, Runtime())
    try:
        calibrate(engine, in_batches(sequences, 4), no_progress)
        losses = CutLosses(engine, in_batches(measured, 4), {}, no_progress)
        yield [engine.decider.scores(cut) for cut in engine.cuts], losses
    finally:
        engine.remove()


def drops(site: Site) -> list[int]:
    """Numbers of units whose cut is measured, as ``sensitivity`` does."""
    if site.units <= 2 * len(LEVELS):
        return list(range(1, site.units + 1))
    return [round(level * site.units) for level in LEVELS]


def alone(sites: Sequence[Site], losses: CutLosses, tokens: int) -> list[Increases]:
    """What the cuts of every site alone add to the loss."""
    whole = [site.units for site in sites]
    cuts = [(place, dropped) for place, site in enumerate(sites) for dropped in drops(site)]
    candidates = [[*whole[:place], whole[place] - dropped, *whole[place + 1 :]] for place, dropped in cuts]
    dense, *found = losses([whole, *candidates], tokens)
    increases: list[Increases] = [{} for _ in sites]
    for (place, dropped), loss in zip(cuts, found, strict=True):
        increases[place][dropped] = loss - dense
    return increases


def total(sites: Sequence[Site], counts: Sequence[int], increases: Sequence[Increases]) -> float:
    """The sum of the increases of all sites, as ``sensitivity`` adds them up: interpolated, and never decreasing."""
    return sum(
        float(np.interp(site.units - count, [0, *found], np.maximum.accumulate([0.0, *found.values()])))
        for site, count, found in zip(sites, counts, increases, strict=True)
    )


def freed(sites: Sequence[Site], counts: Sequence[int]) -> float:
    """Share of the parameters of all units that is cut."""
    every = sum(site.units * site.unit_parameters for site in sites)
    return 1 - sum(count * site.unit_parameters for site, count in zip(sites, counts, strict=True)) / every


def uniform(scores: Sequence[SiteScores], ratio: float) -> list[int]:
    """Uniform counts: the ratio of all layers is taken from those that are not left whole."""
    layers = {each.site.layer for each in scores}
    others = layers - set(WHOLE) if len(layers) > 2 * len(WHOLE) else layers
    cut = [each for each in scores if each.site.layer in others]
    found = dict(zip(map(id, cut), Uniform().allocate(cut, ratio * len(layers) / len(others)), strict=True))
    return [found.get(id(each), each.site.units) for each in scores]


def draw(path: Path, sites: Sequence[Site], increases: Sequence[Increases]) -> None:
    """A heat map for each kind of site: layers from left to right, cuts from bottom to top."""
    with drawing(9, height=4.2) as figure:
        panels = figure.subplots(2, 1)
        for panel, kind in zip(panels, ("attention", "mlp"), strict=True):
            of_kind = [(site, found) for site, found in zip(sites, increases, strict=True) if site.kind == kind]
            units = of_kind[0][0].units
            rows = [f"{dropped / units:.0%}" for dropped in of_kind[0][1]]
            values = np.array([list(found.values()) for _, found in of_kind]).T.clip(0)
            mesh = heat_map(panel, values, HEAT, (0, 0.5), [str(site.layer) for site, _ in of_kind], rows)
            panel.set_title({"attention": "Attention: share of the key/value groups cut", "mlp": "MLP"}[kind])
        colour_bar(figure, mesh, panels, "loss added by this cut alone, nats (0.5 and more: darkest)")
        path.write_text(finished(figure, path.stem, "Cuts of single sites", "").svg, encoding="utf-8")


def main() -> None:
    chosen = options()
    model, tokenizer = started(chosen)
    sequences, measured = mixture(tokenizer, chosen.texts, chosen.sequences, chosen.length, chosen.rows)
    tokens = len(measured) * min(chosen.length, MEASURED_LENGTH)
    with measuring(model, sequences, measured) as (scores, losses):
        sites = [each.site for each in scores]
        whole = [site.units for site in sites]
        dense = losses([whole], tokens)[0]
        increases = alone(sites, losses, tokens)
        print(f"Loss added by cuts of one site, nats; dense {dense:.3f} on {tokens} tokens")
        for kind in ("attention", "mlp"):
            of_kind = [(site, found) for site, found in zip(sites, increases, strict=True) if site.kind == kind]
            head = [f"layer, {kind}", *(f"{dropped} of {of_kind[0][0].units}" for dropped in of_kind[0][1])]
            cells = [[str(site.layer), *(f"{value:.3f}" for value in found.values())] for site, found in of_kind]
            print(f"\n{table(head, cells)}")

        budgets = {
            "uniform": uniform(scores, chosen.ratio),
            "sensitivity": Sensitivity(levels=LEVELS, tokens=tokens).allocate(scores, chosen.ratio, losses),
        }
        if chosen.greedy:
            budgets["greedy"] = Greedy(tokens=tokens).allocate(scores, chosen.ratio, losses)
        cells = [
            [name, f"{freed(sites, counts):.1%}", *(f"{value:.2f}" for value in (summed, joint - dense))]
            for name, counts in budgets.items()
            for summed, joint in [(total(sites, counts, increases), losses([counts], tokens)[0])]
        ]
        print("\nAll sites cut\n")
        print(table(["counts of", "parameters cut", "sum of the increases", "loss added"], cells))
        if chosen.plot is not None:
            draw(chosen.plot, sites, increases)


if __name__ == "__main__":
    run(main)
