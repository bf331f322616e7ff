"""What is decided for a site and a batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Decision(NamedTuple):
    """Kept units (k,), and the probe's rows (b,) and positions (t,) or (b, t); all int64 ascending."""

    kept: Tensor
    rows: Tensor
    positions: Tensor
    probe_mean: Tensor | None = None
    """(C,) float32: the channels' mean in the probe, where compensation asks for it."""
