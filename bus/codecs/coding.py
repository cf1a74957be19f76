"""Encoded samples: the tensors of one sample as bytes, and back.

    raw             the tensors' bytes, one after the other
    zstd, q8, q4    for each tensor: how it is stored (1 byte), with its range (8 bytes) if it is quantised;
                    then one Zstandard frame with the bodies of all tensors, absent if these are empty

A body holds a tensor's bytes, sorted by their place in an item (`byte_planes`), or its quantised values (`affine`). Types and
shapes of the tensors travel in the head of the frame: the size of each body is known before anything is decompressed, and
a payload that decompresses to another size is rejected.

q8 and q4 quantise floating-point tensors; q4 also 8-bit integers, in steps of their own scale. Other tensors are stored
without loss, and so are tensors with NaN or infinity, or whose range float32 cannot hold.

Compressors, decompressors and buffers are reused by later calls in the same thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bus.codecs import affine, byte_planes, zstandard_frames
from bus.codecs.affine import RANGE_BYTES, Affine
from bus.errors import ProtocolError
from bus.tensors import NUMPY_TYPES, Array, Encoded, TensorHead, bytes_of, heads_of, to_tensors
from bus.values import Codec, TensorSpec

_LOSSLESS, _EIGHT_BITS, _FOUR_BITS = 0, 8, 4  # bits per stored value; 0: the bytes of the tensor
_FLOATS = tuple(NUMPY_TYPES[name] for name in ("float16", "float32", "float64"))
_SMALL_INTEGERS = tuple(NUMPY_TYPES[name] for name in ("int8", "uint8"))
_QUANTISED = {(Codec.Q8, dtype): _EIGHT_BITS for dtype in _FLOATS}
_QUANTISED |= {(Codec.Q4, dtype): _FOUR_BITS for dtype in _FLOATS + _SMALL_INTEGERS}
"""With how many bits a codec stores the values of a type; the rest is stored without loss."""


def encode(codec: Codec, tensors: Sequence[Array], specs: Sequence[TensorSpec] | None = None) -> bytes:
    """The payload of one sample.

    `specs` describe the tensors where the model is known; q4 takes the zero points of quantised tensors from them.
    """
    if codec is Codec.RAW:
        return b"".join([bytes_of(tensor) for tensor in tensors])
    flat = [_flat(tensor) for tensor in tensors]
    zeros = [0] * len(flat) if specs is None else [_zero_point(spec) for spec in specs]
    ranges = [
        affine.fit(values, bits, zero=zero) if (bits := _QUANTISED.get((codec, values.dtype))) else None
        for values, zero in zip(flat, zeros, strict=True)
    ]
    sizes = [
        values.nbytes if fitted is None else fitted.body_bytes(values.size)
        for values, fitted in zip(flat, ranges, strict=True)
    ]
    body = np.empty(sum(sizes), np.uint8)
    at = 0
    for values, fitted, size in zip(flat, ranges, sizes, strict=True):
        part = body[at : at + size]
        if fitted is None:
            byte_planes.sort(values, part)
        else:
            fitted.quantise(values, part)
        at += size
    front = b"".join([bytes((_LOSSLESS,)) if one is None else bytes((one.bits,)) + one.packed() for one in ranges])
    return front + zstandard_frames.compress(body) if body.size else front


def encode_sample(codec: Codec, tensors: Sequence[Array], specs: Sequence[TensorSpec] | None = None) -> Encoded:
    """One sample, ready to be sent."""
    return Encoded(codec, heads_of(tensors), memoryview(encode(codec, tensors, specs)))


def decode_sample(encoded: Encoded, limit_bytes: int) -> list[Array]:
    """The tensors of a sample that arrived. Raises as `decode`."""
    return decode(encoded.codec, encoded.tensors, encoded.payload, limit_bytes)


def decode(codec: Codec, heads: Sequence[TensorHead], payload: bytes | memoryview, limit_bytes: int) -> list[Array]:
    """The tensors of one sample, which may have at most `limit_bytes`; they are read-only.

    Raises `ProtocolError` `oversized` or `undecodable` for a payload that `encode` cannot have made of such tensors. Time and
    memory are in proportion to the size of the tensors and of the payload, whatever the payload claims.
    """
    raw_bytes = sum([head.size_bytes for head in heads])
    if raw_bytes > limit_bytes:
        raise ProtocolError("oversized", f"tensors of {raw_bytes:,} bytes, expected at most {limit_bytes:,}")
    view = memoryview(payload).toreadonly()
    if codec is Codec.RAW:
        if view.nbytes != raw_bytes:
            raise ProtocolError("undecodable", f"{view.nbytes:,} bytes for tensors of {raw_bytes:,}")
        return to_tensors(heads, view)
    stored, frame = _stored(codec, heads, view)
    body_bytes = sum([one.size_bytes for one in stored])
    body = memoryview(zstandard_frames.decompress(frame, body_bytes))
    arrays, at = [], 0
    for head, one in zip(heads, stored, strict=True):
        arrays.append(_restored(head, one, np.frombuffer(body[at : at + one.size_bytes], np.uint8)))
        at += one.size_bytes
    return arrays


class _Stored(NamedTuple):
    """How one tensor is stored, and the size of its body."""

    fitted: Affine | None  # None: without loss
    size_bytes: int


def _stored(codec: Codec, heads: Sequence[TensorHead], payload: memoryview) -> tuple[list[_Stored], memoryview]:
    """How the tensors are stored, and the Zstandard frame behind that."""
    stored, at = [], 0
    for head in heads:
        bits = payload[at] if at < payload.nbytes else None
        if bits != _LOSSLESS and bits != _QUANTISED.get((codec, NUMPY_TYPES[head.dtype]), _LOSSLESS):
            raise ProtocolError(
                "undecodable", f"a tensor of {head.dtype} cannot be stored as {bits} with codec {codec}"
            )
        at += 1
        if bits == _LOSSLESS:
            stored.append(_Stored(None, head.size_bytes))
            continue
        fitted = Affine.unpacked(bits, payload[at : at + RANGE_BYTES], head.dtype)
        at += RANGE_BYTES
        stored.append(_Stored(fitted, fitted.body_bytes(head.items)))
    return stored, payload[at:]


def _restored(head: TensorHead, stored: _Stored, body: Array) -> Array:
    dtype = NUMPY_TYPES[head.dtype]
    if stored.fitted is None:
        values = byte_planes.restore(body, dtype)
    else:
        values = stored.fitted.restore(body, head.items, dtype)
    values = values.reshape(head.shape)
    values.flags.writeable = False
    return values


def _zero_point(spec: TensorSpec) -> int:
    """The stored number that means zero."""
    return spec.zero_points[0] if len(spec.zero_points) == 1 else 0


def _flat(tensor: Array) -> Array:
    """Its values in C order and little-endian."""
    if tensor.flags.c_contiguous and tensor.dtype.isnative and sys.byteorder == "little":
        return tensor.reshape(-1)
    return np.frombuffer(bytes_of(tensor), NUMPY_TYPES[tensor.dtype.name])
