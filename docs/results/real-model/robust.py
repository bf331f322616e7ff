"""Massive tokens limited, or counted apart from the others: in PP's score, and in the covariance of least squares.

python docs/results/real-model/robust.py novel-1.txt novel-2.txt --measure wikitext2-test.txt

A static cut by PP's score. *Limited*: the input of a token at a consumer is scaled down until its squared norm is at
most so many times the median's; the limits are options. *Apart*: the massive tokens, with more than 100 times the
median, are scaled until all of them together weigh as much as all others together, so that neither hides the other.
The table has the perplexity of every score without compensation, and of least squares from limited tokens with PP's
own score.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal
from unittest.mock import patch

from prunekit.registry import (
    ChannelHistory,
    ChannelMoments,
    Compensator,
    MeanSquare,
    NoCompensation,
    PruneWarning,
    Scorer,
    Statistic,
)
from prunekit.strategies.compensation import LeastSquares
from prunekit.strategies.pp import PPsp
from sources import cutting, first_windows, mixture, parser, run, started, static_perplexity, table
from torch import Tensor

MASSIVE = 100
"""Times the median's squared norm."""


def limited(x: Tensor, times: float) -> Tensor:
    """x (..., C), no token with more than ``times`` the median's squared norm."""
    norms = x.float().square().sum(-1, keepdim=True)
    return x * (times * norms.median() / norms.clamp(min=1e-12)).clamp(max=1).sqrt()


def apart(x: Tensor) -> Tensor:
    """x (..., C), massive tokens together with the squared norm of all others together."""
    norms = x.float().square().sum(-1, keepdim=True)
    massive = norms > MASSIVE * norms.median()
    if not bool(massive.any()):
        return x
    scale = (norms[~massive].sum() / norms[massive].sum()).sqrt()
    return x * scale.where(massive, 1.0)


class Limited(MeanSquare):
    """Mean square of limited tokens."""

    times: float

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        super().observe(history, limited(x, self.times), valid)


class Apart(MeanSquare):
    """Mean square where massive tokens are counted apart."""

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        super().observe(history, apart(x), valid)


def scorer_of(kept: Statistic) -> Scorer:
    """PP's score of another statistic."""

    class Scored(PPsp):
        name: Literal["scored"] = "scored"  # type: ignore[assignment]  # a component has a name of its own
        statistic: ClassVar[Statistic | None] = kept

    return Scored()


@contextmanager
def moments_of(times: float) -> Iterator[None]:
    """Within it covariances are those of limited tokens."""
    observe = ChannelMoments.observe

    def observe_limited(moments: ChannelMoments, x: Tensor, valid: Tensor | None) -> None:
        observe(moments, limited(x, times), valid)

    with patch.object(ChannelMoments, "observe", observe_limited):
        yield


def main() -> None:
    made = cutting(parser(__doc__))
    made.add_argument("--times", type=float, nargs="*", default=[3.0, 30.0], help="limits, times the median (3 30)")
    chosen: argparse.Namespace = made.parse_args()
    model, tokenizer = started(chosen)
    windows = first_windows(tokenizer, chosen.measure, chosen.windows, chosen.length)
    sequences, _ = mixture(tokenizer, chosen.texts, chosen.sequences, chosen.length)

    def perplexity(scorer: Scorer, compensate: Compensator) -> str:
        return static_perplexity(chosen, model, sequences, windows, scorer=scorer, compensate=compensate)

    scorers = {"PPsp": PPsp(), "apart": scorer_of(Apart())}
    scorers |= {f"limited to {times:g}": scorer_of(Limited(times=times)) for times in chosen.times}
    rows = [[name, perplexity(scorer, NoCompensation()), ""] for name, scorer in scorers.items()]
    rows[0][2] = perplexity(PPsp(), LeastSquares())
    for row, times in zip(rows[2:], chosen.times, strict=True):
        with moments_of(times):
            row[2] = perplexity(PPsp(), LeastSquares())
    print(table(["massive tokens", "score", "PPsp, least squares from them"], rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore", PruneWarning)
    run(main)
