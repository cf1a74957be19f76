"""Conversion between tensors and pieces of bytes that fit into frames.

The payload of a sample is the concatenation of its tensors' bytes (little-endian, C order), or what a codec made of them. A
small sample is one piece. Bytes are copied only when the frame is built; decoded arrays are views of the frame.
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
from bus.values import Codec

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


class EncodedAs(NamedTuple):
    """What an encoded payload says about itself. It is a claim until the payload is decoded."""

    codec: Codec  # not raw
    raw_bytes: int  # of the sample's tensors


class Encoded(NamedTuple):
    """One sample as a codec's payload; `bus.codecs` turns tensors into one and back. Relays pass it on as it is."""

    codec: Codec  # not raw
    tensors: tuple[TensorHead, ...]
    payload: memoryview

    @property
    def raw_bytes(self) -> int:
        """The size of its tensors."""
        return sum([head.size_bytes for head in self.tensors])

    @property
    def nbytes(self) -> int:
        """The size of its payload."""
        return self.payload.nbytes


Activations = list[Array] | Encoded
"""What crosses a link of one sample: its tensors, or what a codec made of them."""


def bytes_in(activations: Sequence[Array] | Encoded) -> int:
    """Their size on a link."""
    if isinstance(activations, Encoded):
        return activations.nbytes
    return activations[0].nbytes if len(activations) == 1 else sum(array.nbytes for array in activations)


def codec_of(encoded: EncodedAs | Encoded | None) -> Codec:
    """The codec of a payload; None: it is the tensors' bytes."""
    return Codec.RAW if encoded is None else encoded.codec


def encoded_limit(raw_bytes: int) -> int:
    """The largest payload that a codec makes of tensors of this size: theirs, and what it says about them."""
    return raw_bytes + raw_bytes // 128 + 1024


class Piece(NamedTuple):
    """The part `data` of a sample's payload that starts at byte `at`; the whole payload has `size_bytes`.

    A named tuple, since a frame has hundreds of pieces and a frozen dataclass takes three times as long to create.
    """

    sample: int
    at: int
    size_bytes: int
    data: memoryview
    tensors: tuple[TensorHead, ...] = ()  # only if `at` is 0
    arrays: list[Array] | None = None  # tensors of a whole sample that is not encoded: views of the frame
    encoded: EncodedAs | None = None  # None: the payload is the tensors' bytes
    route: int = 0  # index of the sample's route in its plan


@lru_cache(maxsize=4096)
def tensor_head(dtype: str, shape: tuple[int, ...]) -> TensorHead:
    """A cached `TensorHead`: the samples of a model share a few heads."""
    return TensorHead(dtype, shape)


@lru_cache(maxsize=4096)
def _head_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorHead:
    return tensor_head(dtype.name, shape)


def heads_of(tensors: Sequence[Array]) -> tuple[TensorHead, ...]:
    """The descriptions of tensors."""
    if len(tensors) == 1:
        return (_head_of(tensors[0].dtype, tensors[0].shape),)
    return tuple([_head_of(array.dtype, array.shape) for array in tensors])


def to_pieces(sample: int, tensors: Activations, chunk_bytes: int, route: int = 0) -> list[Piece]:
    """Split one sample into pieces of at most `chunk_bytes`; a single contiguous tensor is not copied."""
    encoded = None
    if isinstance(tensors, Encoded):
        encoded = EncodedAs(tensors.codec, tensors.raw_bytes)
        heads, payload = tensors.tensors, tensors.payload
    else:
        heads, payload = heads_of(tensors), _payload_of(tensors)
    size = payload.nbytes
    if size <= chunk_bytes:
        return [Piece(sample, 0, size, payload, heads, None, encoded, route)]
    return [
        Piece(sample, at, size, payload[at : at + chunk_bytes], heads if at == 0 else (), None, encoded, route)
        for at in range(0, size, chunk_bytes)
    ]


def _payload_of(tensors: Sequence[Array]) -> memoryview:
    if len(tensors) == 1:
        return bytes_of(tensors[0])
    return memoryview(b"".join([bytes_of(array) for array in tensors]))


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
        self._open: dict[int, tuple[Piece, bytearray, int]] = {}  # first piece without its data, bytes, number of them

    @property
    def pending(self) -> int:
        """Number of incomplete samples."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Memory held for incomplete samples, in bytes."""
        return sum(len(buffer) for _, buffer, _ in self._open.values())

    def add(self, piece: Piece) -> list[Array] | Encoded | None:
        """The sample (read-only) if this piece completes it; encoded as it came.

        Raises `ProtocolError` `missing_chunk` on a gap.
        """
        if piece.at == 0 and piece.data.nbytes == piece.size_bytes:
            self._open.pop(piece.sample, None)
            return _whole(piece, piece.data) if piece.arrays is None else piece.arrays
        if piece.at == 0 and piece.sample not in self._open:
            self._open[piece.sample] = (piece._replace(data=_NOTHING), bytearray(piece.size_bytes), 0)
        if piece.sample not in self._open:
            raise ProtocolError(
                "missing_chunk", f"sample {piece.sample}: a piece at byte {piece.at} arrived without the first piece"
            )
        first, buffer, filled = self._open[piece.sample]
        end = piece.at + piece.data.nbytes
        if (piece.size_bytes, piece.encoded) != (len(buffer), first.encoded):
            raise ProtocolError("wrong_shape", f"sample {piece.sample}: the pieces disagree about its size or codec")
        if piece.at > filled:
            raise ProtocolError("missing_chunk", f"sample {piece.sample}: bytes {filled}..{piece.at} are missing")
        if end <= filled:
            return None
        buffer[piece.at : end] = piece.data
        if end < len(buffer):
            self._open[piece.sample] = (first, buffer, end)
            return None
        del self._open[piece.sample]
        return _whole(first, memoryview(buffer).toreadonly())


_NOTHING = memoryview(b"")


def _whole(first: Piece, payload: memoryview) -> list[Array] | Encoded:
    """The sample with this first piece and payload."""
    if first.encoded is None:
        return to_tensors(first.tensors, payload)
    return Encoded(first.encoded.codec, first.tensors, payload)
