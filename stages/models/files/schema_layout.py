"""The table layout of `.tflite` files, derived from the schema's generated writer.

The generated module has a function that writes each field. Called with a recorder instead of a builder, it reveals the
field's slot, its width, and the width of vector elements. Only the targets of offsets are listed here by hand.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ai_edge_litert import schema_py_generated as schema

_WIDTHS = {
    "Bool": 1, "Byte": 1, "Uint8": 1, "Int8": 1, "Uint16": 2, "Int16": 2, "Uint32": 4, "Int32": 4,
    "Float32": 4, "Uint64": 8, "Int64": 8, "Float64": 8,
}  # fmt: skip

_LEADS_TO: dict[tuple[str, str], str] = {
    ("Model", "OperatorCodes"): "OperatorCode",
    ("Model", "Subgraphs"): "SubGraph",
    ("Model", "Buffers"): "Buffer",
    ("Model", "Metadata"): "Metadata",
    ("Model", "SignatureDefs"): "SignatureDef",
    ("Model", "ExternalBufferGroups"): "ExternalBufferGroup",
    ("Model", "ExternalBuffers"): "ExternalBuffer",
    ("SubGraph", "Tensors"): "Tensor",
    ("SubGraph", "Operators"): "Operator",
    ("Tensor", "Quantization"): "QuantizationParameters",
    ("Tensor", "Sparsity"): "SparsityParameters",
    ("Tensor", "VariantTensors"): "VariantSubType",
    ("SparsityParameters", "DimMetadata"): "DimensionMetadata",
    ("SignatureDef", "Inputs"): "TensorMap",
    ("SignatureDef", "Outputs"): "TensorMap",
}
"""(table, field) -> the table that the field, or each element of its vector, refers to. Others are strings or numbers."""

_UNIONS: dict[tuple[str, str], str] = {
    ("QuantizationParameters", "Details"): "QuantizationDetails",
    ("DimensionMetadata", "ArraySegments"): "SparseIndexVector",
    ("DimensionMetadata", "ArrayIndices"): "SparseIndexVector",
    ("Operator", "BuiltinOptions"): "BuiltinOptions",
    ("Operator", "BuiltinOptions2"): "BuiltinOptions2",
}
"""(table, field) -> the enumeration of its possible tables; the preceding slot holds the value of the enumeration."""


@dataclass(frozen=True)
class Field:
    """One slot of a table."""

    name: str
    width: int  # bytes of a scalar, 4 for an offset
    is_offset: bool = False
    element_width: int = 1  # of a vector's elements; 1 for strings
    is_text: bool = False  # a string, which ends with a zero byte
    table: str | None = None  # the table that the offset or each vector element refers to
    is_vector: bool = False  # a vector, of numbers or of offsets
    union: tuple[str | None, ...] = ()  # for a union: the table for each value of the preceding slot


class _Recorder:
    """Records the calls that a builder would receive."""

    def __init__(self) -> None:
        self.slot: tuple[int, int, bool] | None = None
        self.element_width: int | None = None

    def StartVector(self, width: int, _count: int, _alignment: int) -> int:
        self.element_width = width
        return 0

    def __getattr__(self, name: str) -> Any:
        found = re.fullmatch(r"Prepend(\w+?)Slot", name)
        if found is None:
            raise AttributeError(name)
        kind = found[1]

        def prepend(slot: int, *_: Any) -> None:
            self.slot = (slot, _WIDTHS.get(kind, 4), kind not in _WIDTHS)

        return prepend


@cache
def tables() -> dict[str, dict[int, Field]]:
    """Every table of the schema: slot -> field."""
    functions = dict(inspect.getmembers(schema, inspect.isfunction))
    found: dict[str, dict[int, Field]] = {}
    for name, _ in inspect.getmembers(schema, inspect.isclass):
        if f"{name}Start" not in functions or f"{name}End" not in functions:
            continue
        found[name] = {}
        for function, call in functions.items():
            if not function.startswith(f"{name}Add"):
                continue
            field = function.removeprefix(f"{name}Add")
            recorder = _Recorder()
            call(recorder, 0)
            assert recorder.slot is not None
            slot, width, is_offset = recorder.slot
            vector = functions.get(f"{name}Start{field}Vector")
            if vector is not None:
                vector(recorder, 0)
            target = _LEADS_TO.get((name, field))
            union = _UNIONS.get((name, field))
            found[name][slot] = Field(
                name=field,
                width=width,
                is_offset=is_offset,
                element_width=recorder.element_width or 1,
                is_text=is_offset and vector is None and target is None and union is None,
                table=target,
                is_vector=vector is not None,
                union=_members(union) if union else (),
            )
    return found


def _members(union: str) -> tuple[str | None, ...]:
    values = {code: name for name, code in vars(getattr(schema, union)).items() if isinstance(code, int)}
    return tuple(None if values.get(code, "NONE") == "NONE" else values[code] for code in range(max(values) + 1))
