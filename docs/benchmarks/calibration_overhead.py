"""Time and memory of calibration compared with plain dense passes over the same text: a page of markdown.

python docs/benchmarks/calibration_overhead.py --out docs/benchmarks/calibration-overhead.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from page_file import put
from prunekit.compress.bench.intervals import ratio_of
from prunekit.compress.bench.presets import PRESETS
from prunekit.compress.calibration.passes import calibrate, no_progress
from prunekit.compress.engine.engine import Engine
from prunekit.compress.files.reader import build_strategy
from prunekit.compress.pruning.sites import find_sites
from prunekit.evaluators.allocations import peak_bytes
from prunekit.evaluators.timing import clock_of, processor
from prunekit.registry import Catalog

STRATEGIES = ("pp", "flap")
"""Mean squares, and fluctuations with means."""


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8, help="of a batch (8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--rounds", type=int, default=15, help="timed batches of each (15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (all cores)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the page here instead of to stdout")
    return parser.parse_args(arguments)


@torch.no_grad()
def measure(chosen: argparse.Namespace, dtype: str, use: str) -> dict[str, Any]:
    """Seconds of calibrating on a batch and of the plain pass, alternating; peak memory for few and many batches."""
    with torch.device(chosen.device):
        config = PRESETS[chosen.preset].config(chosen.layers, chosen.length)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    catalog, clock = Catalog.discover(), clock_of(model)
    strategy = build_strategy(catalog, use, {"ratio": 0.4})
    layers, sites = find_sites(model, catalog, strategy.attention_unit)
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        return torch.randint(config.vocab_size, (chosen.rows, chosen.length), generator=generator)

    def learn(engine: Engine, texts: list[torch.Tensor]) -> None:
        calibrate(engine, [{"input_ids": ids} for ids in texts], no_progress)

    plain, calibrating = [], []
    engine = Engine(model, layers, sites, strategy)
    try:
        for number in range(chosen.rounds + 2):
            ids = batch()
            jobs = [
                (plain, lambda ids=ids: model.get_decoder()(input_ids=ids.to(chosen.device), use_cache=False)),
                (calibrating, lambda ids=ids: learn(engine, [ids])),
            ]
            for into, job in jobs if number % 2 else reversed(jobs):
                into.append(clock.timed(job)[0])
    finally:
        engine.remove()
    peaks = {}
    for count in (2, 8):
        engine, texts = Engine(model, layers, sites, strategy), [batch() for _ in range(count)]
        try:
            peaks[count] = peak_bytes(model, lambda: None, lambda _, e=engine, t=texts: learn(e, t))
        finally:
            engine.remove()
    return {"plain": plain[2:], "calibrating": calibrating[2:], "peaks": peaks}


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    lines = [
        "# What calibration costs",
        "",
        "Statistics of all sites in one pass, compared with a plain pass of the decoder over the same batch: "
        f"{chosen.preset}, {chosen.layers} layers, random weights, batches of {chosen.rows} x {chosen.length}, "
        f"{chosen.rounds} rounds in turn; {chosen.threads} threads of {processor()}, torch {torch.__version__}, device "
        f"{chosen.device}. Ratios are medians with their 95% interval. Peak memory is the most "
        "that calibrating on that number of batches allocates at once.",
        "",
        "| dtype | statistic of | plain, s | calibrating, s | ratio | peak, 2 batches | peak, 8 batches |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for dtype in chosen.dtypes:
        for use in STRATEGIES:
            found = measure(chosen, dtype, use)
            ratio = ratio_of(found["calibrating"], found["plain"])
            peaks = " | ".join(f"{peak / 2**20:.1f} MiB" for peak in found["peaks"].values())
            seconds = f"{median(found['plain']):.3g} | {median(found['calibrating']):.3g}"
            lines.append(f"| {dtype} | {use} | {seconds} | {ratio} | {peaks} |")
    put("\n".join([*lines, ""]), chosen.out)


if __name__ == "__main__":
    main()
