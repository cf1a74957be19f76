"""Conversion between tensors and pieces of bytes that fit into frames.

The payload of a sample is the concatenation of its tensors' bytes (little-endian, C order). A small sample is one piece.
Bytes are copied only when the frame is built; decoded arrays are views of the frame.
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
NUMPY_TYPES = {name: np.dtype(name) for name in sorted(DTYPES)}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in NUMPY_TYPES.items()}
_PLAIN = frozenset(dtype for dtype in NUMPY_TYPES.values() if dtype.kind in "fiub")  # memoryview.cast supports them

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorHead:
    """Description of one tensor of a payload: `dtype` (from the allow-list) and `shape`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The size of its bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Piece(NamedTuple):
    """The part `data` of a sample's payload that starts at byte `at`; the whole payload has `size_bytes`.

    A named tuple, since a frame has hundreds of pieces and a frozen dataclass takes three times as long to create.
    """

    sample: int
    at: int
    size_bytes: int
    data: memoryview
    tensors: tuple[TensorHead, ...] = ()  # only if `at` is 0
    arrays: list[Array] | None = None  # decoded tensors of a whole sample: views of the frame


@lru_cache(maxsize=4096)
def tensor_head(dtype: str, shape: tuple[int, ...]) -> TensorHead:
    """A cached `TensorHead`: the samples of a model share a few heads."""
    return TensorHead(dtype, shape)


@lru_cache(maxsize=4096)
def _head_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorHead:
    return tensor_head(dtype.name, shape)


def to_pieces(sample: int, tensors: Sequence[Array], chunk_bytes: int) -> list[Piece]:
    """Split one sample's tensors into pieces of at most `chunk_bytes`; a single contiguous tensor is not copied."""
    heads = tuple([_head_of(array.dtype, array.shape) for array in tensors])
    if len(tensors) == 1:
        payload = bytes_of(tensors[0])
    else:
        payload = memoryview(b"".join([bytes_of(array) for array in tensors]))
    size = payload.nbytes
    if size <= chunk_bytes:
        return [Piece(sample, 0, size, payload, heads)]
    return [
        Piece(sample, at, size, payload[at : at + chunk_bytes], heads if at == 0 else ())
        for at in range(0, size, chunk_bytes)
    ]


def bytes_of(array: Array) -> memoryview:
    """The bytes of an array, little-endian and in C order; copied only where they lie otherwise."""
    if array.dtype in _PLAIN and array.size and array.ndim and array.flags.c_contiguous:
        return array.data.cast("B")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # A flat byte view: memoryview.cast rejects arrays of rank 0 and shapes that contain 0.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_arrays(heads: Sequence[TensorHead], payloads: memoryview, count: int) -> list[list[Array]]:
    """The arrays of `count` consecutive samples with the same tensors: views, read-only, possibly unaligned.

    One view over all samples is split, which is several times faster than a view per sample.
    """
    if count == 1:
        return [to_tensors(heads, payloads)]
    size_bytes = payloads.nbytes // count
    columns, at = [], 0
    for head in heads:
        dtype = NUMPY_TYPES[head.dtype]
        strides = [dtype.itemsize]
        for extent in reversed(head.shape[1:]):
            strides.append(strides[-1] * extent)
        if not head.shape or not head.size_bytes:  # splitting would turn arrays of rank 0 into numbers
            return [to_tensors(heads, payloads[n * size_bytes : (n + 1) * size_bytes]) for n in range(count)]
        columns.append(np.ndarray((count, *head.shape), dtype, payloads, at, (size_bytes, *reversed(strides))))
        at += head.size_bytes
    return [list(arrays) for arrays in zip(*columns, strict=True)] if columns else [[] for _ in range(count)]


def to_tensors(heads: Iterable[TensorHead], payload: memoryview) -> list[Array]:
    """The arrays of one sample: views of its payload, read-only, possibly unaligned."""
    arrays, at = [], 0
    for head in heads:
        arrays.append(np.ndarray(head.shape, NUMPY_TYPES[head.dtype], payload, at))
        at += head.size_bytes
    return arrays


class Assembler:
    """Reassembles the samples of one task attempt from their pieces.

    The pieces of a sample arrive in order; repeated pieces are ignored. Memory is bounded by the sender's window of samples.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[tuple[TensorHead, ...], bytearray, int]] = {}

    @property
    def pending(self) -> int:
        """Number of incomplete samples."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Memory held for incomplete samples, in bytes."""
        return sum(len(buffer) for _, buffer, _ in self._open.values())

    def add(self, piece: Piece) -> list[Array] | None:
        """The sample's tensors (read-only) if this piece completes it. Raises `ProtocolError` `missing_chunk` on a gap."""
        if piece.at == 0 and piece.data.nbytes == piece.size_bytes:
            self._open.pop(piece.sample, None)
            return to_tensors(piece.tensors, piece.data) if piece.arrays is None else piece.arrays
        if piece.at == 0 and piece.sample not in self._open:
            self._open[piece.sample] = (piece.tensors, bytearray(piece.size_bytes), 0)
        if piece.sample not in self._open:
            raise ProtocolError(
                "missing_chunk", f"sample {piece.sample}: a piece at byte {piece.at} arrived without the first piece"
            )
        tensors, buffer, filled = self._open[piece.sample]
        end = piece.at + piece.data.nbytes
        if piece.size_bytes != len(buffer):
            raise ProtocolError("wrong_shape", f"sample {piece.sample}: the pieces disagree about its size")
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
