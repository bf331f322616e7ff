"""Massive activations: where they are, what cutting their channels costs, and which scores keep these.

python docs/results/real-model/massive.py novel-1.txt novel-2.txt

The energy of a token at an MLP is the sum over channels of the squared input of the consumer times the squared norm of
the channel's column. A token is massive where it has more than 100 times the energy of the median token. The first
table has the shares of the first token of every sequence, of all massive tokens, and of the top channel. The second is
of the layers where the top channel has much: the increase of the loss where this channel, all others, or 40% by a score
are cut in that layer alone. The last cuts all MLPs except those of the first three layers. Scores are computed from all
tokens, and from all that are not massive. The loss is measured on further sequences of the texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, Scorer, Site
from prunekit.strategies.pp import PPsp
from prunekit.strategies.wanda_sp import WandaSpScorer
from sources import loss, mixture, parser, run, started, table
from torch import Tensor

SCORES: dict[str, Scorer] = {"PPsp": PPsp(), "Wanda-sp": WandaSpScorer()}


WHOLE = (0, 1, 2)
"""Layers that are not cut with the others."""


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=4, help="sequences that losses are measured on (4)")
    made.add_argument("--ratio", type=float, default=0.4, help="share of the channels that scores cut (0.4)")
    made.add_argument("--times", type=float, default=100, help="the median's energy that a massive token exceeds (100)")
    made.add_argument(
        "--much", type=float, default=0.2, help="share of the top channel from which a layer is tried (0.2)"
    )
    return made.parse_args()


class Seen:
    """What entered the consumer of one MLP."""

    def __init__(self, model: Any, site: Site, times: float):
        self.site, self.times = site, times
        self.weight = model.get_submodule(site.consumer).weight.float()
        self.massive, self.others = torch.zeros(2, site.channels)
        """Sums of squares (C,) over massive tokens and over all others."""
        self.first, self.number = 0.0, 0
        """Energy of first tokens; number of massive tokens."""

    def add(self, module: Any, args: tuple) -> None:
        """Add a batch x (B, T, C)."""
        squares = args[0].square()
        energy = squares @ self.weight.square().sum(0)
        massive = energy > self.times * energy.median()
        self.massive += squares[massive].sum(0)
        self.others += squares[~massive].sum(0)
        self.first += float(energy[:, 0].sum())
        self.number += int(massive.sum())

    @property
    def energy(self) -> Tensor:
        """Of every channel (C,)."""
        return (self.massive + self.others) * self.weight.square().sum(0)

    @property
    def top(self) -> int:
        return int(self.energy.argmax())

    def order(self, scorer: Scorer, all_tokens: bool) -> Tensor:
        """Channels (C,), the first to be cut first, by the score from all tokens or from those that are not massive."""
        statistic = self.others + self.massive if all_tokens else self.others
        return scorer.score(scorer.prepare(self.weight, self.site), statistic).argsort()

    def shares(self, sequences: int) -> list[str]:
        """The layer's row of the first table."""
        energy = self.energy
        massive = float((self.massive * self.weight.square().sum(0)).sum() / energy.sum())
        cells = [self.first / float(energy.sum()), massive, float(energy.max() / energy.sum())]
        first, massive_share, top = (f"{share:.3f}" for share in cells)
        return [str(self.site.layer), first, f"{self.number / sequences:.1f}", massive_share, top, str(self.top)]


def watched(model: Any, sites: list[Site], sequences: Tensor, times: float) -> list[Seen]:
    """What enters the consumers while sequences (N, T) pass through the model."""
    found = [Seen(model, site, times) for site in sites]
    with ExitStack() as stack:
        for seen in found:
            consumer = model.get_submodule(seen.site.consumer)
            stack.callback(consumer.register_forward_pre_hook(seen.add).remove)
        for ids in sequences.split(4):
            model(input_ids=ids, use_cache=False)
    return found


@contextmanager
def without(model: Any, cuts: dict[Site, Tensor]) -> Iterator[None]:
    """Within it the channels (d,) of sites are zero."""

    def zero(module: Any, args: tuple, channels: Tensor) -> tuple:
        return (args[0].index_fill(-1, channels, 0),)

    with ExitStack() as stack:
        for site, channels in cuts.items():
            hook = partial(zero, channels=channels)
            stack.callback(model.get_submodule(site.consumer).register_forward_pre_hook(hook).remove)
        yield


def main() -> None:
    chosen = options()
    model, tokenizer = started(chosen)
    sequences, measured = mixture(tokenizer, chosen.texts, chosen.sequences, chosen.length, chosen.rows)
    sites = [site for site in find_sites(model, Catalog.discover(), "kv_group")[1] if site.kind == "mlp"]
    found = watched(model, sites, sequences, chosen.times)
    print(f"Energy of the output of every MLP, {len(sequences)} x {chosen.length} tokens\n")
    head = ["layer", "first token", "massive tokens per sequence", "their share", "top channel", "which"]
    print(table(head, [seen.shares(len(sequences)) for seen in found]))

    dense, channels = loss(model, measured), sites[0].channels
    count = round(chosen.ratio * channels)

    def increase(cuts: dict[Site, Tensor]) -> str:
        with without(model, cuts):
            return f"{loss(model, measured) - dense:.3f}"

    arms = [(name, scorer, every) for name, scorer in SCORES.items() for every in (True, False)]
    names = [name if every else f"{name} without massive tokens" for name, _, every in arms]
    costs = []
    for seen in found:
        if float(seen.energy.max() / seen.energy.sum()) > chosen.much:
            top, place = torch.tensor([seen.top]), [seen.order(scorer, every).tolist() for _, scorer, every in arms]
            others = torch.tensor([channel for channel in range(channels) if channel != seen.top])
            cells = [increase({seen.site: top}), increase({seen.site: others})]
            for order in place:
                cost = increase({seen.site: torch.tensor(order[:count])})
                cells.append(f"{cost} ({order.index(seen.top) + 1})")
            costs.append([str(seen.site.layer), *cells])
    print(f"\nLoss added, nats; dense {dense:.3f} on {len(measured)} x {chosen.length} tokens.")
    print(f"In brackets: the top channel's place in the order of cuts, 1 to {channels}, of which {count} are cut.\n")
    head = ["layer", "top channel cut", "all others cut", *(f"{chosen.ratio:.0%} by {name}" for name in names)]
    print(table(head, costs))

    cut = [seen for seen in found if seen.site.layer not in WHOLE] or found
    cells = [
        [name, increase({seen.site: seen.order(scorer, every)[:count] for seen in cut})]
        for name, (_, scorer, every) in zip(names, arms, strict=True)
    ]
    print(f"\n{chosen.ratio:.0%} cut in {len(cut)} MLPs at once\n")
    print(table(["score", "loss added"], cells))


if __name__ == "__main__":
    run(main)
