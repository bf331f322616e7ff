"""What it takes to order one MLP's channels jointly (`obs`), and to refit what stays, at the widths of large models.

python docs/results/methods/widths.py --channels 11008 14336 --outputs 4096

Every width runs in a process of its own, on made-up inputs: latent variables whose variances fall with their rank,
noise in every channel, and channels of very different size, so that the covariance has full rank and a steep spectrum.
The code is that of calibration: sums of products over the tokens, a copy of the covariance for the chooser, its order,
and least squares for the share that stays. Memory is the most that the process takes while it orders, above what it
took before, and the sums, which wait for least squares; the last column is what is stated before a run. The rate is
that of 5/3 C^3 + O C^2 floating-point operations.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

import psutil
import torch
from prunekit.compress.engine.choosing import choice_of
from prunekit.compress.engine.compensation import SiteCompensation
from prunekit.registry import ChannelMoments
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.compensation import LeastSquares
from prunekit.strategies.obs import ObsChooser
from torch import Tensor

HEAD = ("C", "O", "rounds", "sums, s", "order, s", "GFLOP/s", "refit, s", "peak, GiB", "stated, GiB")
GIB = 2**30
CHUNK = 1024
"""Tokens that are made up at once: so few that ordering takes more memory than they do."""
LATENT = 512


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--channels", type=int, nargs="+", default=[2048, 4096], help="C, one or several (2048 4096)")
    made.add_argument("--outputs", type=int, default=4096, help="O (4096)")
    made.add_argument("--rounds", type=int, default=64, help="of obs (64)")
    made.add_argument("--ratio", type=float, default=0.4, help="share that is cut before the refit (0.4)")
    made.add_argument("--tokens", type=float, default=1.25, help="tokens for each channel (1.25)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    return made.parse_args()


def inputs(channels: int, tokens: int) -> Iterator[Tensor]:
    """Batches (1, CHUNK, C) of what enters the consumer."""
    drawn = torch.Generator().manual_seed(0)
    mixed = torch.randn(LATENT, channels, generator=drawn) / torch.arange(1, LATENT + 1).sqrt()[:, None]
    sizes = torch.randn(channels, generator=drawn).exp()
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        latent = torch.randn(count, LATENT, generator=drawn) @ mixed
        yield (latent + torch.randn(count, channels, generator=drawn)).mul_(sizes)[None]


def measured(chosen: argparse.Namespace, channels: int) -> list[str]:
    """A row of the table."""
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    site = replace(some_site("mlp"), units=channels, unit_size=1, outputs=chosen.outputs)
    weight = torch.randn(chosen.outputs, channels, generator=torch.Generator().manual_seed(1)) / channels**0.5
    chooser, compensation = ObsChooser(rounds=chosen.rounds), SiteCompensation(site, LeastSquares())
    times = [perf_counter()]
    for x in inputs(channels, int(chosen.tokens * channels)):
        compensation.learn(x, None)
    times.append(perf_counter())
    before = psutil.Process().memory_info().rss
    choice = choice_of(chooser, site, compensation.covariance(), weight)
    times.append(perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - before
    kept = choice.units.topk(channels - int(chosen.ratio * channels)).indices.sort().values
    compensation.finalize(kept, None, weight)
    times.append(perf_counter())
    gathering, ordering, refitting = (end - start for start, end in pairwise(times))
    sums = ChannelMoments.bytes_of(channels)
    stated = chooser.memory_plan(site).working + sums  # the chooser gets a copy
    rate = (5 / 3 * channels**3 + chosen.outputs * channels**2) / ordering / 1e9
    seconds = f"{gathering:.1f}", f"{ordering:.1f}", f"{rate:.0f}", f"{refitting:.1f}"
    memory = f"{(sums + peak) / GIB:.2f}", f"{(sums + stated) / GIB:.2f}"
    return [f"{channels:,}", f"{chosen.outputs:,}", str(chosen.rounds), *seconds, *memory]


def main() -> None:
    chosen = options()
    print(f"{chosen.threads} threads, {chosen.tokens:g} tokens for each channel, refit at {chosen.ratio:.0%}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---:|' * len(HEAD)}", flush=True)
    for channels in chosen.channels:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            print(f"| {' | '.join(alone.submit(measured, chosen, channels).result())} |", flush=True)


if __name__ == "__main__":
    main()
