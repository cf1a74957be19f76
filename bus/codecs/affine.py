"""Affine quantisation: a value is stored as the number n of the nearest level `base + n * step`.

The levels span the values of one tensor, so none is clipped. Zero is a level if the values lie on both sides of it or touch
it, since half of all activations behind a ReLU are zero. All arithmetic is in float32, in blocks that stay in the cache.
"""

from __future__ import annotations

import math
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

from bus.errors import ProtocolError
from bus.tensors import NUMPY_TYPES, Array

_PACKED = struct.Struct("<ff")
RANGE_BYTES = _PACKED.size

_BLOCK = 1 << 15  # values, an even number; float32 and quantised values of a block fit into the second-level cache
_LARGEST, _SMALLEST = 1e37, 1e-36  # sums, products and reciprocals within these are finite and normal in float32
_LARGEST_OFFSET = 4096.0  # of float64 values, in times of their range: float32 resolves a 16th of a step
_LARGEST_OF = {  # limit for the levels of floating-point types
    dtype: min(16 * _LARGEST, float(np.finfo(dtype).max)) for dtype in NUMPY_TYPES.values() if dtype.kind == "f"
}
_PAIRS = np.array([(byte & 15, byte >> 4) for byte in range(256)])  # the two levels of a byte with four bits for each


class _Buffers(threading.local):
    """Space for one block, for each thread."""

    def __init__(self) -> None:
        self.scaled = np.empty(_BLOCK, np.float32)
        self.levels = np.empty(_BLOCK, np.uint8)


_buffers = _Buffers()


class Affine(NamedTuple):
    """The levels of one tensor: `2 ** bits` of them, `step` apart, the lowest at `base`."""

    bits: int  # 8 or 4
    base: float
    step: float  # as `base`, exact in float32

    def body_bytes(self, items: int) -> int:
        """The number of bytes that `items` quantised values take."""
        return (items * self.bits + 7) // 8

    def packed(self) -> bytes:
        """As bytes, without `bits`."""
        return _PACKED.pack(self.base, self.step)

    @classmethod
    def unpacked(cls, bits: int, packed: memoryview, dtype: str) -> Affine:
        """The levels of a tensor of this type. Raises `ProtocolError` `undecodable` if the type does not hold them."""
        if packed.nbytes != RANGE_BYTES:
            raise ProtocolError("undecodable", "the range of a tensor is incomplete")
        levels = cls(bits, *_PACKED.unpack(packed))
        if not (levels.step > 0 and levels.held_by(NUMPY_TYPES[dtype])):
            raise ProtocolError(
                "undecodable", f"a tensor of {dtype} cannot have levels of {levels.step} from {levels.base}"
            )
        return levels

    def held_by(self, dtype: np.dtype[Any]) -> bool:
        """Whether a floating-point type has all levels; integers are clipped to their type."""
        largest = _LARGEST_OF.get(dtype, _LARGEST)
        return max(abs(self.base), abs(self.base + self.step * ((1 << self.bits) - 1))) <= largest

    def quantise(self, values: Array, body: Array) -> None:
        """Write flat `values`, which must lie between the levels, to `body`."""
        base, per_step = np.float32(self.base), np.float32(1.0 / self.step)
        packs = self.bits == 4
        for begin in range(0, values.size, _BLOCK):
            block = values[begin : begin + _BLOCK]
            scaled = _buffers.scaled[: block.size]
            np.subtract(block, base, out=scaled, casting="same_kind")
            np.multiply(scaled, per_step, out=scaled)
            np.rint(scaled, out=scaled)
            if packs:
                _pack(scaled, body[begin // 2 : (begin + block.size + 1) // 2])
            else:
                np.copyto(body[begin : begin + block.size], scaled, casting="unsafe")

    def restore(self, body: Array, items: int, dtype: np.dtype[Any]) -> Array:
        """The values (flat) of a body."""
        if self.bits == 4:
            pairs = self._levels(dtype).take(_PAIRS)
            return pairs.view(f"V{2 * dtype.itemsize}").reshape(-1).take(body).view(dtype)[:items]
        if dtype != np.float32:
            return self._levels(dtype).take(body)
        values = np.empty(items, dtype)
        base, step = np.float32(self.base), np.float32(self.step)
        for begin in range(0, items, _BLOCK):
            block = values[begin : begin + _BLOCK]
            np.multiply(body[begin : begin + _BLOCK], step, out=block)
            if self.base:
                np.add(block, base, out=block)
        return values

    def _levels(self, dtype: np.dtype[Any]) -> Array:
        """All levels in a type."""
        levels = np.arange(1 << self.bits, dtype=np.float32) * np.float32(self.step) + np.float32(self.base)
        if dtype.kind != "f":
            limits = np.iinfo(dtype)
            levels = np.clip(np.rint(levels), limits.min, limits.max)
        return levels.astype(dtype)


def fit(values: Array, bits: int, *, zero: int = 0) -> Affine | None:
    """The levels for flat values; None where float32 cannot hold them or their differences, or one is not finite.

    `zero` is the value that means zero, in quantised tensors.
    """
    if not values.size:
        return None
    with np.errstate(all="ignore"):  # NaN is expected
        low, high = float(np.minimum.reduce(values)) - zero, float(np.maximum.reduce(values)) - zero
    offset = max(abs(low), abs(high))
    if not (offset == 0 or _SMALLEST <= offset <= _LARGEST) or (
        values.dtype.itemsize > 4 and offset > _LARGEST_OFFSET * (high - low)
    ):
        return None
    below, step = _spanned(low, high, (1 << bits) - 1)
    step = float(np.float32(step))
    base = float(np.float32(-below * step if below is not None else low))
    if step < _SMALLEST:
        return None
    levels = Affine(bits, float(np.float32(base + zero)), step)
    return levels if levels.held_by(values.dtype) else None


def _spanned(low: float, high: float, steps: int) -> tuple[int | None, float]:
    """How many of `steps` lie below zero (None: zero is not between `low` and `high`), and their length."""
    if low == high:
        return (0 if low == 0 else None), 1.0
    if low > 0 or high < 0:
        return None, (high - low) / steps
    if low == 0:
        return 0, high / steps
    if high == 0:
        return steps, -low / steps
    exact = -low / (high - low) * steps
    candidates = [min(max(round_to(exact), 1), steps - 1) for round_to in (math.floor, math.ceil)]
    step, below = min((max(high / (steps - below), -low / below), below) for below in candidates)
    return below, step


def _pack(scaled: Array, body: Array) -> None:
    """Write numbers below 16 as four bits each, the first of two in the lower half."""
    levels = _buffers.levels[: 2 * body.size]
    levels[-1] = 0  # where their number is odd
    np.copyto(levels[: scaled.size], scaled, casting="unsafe")
    pairs = levels.view("<u2")
    np.copyto(body, pairs | (pairs >> 4), casting="unsafe")
