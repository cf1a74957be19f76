"""Tensors of samples as bytes: cut into pieces that fit into frames, and put together again.

The payload of a sample is its tensors' bytes (little-endian, C order) one after the other. A sample that fits is one piece,
whose bytes are the tensor's own; nothing is copied until the frame is made, and what is read are views of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.errors import ProtocolError

DTYPES = frozenset(
    ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    + ("float16", "float32", "float64", "complex64")
)
ITEM_BYTES = {name: np.dtype(name).itemsize for name in sorted(DTYPES)}
_DTYPES = {name: np.dtype(name) for name in sorted(DTYPES)}
_PLAIN = frozenset(dtype for dtype in _DTYPES.values() if dtype.kind in "fiub")  # a memoryview can show them as bytes

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What one tensor of a payload is: `dtype` from the allow-list and `shape`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its length in the payload."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """`data` is the part of a sample's payload of `size_bytes` that begins at `at`.

    A named tuple, as a frame has hundreds of them: a frozen dataclass takes three times as long to make.
    """

    sample: int
    at: int
    size_bytes: int
    data: memoryview
    tensors: tuple[TensorHead, ...] = ()  # where `at` is 0
    arrays: list[Array] | None = None  # of a whole sample that was read: its tensors, views of the frame


@lru_cache(maxsize=4096)
def tensor_head(dtype: str, shape: tuple[int, ...]) -> TensorHead:
    """Samples of a model have the same few heads."""
    return TensorHead(dtype, shape)


@lru_cache(maxsize=4096)
def _head_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorHead:
    return tensor_head(dtype.name, shape)


def to_pieces(sample: int, tensors: Sequence[Array], chunk_bytes: int) -> list[Piece]:
    """One sample's tensors as pieces of at most `chunk_bytes`, without copying where it is one contiguous tensor."""
    heads = tuple([_head_of(array.dtype, array.shape) for array in tensors])
    if len(tensors) == 1:
        payload = _bytes_of(tensors[0])
    else:
        payload = memoryview(b"".join([_bytes_of(array) for array in tensors]))
    size = payload.nbytes
    if size <= chunk_bytes:
        return [Piece(sample, 0, size, payload, heads)]
    return [
        Piece(sample, at, size, payload[at : at + chunk_bytes], heads if at == 0 else ())
        for at in range(0, size, chunk_bytes)
    ]


def _bytes_of(array: Array) -> memoryview:
    if array.dtype in _PLAIN and array.size and array.ndim and array.flags.c_contiguous:
        return array.data.cast("B")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # A flat byte view: memoryview.cast refuses shapes that hold a zero and arrays of rank 0.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_arrays(heads: Sequence[TensorHead], payloads: memoryview, count: int) -> list[list[Array]]:
    """The payloads of `count` samples with the same tensors, one after the other, as each sample's arrays: views (read-only,
    perhaps unaligned). One view is made of all samples, and taken apart: that is several times as fast as one view each.
    """
    if count == 1:
        return [to_tensors(heads, payloads)]
    size_bytes = payloads.nbytes // count
    columns, at = [], 0
    for head in heads:
        dtype = _DTYPES[head.dtype]
        strides = [dtype.itemsize]
        for extent in reversed(head.shape[1:]):
            strides.append(strides[-1] * extent)
        if not head.shape or not head.size_bytes:  # an array of rank 0 would be taken apart to numbers
            return [to_tensors(heads, payloads[n * size_bytes : (n + 1) * size_bytes]) for n in range(count)]
        columns.append(np.ndarray((count, *head.shape), dtype, payloads, at, (size_bytes, *reversed(strides))))
        at += head.size_bytes
    return [list(arrays) for arrays in zip(*columns, strict=True)] if columns else [[] for _ in range(count)]


def to_tensors(heads: Iterable[TensorHead], payload: memoryview) -> list[Array]:
    """Views of one sample's payload as arrays (read-only, perhaps unaligned)."""
    arrays, at = [], 0
    for head in heads:
        arrays.append(np.ndarray(head.shape, _DTYPES[head.dtype], payload, at))
        at += head.size_bytes
    return arrays


class Assembler:
    """Puts the pieces of one task attempt together.

    Pieces of a sample come in order; a piece that came before is ignored. What is kept is bounded by the samples that
    are under way, and the sender's window bounds those.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[tuple[TensorHead, ...], bytearray, int]] = {}

    @property
    def pending(self) -> int:
        """Samples that are not whole yet."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Memory held for samples that are not whole yet."""
        return sum(len(buffer) for _, buffer, _ in self._open.values())

    def add(self, piece: Piece) -> list[Array] | None:
        """The sample's tensors, read-only, once it is whole. Raises `ProtocolError` `missing_chunk` on a gap."""
        if piece.at == 0 and piece.data.nbytes == piece.size_bytes:
            self._open.pop(piece.sample, None)
            return to_tensors(piece.tensors, piece.data) if piece.arrays is None else piece.arrays
        if piece.at == 0 and piece.sample not in self._open:
            self._open[piece.sample] = (piece.tensors, bytearray(piece.size_bytes), 0)
        if piece.sample not in self._open:
            raise ProtocolError("missing_chunk", f"sample {piece.sample}: a piece at {piece.at} without the first")
        tensors, buffer, filled = self._open[piece.sample]
        end = piece.at + piece.data.nbytes
        if piece.size_bytes != len(buffer):
            raise ProtocolError("wrong_shape", f"sample {piece.sample}: its size changed")
        if piece.at > filled:
            raise ProtocolError("missing_chunk", f"sample {piece.sample}: bytes {filled}..{piece.at} are missing")
        if end <= filled:
            return None
        buffer[piece.at : end] = piece.data
        if end < len(buffer):
            self._open[piece.sample] = (tensors, buffer, end)
            return None
        del self._open[piece.sample]
        return to_tensors(tensors, memoryview(buffer).toreadonly())
