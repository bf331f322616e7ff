"""Whether Triton kernels can be used on a tensor: on CUDA devices, and on a CPU in Triton's interpreter, for tests.

``TRITON_INTERPRET=1`` switches the interpreter on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

VARIABLE = "PRUNEKIT_KERNELS"
"""``plain`` disables Triton."""


def usable_on(tensor: Tensor) -> bool:
    """Whether a kernel of prunekit can read ``tensor``; not while torch compiles, which generates its own."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (tensor.is_cuda or interpreted) or torch.compiler.is_compiling():
        return False
    return os.environ.get(VARIABLE) != "plain" and _installed() and _runs_on(tensor.device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether a first small launch succeeds: Triton may lack the C compiler that it needs, or not support the device.
    Torch's own operations are used then."""
    from . import triton_reductions

    try:
        triton_reductions.position_sums(torch.ones(1, 1, 1, device=device), None, False, None)
    except Exception as error:
        warnings.warn(
            f"Triton's kernels cannot be used on {device} ({type(error).__name__}: {error}); torch's own operations "
            f"are used instead, and are slower. {VARIABLE}=plain disables Triton and this message",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
