"""Keeps freed memory in the process, so that a benchmark does not time the operating system's paging."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from malloc.h."""

LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc never return memory to the system; False if the C library has no such setting.

    By default glibc returns large blocks, such as activations, at once, and every operation gets new ones, zeroed page
    by page. That took a fifth of a dense float32 pass where it was measured, and varies by chance.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
