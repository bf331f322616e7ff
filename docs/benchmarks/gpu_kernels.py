"""The Triton kernels compared with the operations that they replace, on a CUDA device: a page of markdown.

python docs/benchmarks/gpu_kernels.py --out docs/benchmarks/gpu-kernels.md

``TRITON_INTERPRET=1 python docs/benchmarks/gpu_kernels.py --toy`` runs the same code on a CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from page_file import put
from prunekit.compress.bench.intervals import ratio_of
from prunekit.evaluators.timing import Clock, EventClock, processor
from prunekit.registry.tensors import reductions
from torch import Tensor
from torch.nn import functional

try:
    from prunekit.compress.engine.fused_linear import linear_of_columns, linear_of_rows
    from prunekit.registry.tensors import triton_reductions
except ImportError as error:
    raise SystemExit(f"the kernels need Triton: pip install triton ({error})") from None


class Shape(NamedTuple):
    """One site and batch: hidden size, channels, kept channels, rows, positions."""

    hidden: int
    channels: int
    kept: int
    rows: int
    positions: int


SHAPES = [
    Shape(4096, 11008, 6208, 20, 1024),
    Shape(4096, 4096, 2304, 20, 1024),
    Shape(4096, 14336, 8064, 20, 1024),
    Shape(4096, 11008, 6208, 4, 128),
]
TOY = [Shape(48, 96, 56, 3, 8)]

Ways = dict[str, Callable[[], Tensor]]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU: shows that it runs")
    parser.add_argument("--dtype", help="bfloat16 (of --toy: float32)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the page here instead of to stdout")
    return parser.parse_args(arguments)


def reduction(shape: Shape, device: str, dtype: torch.dtype) -> Ways:
    """Squares of the consumer's input, summed over rows."""
    x = torch.randn(shape.rows, shape.positions, shape.kept, device=device, dtype=dtype)
    return {
        "Triton": lambda: triton_reductions.position_sums(x, None, True, None),
        "vector norm": lambda: torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_(),
        "float, square, sum": lambda: x.float().square().sum(0),
        "row by row": lambda: reductions._row_by_row(x, None, True, None),
    }


def producer(shape: Shape, device: str, dtype: torch.dtype) -> Ways:
    """Kept rows of a weight times the batch."""
    x = torch.randn(shape.rows, shape.positions, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.channels, shape.hidden, device=device, dtype=dtype)
    kept = torch.randperm(shape.channels, device=device)[: shape.kept].sort().values
    memory, sliced = torch.empty_like(weight[: shape.kept]), weight[kept]
    return {
        "gather, then product": lambda: functional.linear(x, torch.index_select(weight, 0, kept, out=memory)),
        "fused (Triton)": lambda: linear_of_rows(x, weight, kept, None),
        "product alone (ideal)": lambda: functional.linear(x, sliced),
    }


def consumer(shape: Shape, device: str, dtype: torch.dtype) -> Ways:
    """Kept columns of a column-major weight, times the batch."""
    x = torch.randn(shape.rows, shape.positions, shape.kept, device=device, dtype=dtype)
    weight = torch.randn(shape.channels, shape.hidden, device=device, dtype=dtype).t()
    kept = torch.randperm(shape.channels, device=device)[: shape.kept].sort().values
    memory, sliced = torch.empty_like(weight.t()[: shape.kept]), weight[:, kept].contiguous()
    return {
        "gather, then product": lambda: functional.linear(x, torch.index_select(weight.t(), 0, kept, out=memory).t()),
        "fused (Triton)": lambda: linear_of_columns(x, weight, kept, None),
        "product alone (ideal)": lambda: functional.linear(x, sliced),
    }


def rows_of(ways: Ways, clock: Clock, rounds: int) -> list[str]:
    """A table's rows: medians, and ratios to the first variant; all variants run in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = next(iter(ways.values()))().float()
    for number in range(rounds + 2):
        for name in ways if number % 2 else reversed(ways):
            taken, found = clock.timed(ways[name])
            scale = float(expected.abs().max())
            assert float((found.float() - expected).abs().max()) < 0.02 * scale, f"{name} computes something else"
            if number > 1:
                seconds[name].append(taken)
    first = next(iter(ways))
    lines = []
    for name, taken in seconds.items():
        ratio = "" if name == first else str(ratio_of(taken, seconds[first]))
        lines.append(f"| {name} | {1e6 * median(taken):,.0f} | {ratio} |")
    return lines


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    if not chosen.toy and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; TRITON_INTERPRET=1 with --toy runs the same code on a CPU")
    device, shapes = ("cpu", TOY) if chosen.toy else ("cuda", SHAPES)
    dtype = getattr(torch, chosen.dtype or ("float32" if chosen.toy else "bfloat16"))
    clock = Clock() if chosen.toy else EventClock((torch.device("cuda", 0),))
    machine = processor() if chosen.toy else torch.cuda.get_device_name(0)
    lines = ["# Kernels", "", f"{machine}, torch {torch.__version__}, {dtype}, medians of {chosen.rounds} rounds."]
    for shape in shapes:
        said = f"hidden {shape.hidden}, {shape.kept} of {shape.channels} channels, {shape.rows} x {shape.positions}"
        for what in (reduction, producer, consumer):
            lines += ["", f"## {what.__name__}: {said}", "", what.__doc__, ""]
            lines += ["| way | microseconds | to the first |", "|---|---:|---:|"]
            lines += rows_of(what(shape, device, dtype), clock, chosen.rounds)
    put("\n".join([*lines, ""]), chosen.out)


if __name__ == "__main__":
    main()
