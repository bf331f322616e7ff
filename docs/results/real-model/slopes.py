"""What least squares gains: by calibration tokens, ridge, share of the slope, and the sites that it is used at.

python docs/results/real-model/slopes.py novel-1.txt novel-2.txt --measure wikitext2-test.txt

A static cut by PP's score. The first table has the perplexity without compensation, with the calibrated means, and with
least squares by several ridges, for every number of calibration sequences. The second has least squares in attention
alone, in MLPs alone, and with the ridge and share chosen by a part of the text that it was not fitted on.
"""

from __future__ import annotations

import argparse
import math
import warnings
from typing import Literal

import torch
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, Compensator, NoCompensation, Prepared, PruneWarning, SiteCovariance
from prunekit.strategies.compensation import LeastSquares, Mean
from sources import cutting, first_windows, loss, mixture, parser, run, started, static_perplexity, table
from torch import Tensor


class LeastSquaresIn(LeastSquares):
    """Least squares at the consumers with so many channels; the other sites are not compensated."""

    name: Literal["least_squares_in"] = "least_squares_in"  # type: ignore[assignment]  # a component has a name of its own
    channels: int

    def mean(self, calibrated: Tensor, probe: Tensor | None) -> Tensor:
        return calibrated if len(calibrated) == self.channels else torch.zeros_like(calibrated)

    def prepare(self, covariance: SiteCovariance) -> Prepared | None:
        return super().prepare(covariance) if len(covariance.matrix) == self.channels else None


def options() -> argparse.Namespace:
    made = cutting(parser(__doc__))
    made.add_argument("--more", type=int, nargs="*", default=[], help="further numbers of calibration sequences")
    made.add_argument("--ridges", type=float, nargs="*", default=[0.01, 0.1, 1.0])
    return made.parse_args()


def main() -> None:
    chosen = options()
    model, tokenizer = started(chosen)
    windows = first_windows(tokenizer, chosen.measure, chosen.windows, chosen.length)
    sites = find_sites(model, Catalog.discover(), "kv_group")[1]
    channels = {site.kind: site.channels for site in sites}
    statistics = SharedStatistics(texts=1, covariance_bytes=2**31)

    def perplexity(sequences: Tensor, compensate: Compensator) -> str:
        return static_perplexity(chosen, model, sequences, windows, compensate=compensate, statistics=statistics)

    print(
        f"Perplexity on {len(windows)} windows of {chosen.length} tokens; dense {math.exp(loss(model, windows)):.2f}\n"
    )
    arms: dict[str, Compensator] = {"none": NoCompensation(), "mean": Mean()}
    arms |= {f"ridge {ridge:g}": LeastSquares(ridge=ridge) for ridge in chosen.ridges}
    arms["default ridge"] = LeastSquares()
    cells = []
    for count in (chosen.sequences, *chosen.more):
        sequences, _ = mixture(tokenizer, chosen.texts, count, chosen.length)
        each = count * chosen.length / channels["mlp"]
        cells.append([f"{sequences.numel():,}", f"{each:.1f}", *(perplexity(sequences, arm) for arm in arms.values())])
    print(table(["tokens", "per MLP channel", *arms], cells))

    parts: dict[str, Compensator] = {"held out": LeastSquares(held_out=2)}
    parts |= {f"{kind} alone": LeastSquaresIn(channels=count) for kind, count in channels.items()}
    print(f"\n{table(['tokens', *parts], [[cells[-1][0], *(perplexity(sequences, arm) for arm in parts.values())]])}")


if __name__ == "__main__":
    warnings.simplefilter("ignore", PruneWarning)
    run(main)
