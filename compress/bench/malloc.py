"""Freed memory that stays with the process, so that a benchmark does not time the operating system's paging."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from malloc.h."""

LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc serve all sizes from memory that it never gives back; False where this C library has no such thing.

    By default glibc gives large blocks, such as a batch's activations, back to the system at once and takes them anew,
    zeroed page by page, in every operation: a fifth of a dense pass in float32 here, and more or less of it by chance.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
