"""The metadata that a `.tflite` file may carry: how to prepare an image for it, and the names of its classes.

A model with metadata has an entry `TFLITE_METADATA`, a flatbuffer of its own schema (identifier M001), and a zip archive with
label files behind the end of the model. The field numbers below are those of TensorFlow Lite's `metadata_schema.fbs`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ai_edge_litert import schema_py_generated as schema
from flatbuffers import number_types
from flatbuffers.table import Table

ENTRY = b"TFLITE_METADATA"
MAX_LABELS_BYTES = 1 << 20
"""Size limit of a label file, unpacked."""
MAX_LABELS = 100_000
# field numbers of the schema's tables
_SUBGRAPHS, _INPUTS, _OUTPUTS = 3, 2, 3  # of ModelMetadata, SubGraphMetadata
_PROCESS_UNITS, _FILES = 4, 6  # of TensorMetadata
_NORMALIZATION = 1  # in the union of process units
_AXIS_LABELS = 2  # type of an associated file


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What the metadata of a model says about its first input and its first output."""

    mean: tuple[float, ...] = ()  # per channel, or one for all: the input is (pixel - mean) / std
    std: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()  # names of the classes, in the order of the output


def read_metadata(data: Any) -> ModelMetadata | None:
    """The metadata of the model file `data` (bytes, or a mapped file); None where it has none or it cannot be read."""
    view = memoryview(data)
    try:
        packed = _entry(view)
        if packed is None:
            return None
        root = Table(packed, struct.unpack_from("<I", packed)[0])
        subgraph = next(_tables(root, _SUBGRAPHS), None)
        if subgraph is None:
            return None
        mean, std = _normalization(next(_tables(subgraph, _INPUTS), None))
        return ModelMetadata(mean, std, _labels(next(_tables(subgraph, _OUTPUTS), None), view))
    except Exception:  # broken bytes raise many kinds of errors
        return None  # metadata is a help, so a broken one is no reason to refuse the model


def _entry(view: memoryview) -> bytes | None:
    model = schema.Model.GetRootAs(view, 0)
    for number in range(min(model.MetadataLength(), 1000)):
        entry = model.Metadata(number)
        if entry is not None and entry.Name() == ENTRY:
            content = model.Buffers(entry.Buffer())
            return None if content is None or content.DataIsNone() else bytes(content.DataAsNumpy())
    return None


def _field(table: Table, number: int) -> int:
    """The position of a field in its table's buffer; 0 where it is absent."""
    offset: int = table.Offset(4 + 2 * number)
    return table.Pos + offset if offset else 0


def _tables(table: Table | None, number: int) -> Iterator[Table]:
    """The tables in a field that is a vector of tables."""
    if table is None or not _field(table, number):
        return
    offset = table.Offset(4 + 2 * number)
    start, length = table.Vector(offset), table.VectorLen(offset)
    for at in range(min(length, 1000)):
        yield Table(table.Bytes, table.Indirect(start + 4 * at))


def _floats(table: Table, number: int) -> tuple[float, ...]:
    if not _field(table, number):
        return ()
    offset = table.Offset(4 + 2 * number)
    count = min(table.VectorLen(offset), 64)
    return struct.unpack_from(f"<{count}f", table.Bytes, table.Vector(offset))


def _normalization(tensor: Table | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for unit in _tables(tensor, _PROCESS_UNITS):
        kind = _field(unit, 0)
        if kind and unit.Get(number_types.Uint8Flags, kind) == _NORMALIZATION and _field(unit, 1):
            options = Table(unit.Bytes, unit.Indirect(_field(unit, 1)))
            return _floats(options, 0), _floats(options, 1)
    return (), ()


def _labels(tensor: Table | None, view: memoryview) -> tuple[str, ...]:
    for file in _tables(tensor, _FILES):
        kind = _field(file, 2)
        if kind and file.Get(number_types.Int8Flags, kind) == _AXIS_LABELS and _field(file, 0):
            name = file.String(_field(file, 0)).decode()
            with zipfile.ZipFile(io.BufferedReader(_View(view))) as archive:
                if name not in archive.namelist():
                    return ()
                with archive.open(name) as content:
                    text = content.read(MAX_LABELS_BYTES).decode(errors="replace")
            return tuple(text.splitlines()[:MAX_LABELS])
    return ()


class _View(io.RawIOBase):
    """A file that reads from memory without a copy of the whole."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._view.nbytes}[whence]
        if base + offset < 0:
            raise OSError("a position before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: part.nbytes] = part
        self._at += part.nbytes
        return part.nbytes
