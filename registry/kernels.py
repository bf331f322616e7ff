"""Whether Triton kernels can be used on a tensor: on CUDA devices, and on a CPU in Triton's interpreter, for tests."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

VARIABLE = "PRUNEKIT_KERNELS"
"""``plain`` does without Triton everywhere."""


def usable_on(tensor: Tensor) -> bool:
    """Whether a kernel of ours can read ``tensor``; not while torch compiles, which makes its own."""
    if not (tensor.is_cuda or interpreted()) or torch.compiler.is_compiling():
        return False
    return os.environ.get(VARIABLE) != "plain" and _installed()


def interpreted() -> bool:
    """Whether kernels run step by step on the CPU, by ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
