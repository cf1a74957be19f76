"""Random inputs of segments and models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bus.tensors import Array
from bus.values import TensorSpec


def random_input(spec: TensorSpec, seed: int, sample: int) -> Array:
    """A random tensor: normal for floats, full range for 8- and 16-bit integers, 0 or 1 for wider ones (often indices)."""
    rng = np.random.default_rng([seed, sample])
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(spec.shape).astype(dtype)
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, spec.shape, dtype, endpoint=True)
    return rng.integers(0, 2, spec.shape).astype(dtype)


def random_sample(specs: Sequence[TensorSpec], number: int) -> list[Array]:
    """Random inputs; the floats of an odd number have no negative values, as after a ReLU."""
    values = [random_input(spec, number, index) for index, spec in enumerate(specs)]
    return [np.abs(value) if number % 2 and value.dtype.kind == "f" else value for value in values]
