"""A writer of `.tflite` files that streams the weights.

Offsets in a flatbuffer point forwards, so weights may follow the rest of the file. The flatbuffers library packs the
structure with a one-byte placeholder per weight; the writer redirects the placeholders' offsets to the end of the file and
then writes the weights there in chunks. The result is an ordinary flatbuffer without the external buffers that older readers
reject, and memory holds only one chunk at a time.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

FILE_IDENTIFIER = b"TFL3"
WEIGHT_ALIGNMENT_BYTES = 64
"""One cache line, so that vector loads are aligned in every kernel; the format requires 16."""

LARGEST_FILE_BYTES = (1 << 31) - 1
"""Maximum file size: most verifiers read flatbuffer offsets as signed 32-bit integers."""

STREAMED_BYTES = 4096
"""Buffers of at least this size are copied directly from the mapped source, without heap memory."""

ModelBytes: TypeAlias = bytes | mmap.mmap  # a model file, in memory or mapped
Chunk: TypeAlias = bytes | bytearray | memoryview
ModelT: TypeAlias = Any  # the generated object API is not typed


@dataclass(frozen=True)
class Blob:
    """The bytes of one weight buffer, generated when they are written."""

    size_bytes: int  # total size of the pieces
    pieces: Callable[[], Iterable[Chunk]]  # called once per written file

    @classmethod
    def of(cls, data: Chunk) -> Blob:
        """A blob of existing bytes, which are referenced, not copied."""
        view = memoryview(data).cast("B")
        return cls(view.nbytes, lambda: (view,))


def stored_bytes(model: ModelT, data: ModelBytes, index: int) -> memoryview | None:
    """The bytes of a buffer as a view; None if it is empty. `model` was unpacked from `data`."""
    found = model.buffers[index]
    if isinstance(found.data, np.ndarray) and found.data.size:
        return memoryview(found.data.data)
    if found.offset > 1:  # large models store weights after the flatbuffer
        return memoryview(data)[found.offset : found.offset + found.size]
    return None


def forget_pages(data: ModelBytes) -> None:
    """Frees the memory pages of a mapped file; a later access reads them from the file again."""
    if isinstance(data, mmap.mmap) and hasattr(data, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def tflite_chunks(model: ModelT, blobs: Mapping[int, Blob]) -> Iterable[Chunk]:
    """The bytes, in order, of the `.tflite` file of `model`, with `blobs[k]` as content of buffer k.

    Raises `ValueError` if the file exceeds the maximum size or a blob differs from its declared size.
    """
    filled = {index: blob for index, blob in blobs.items() if blob.size_bytes > 0}
    for index in filled:
        model.buffers[index].data = np.zeros(1, np.uint8)
    builder = flatbuffers.Builder(1 << 14)
    builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
    head = bytearray(builder.Output())
    for index in filled:
        model.buffers[index].data = None

    packed = schema.Model.GetRootAs(head, 0)
    position = len(head)
    tail: list[tuple[bytes, Blob]] = []
    for index, blob in sorted(filled.items()):
        table = packed.Buffers(index)._tab
        reference = table.Pos + table.Offset(4)
        start = _aligned(position)
        struct.pack_into("<I", head, reference, start - 4 - reference)
        tail.append((bytes(start - 4 - position) + struct.pack("<I", blob.size_bytes), blob))
        position = start + blob.size_bytes
    if position > LARGEST_FILE_BYTES:
        raise ValueError(f"the file would have {position:,} bytes, more than a flatbuffer can address")

    yield bytes(head)
    for prefix, blob in tail:
        yield prefix
        written = 0
        for piece in blob.pieces():
            written += memoryview(piece).nbytes
            yield piece
        if written != blob.size_bytes:
            raise ValueError(f"a weight was declared with {blob.size_bytes:,} bytes and has {written:,}")


def tflite_size(head_bytes: int, blobs: Mapping[int, Blob]) -> int:
    """The size of a file whose structure (the first chunk) has `head_bytes`."""
    position = head_bytes
    for _, blob in sorted(blobs.items()):
        if blob.size_bytes:
            position = _aligned(position) + blob.size_bytes
    return position


def _aligned(position: int) -> int:
    """The offset of the next weight's data: after its 4-byte length, on an alignment boundary."""
    return -(-(position + 4) // WEIGHT_ALIGNMENT_BYTES) * WEIGHT_ALIGNMENT_BYTES


def tflite_bytes(model: ModelT, blobs: Mapping[int, Blob]) -> bytes:
    """The whole file in memory, for small models."""
    return b"".join(bytes(chunk) for chunk in tflite_chunks(model, blobs))
