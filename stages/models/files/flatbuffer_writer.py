"""Writing `.tflite` files with their weights streamed.

A flatbuffer refers forwards only, so the weights can stand behind everything else: the structure is packed by the
flatbuffers library with one-byte stand-ins for the weights, the stand-ins' references are then pointed at the tail, and
the weights follow piece by piece. The file is an ordinary flatbuffer (no out-of-line buffers, which older readers do not
know), half a gigabyte is written in the time of a copy, and memory never holds more than one piece.
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
"""The format asks for 16; a cache line keeps vector loads of every kernel aligned."""

LARGEST_FILE_BYTES = (1 << 31) - 1
"""Offsets inside a flatbuffer are signed to most verifiers, so a file ends at 2 GiB."""

STREAMED_BYTES = 4096
"""Buffers from this size on are copied from the mapped source, never through the heap."""

ModelBytes: TypeAlias = bytes | mmap.mmap  # a model file, in memory or mapped
Chunk: TypeAlias = bytes | bytearray | memoryview
ModelT: TypeAlias = Any  # the generated object API is not typed


@dataclass(frozen=True)
class Blob:
    """The bytes of one weight buffer, produced when they are written."""

    size_bytes: int  # the sum of the pieces
    pieces: Callable[[], Iterable[Chunk]]  # called once for each writing

    @classmethod
    def of(cls, data: Chunk) -> Blob:
        """A blob that is there already; it is kept, not copied."""
        view = memoryview(data).cast("B")
        return cls(view.nbytes, lambda: (view,))


def stored_bytes(model: ModelT, data: ModelBytes, index: int) -> memoryview | None:
    """The bytes of a buffer of `model`, the unpacked `data`, as a view of it; None where the buffer has none."""
    found = model.buffers[index]
    if isinstance(found.data, np.ndarray) and found.data.size:
        return memoryview(found.data.data)
    if found.offset > 1:  # stored behind the flatbuffer, as large models do
        return memoryview(data)[found.offset : found.offset + found.size]
    return None


def forget_pages(data: ModelBytes) -> None:
    """Lets go of the memory of a mapped file; it is read again where it is touched again."""
    if isinstance(data, mmap.mmap) and hasattr(data, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def tflite_chunks(model: ModelT, blobs: Mapping[int, Blob]) -> Iterable[Chunk]:
    """The bytes of the `.tflite` file of `model`, whose buffer k holds `blobs[k]` where given, in order.

    Raises `ValueError` where the file would be larger than a flatbuffer can be, or a blob does not have the size it says.
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
            raise ValueError(f"a weight said {blob.size_bytes:,} bytes and had {written:,}")


def tflite_size(head_bytes: int, blobs: Mapping[int, Blob]) -> int:
    """The size of the file whose first chunk has `head_bytes`."""
    position = head_bytes
    for _, blob in sorted(blobs.items()):
        if blob.size_bytes:
            position = _aligned(position) + blob.size_bytes
    return position


def _aligned(position: int) -> int:
    """Where the next weight's data start: after its length of four bytes, on an alignment boundary."""
    return -(-(position + 4) // WEIGHT_ALIGNMENT_BYTES) * WEIGHT_ALIGNMENT_BYTES


def tflite_bytes(model: ModelT, blobs: Mapping[int, Blob]) -> bytes:
    """The whole file in memory, for small models."""
    return b"".join(bytes(chunk) for chunk in tflite_chunks(model, blobs))
