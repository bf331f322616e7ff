"""The sizes of compensation_width.py."""

from __future__ import annotations

from dataclasses import dataclass

HEADS = 32
RIDGE = 0.01
"""Of every regression, as a share of the mean variance. Fixed, because one chosen from the tokens would vary."""


@dataclass(frozen=True)
class Sizes:
    """C of the MLP and O (the hidden size, and C of the attention), tokens, and number of timings."""

    channels: int = 11008
    outputs: int = 4096
    tokens: int = 16384
    length: int = 1024
    calibration_rows: int = 4
    batch_rows: int = 20
    timed_rows: int = 2
    repeats: int = 3
    ranks: tuple[int, ...] = (64, 256)
    swap_rows: int = 20
    swap_length: int = 256
    swap_batches: int | None = None
    threads: int = 1

    def width(self, kind: str) -> int:
        """C of a site."""
        return self.channels if kind == "mlp" else self.outputs


TOY = Sizes(
    channels=96,
    outputs=128,
    tokens=512,
    length=64,
    batch_rows=4,
    timed_rows=2,
    repeats=1,
    ranks=(8,),
    swap_rows=4,
    swap_length=24,
    swap_batches=1,
)
