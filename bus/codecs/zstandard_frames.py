"""Zstandard frames, and the limits under which those of others are decompressed.

The content size in a frame's header is a claim of its sender: a frame is decompressed only if the claim equals the size that
the caller expects. Then zstandard writes into one buffer of that size, needs no other memory, and rejects any other content.
"""

from __future__ import annotations

import threading

import zstandard

from bus.errors import ProtocolError
from bus.tensors import Array

_LEVEL = 1
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(_LEVEL, min_match=7, hash_log=10)
"""Level 1 with a smaller search for repetitions: quantised activations have few long ones, so that encoding is a third faster
and compresses as well.
"""


class _Contexts(threading.local):
    """One compressor and one decompressor for each thread, since they are expensive to make and not thread-safe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(body: Array) -> bytes:
    """A frame with these bytes, which says how many they are."""
    return _contexts.compressor.compress(body.data)


def decompress(frame: memoryview, size_bytes: int) -> bytes:
    """The content of a frame, which must have this size; no frame stands for no content.

    Raises `ProtocolError` `undecodable`.
    """
    if not size_bytes:
        if frame.nbytes:
            raise ProtocolError("undecodable", f"{frame.nbytes:,} bytes behind tensors without content")
        return b""
    try:
        content_bytes = zstandard.get_frame_parameters(frame).content_size
        if content_bytes != size_bytes:
            raise ProtocolError("undecodable", f"compressed data of {content_bytes:,} bytes, expected {size_bytes:,}")
        return _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError("undecodable", f"invalid compressed data: {error}") from None
