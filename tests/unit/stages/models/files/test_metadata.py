"""The metadata of a model file: None if it is missing or broken."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

from stages.models.files.metadata import ModelMetadata, read_metadata

LENET = Path(__file__).parents[5] / "stages" / "data" / "lenet.tflite"
LABELS = [f"digit {number}" for number in range(10)]


def packed_metadata(label_file: str = "labels.txt") -> bytes:
    """The flatbuffer of a classifier's metadata, written field by field with the numbers of the schema."""
    builder = flatbuffers.Builder(1024)

    def vector(offsets: list[int]) -> Any:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    def table(fields: dict[int, int]) -> Any:
        builder.StartObject(8)
        for number, offset in fields.items():
            builder.PrependUOffsetTRelativeSlot(number, offset, 0)
        return builder.EndObject()

    def floats(values: list[float]) -> Any:
        builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            builder.PrependFloat32(value)
        return builder.EndVector()

    options = table({0: floats([127.5]), 1: floats([127.0])})
    builder.StartObject(2)
    builder.PrependUint8Slot(0, 1, 0)
    builder.PrependUOffsetTRelativeSlot(1, options, 0)
    unit = builder.EndObject()
    name = builder.CreateString(label_file)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependInt8Slot(2, 2, 0)
    file = builder.EndObject()
    model_input, output = table({4: vector([unit])}), table({6: vector([file])})
    subgraph = table({2: vector([model_input]), 3: vector([output])})
    builder.Finish(table({3: vector([subgraph])}), b"M001")
    return bytes(builder.Output())


def with_metadata(packed: bytes, labels: str = "\n".join(LABELS)) -> bytes:
    """LeNet's file with metadata, and a zip archive with the labels behind it."""
    model = schema.ModelT.InitFromPackedBuf(LENET.read_bytes(), 0)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data, entry.name, entry.buffer = list(packed), "TFLITE_METADATA", len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("labels.txt", labels)
    return bytes(builder.Output()) + archive.getvalue()


def test_normalisation_and_labels() -> None:
    assert read_metadata(with_metadata(packed_metadata())) == ModelMetadata((127.5,), (127.0,), tuple(LABELS))


def test_a_model_without_metadata() -> None:
    assert read_metadata(LENET.read_bytes()) is None


def test_a_label_file_that_is_missing() -> None:
    assert read_metadata(with_metadata(packed_metadata("other.txt"))) == ModelMetadata((127.5,), (127.0,), ())


def test_labels_are_bounded() -> None:
    found = read_metadata(with_metadata(packed_metadata(), "x" * (8 << 20)))
    assert found is not None
    assert sum(map(len, found.labels)) == 1 << 20


def test_broken_metadata_is_no_metadata_or_some_of_it() -> None:
    rng = random.Random(0)
    good = packed_metadata()
    base = with_metadata(good)
    at = base.index(good)
    for _ in range(500):
        broken = bytearray(base)
        for _ in range(rng.randint(1, 8)):
            broken[at + rng.randrange(len(good))] = rng.randrange(256)
        found = read_metadata(bytes(broken))
        assert found is None or isinstance(found, ModelMetadata)
