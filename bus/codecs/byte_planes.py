"""Bytes sorted by their place in an item: first all lowest bytes, then all second ones, and so on.

The exponents of neighbouring numbers resemble each other, their mantissas do not: apart from each other they compress better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bus.tensors import Array


def sort(values: Array, planes: Array) -> None:
    """Write the bytes of `values` (flat) to `planes`, which has as many."""
    width = values.dtype.itemsize
    source, target = values.view(np.uint8).reshape(-1, width), planes.reshape(width, -1)
    for place in range(width):  # a third faster than copying the transposed array at once, and ten times in `restore`
        target[place] = source[:, place]


def restore(planes: Array, dtype: np.dtype[Any]) -> Array:
    """The values (flat) whose bytes were sorted."""
    width = dtype.itemsize
    if width == 1:
        return planes.view(dtype)
    values = np.empty(planes.size // width, dtype)
    source, target = planes.reshape(width, -1), values.view(np.uint8).reshape(-1, width)
    for place in range(width):
        target[:, place] = source[place]
    return values
