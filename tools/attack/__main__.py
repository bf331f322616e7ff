"""``python -m tools.attack [--quick] [--seed N]``: runs the attacks and prints their counts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

from . import parts
from .forked import warm_up

PARTS: dict[Callable[[parts.Ground, int], parts.Counts], tuple[int, int]] = {
    parts.yaml_files: (60, 12),
    parts.texts_and_tokenizers: (30, 2),
    parts.results_and_manifests: (300, 8),
    parts.stores: (60, 4),
    parts.full_disks: (40, 1),
    parts.crashes: (20, 1),
    parts.crashes_with_ray: (20, 0),
}
"""Attempts of every attack: of all, and of the quick part."""


def attacks(folder: Path, quick: bool, seed: int, only: str | None = None) -> Iterator[tuple[parts.Counts, float]]:
    """The counts of every attack, and the seconds that it took."""
    warm_up()
    ground = parts.Ground(folder, seed)
    for attack, (whole, some) in PARTS.items():
        count = some if quick else whole
        if only is not None and attack.__name__ != only:
            continue
        if not count or (attack is parts.crashes_with_ray and importlib.util.find_spec("ray") is None):
            continue
        began = time.monotonic()
        yield attack(ground, count), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of every attack")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of what is damaged where, and of the moments of crashes"
    )
    parser.add_argument("--only", metavar="NAME", choices=[each.__name__ for each in PARTS], help="one attack")
    options = parser.parse_args()
    wrong = 0
    print("| attack | attempts | went wrong | seconds |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        for counts, seconds in attacks(Path(folder), options.quick, options.seed, options.only):
            print(f"| {counts.attack} | {counts.attempts} | {len(counts.wrong)} | {seconds:.0f} |", flush=True)
            for each in counts.wrong:
                print(f"  {each}", flush=True)
            wrong += len(counts.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
