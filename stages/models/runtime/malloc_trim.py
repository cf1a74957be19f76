"""Asking the C library to give memory back. Where it is not glibc, nothing is asked."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
MAPPED_FROM_BYTES = 4 << 20
"""Blocks from this size on are mapped, each by itself, and go back when they are freed. Left alone, glibc raises its
threshold to 32 MiB after the first large block, and activations of 13 MB then linger in its heap.
"""


def map_large_blocks() -> None:
    """Sets the threshold, for this process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def give_back() -> None:
    """Returns what was freed and held back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
