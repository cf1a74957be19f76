"""How far a result is from the right one."""

from __future__ import annotations

import math

import numpy as np

from bus.tensors import Array


def relative_difference(found: Array, right: Array) -> float:
    """The largest difference, relative to the largest right value; infinite if values that are not finite differ."""
    finite = np.isfinite(right)
    if not np.array_equal(found[~finite], right[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return math.inf
    difference = float(np.max(np.abs(found[finite] - right[finite]), initial=0.0))
    largest = float(np.max(np.abs(right[finite]), initial=0.0))
    return difference if largest == 0.0 else difference / largest
