"""Time, memory and precision of least squares at the width of LLaMA-2-7B: a page of markdown.

python docs/benchmarks/compensation_width.py --out docs/benchmarks/compensation-width.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from page_file import put
from prunekit.evaluators.timing import processor
from width_sizes import HEADS, TOY, Sizes

PARTS = "ABCD"
RATIOS = (0.4, 0.2)
KINDS = ("mlp", "attention")
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "prunekit.compress.pruning.prune"]


def fresh_processes() -> BaseContext:
    """A context that starts processes which have loaded the libraries and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def call(work: str, *arguments: Any) -> Any:
    """The result of a function, ``module.name``."""
    module, _, name = work.rpartition(".")
    return getattr(import_module(module), name)(*arguments)


def apart(context: BaseContext, work: str, *arguments: Any) -> Any:
    """The result of a function in its own process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, work, *arguments).result()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def options(arguments: list[str] | None) -> tuple[argparse.Namespace, Sizes]:
    """The options, and the sizes that follow from them; exits with 2 for bad ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=positive, help="C of the MLP (11008)")
    parser.add_argument("--outputs", type=positive, help="hidden size, and C of the attention: a multiple of 64 (4096)")
    parser.add_argument("--tokens", type=positive, help="calibration tokens, in batches of 4 x 1024 (16384)")
    parser.add_argument(
        "--repeats", type=positive, help="number of timings of part C, of which the median is reported (3)"
    )
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of torch (all cores)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts to measure (A,B,C,D)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: shows that it runs, and measures nothing")
    parser.add_argument("--out", type=Path, help="write the page here instead of to stdout")
    chosen = parser.parse_args(arguments)
    chosen.parts = [part.strip().upper() for part in chosen.parts.split(",")]
    unknown = [part for part in chosen.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: there are {', '.join(PARTS)}; found {unknown[0]!r}")
    named = ("channels", "outputs", "tokens", "repeats", "threads")
    given = {name: getattr(chosen, name) for name in named if getattr(chosen, name) is not None}
    sizes = replace(TOY if chosen.toy else Sizes(), **given)
    if sizes.outputs % (2 * HEADS):
        parser.error(f"--outputs: {HEADS} heads of an even size need a multiple of {2 * HEADS}; found {sizes.outputs}")
    step = sizes.calibration_rows * sizes.length
    if sizes.tokens % step:
        batch = f"{sizes.calibration_rows} x {sizes.length}"
        parser.error(f"--tokens: batches are {batch}; give a multiple of {step}, found {sizes.tokens}")
    return chosen, sizes


def main(arguments: list[str] | None = None) -> None:
    chosen, sizes = options(arguments)
    context = fresh_processes()
    jobs: dict[str, list[tuple]] = {
        "A": [("width_measures.static_cut", sizes, kind, RATIOS[0]) for kind in KINDS],
        "B": [("width_measures.accuracy", sizes, kind, RATIOS[0]) for kind in KINDS],
        "C": [("width_per_batch.per_batch", sizes, kind, ratio) for kind in KINDS for ratio in RATIOS],
        "D": [("width_per_batch.swap_share", sizes, ratio) for ratio in RATIOS],
    }
    found: dict[str, list[dict]] = {}
    began = time.perf_counter()
    for part in chosen.parts:
        for job in jobs[part]:
            print(f"{time.perf_counter() - began:6.0f} s: part {part} {' '.join(map(str, job[2:]))}", file=sys.stderr)
            found.setdefault(part, []).append(apart(context, *job))
    asked = [shlex.quote(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    command = " ".join(["python docs/benchmarks/compensation_width.py", *asked]).replace(str(chosen.out), "PAGE")
    put(apart(context, "width_page.page", sizes, found, processor(), command, time.perf_counter() - began), chosen.out)


if __name__ == "__main__":
    main()
