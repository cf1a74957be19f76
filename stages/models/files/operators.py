"""Properties of operator kinds that the slicer needs: state, control flow and cost.

Kinds are the names of the schema's `BuiltinOperator`; custom operators are `CUSTOM:CODE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from ai_edge_litert import schema_py_generated as schema

ITEM_BITS: dict[int, int] = {
    getattr(schema.TensorType, name): bits
    for name, bits in {
        "FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "UINT8": 8, "INT64": 64, "BOOL": 8, "INT16": 16, "COMPLEX64": 64,
        "INT8": 8, "FLOAT64": 64, "COMPLEX128": 128, "UINT64": 64, "UINT32": 32, "UINT16": 16, "INT4": 4, "BFLOAT16": 16,
        "INT2": 2, "UINT4": 4, "FLOAT8_E4M3FN": 8, "FLOAT8_E5M2": 8,
    }.items()
    if hasattr(schema.TensorType, name)
}  # fmt: skip
"""Tensor type -> bits per element, for types of fixed size."""

KINDS: dict[int, str] = {
    code: name
    for name, code in vars(schema.BuiltinOperator).items()
    if not name.startswith("_") and isinstance(code, int)
}

CONTROL_FLOW: dict[str, tuple[str, ...]] = {
    "IF": ("thenSubgraphIndex", "elseSubgraphIndex"),
    "WHILE": ("condSubgraphIndex", "bodySubgraphIndex"),
    "CALL": ("subgraph",),
    "CALL_ONCE": ("initSubgraphIndex",),
    "STABLEHLO_WHILE": ("condSubgraphIndex", "bodySubgraphIndex"),
    "STABLEHLO_REDUCE": ("bodySubgraphIndex",),
    "STABLEHLO_SCATTER": ("updateComputationSubgraphIndex",),
    "STABLEHLO_SORT": ("comparatorSubgraphIndex",),
    "STABLEHLO_REDUCE_WINDOW": ("bodySubgraphIndex",),
    "STABLEHLO_COMPOSITE": ("decompositionSubgraphIndex",),
}
"""Operators that run other subgraphs, and the options that name them."""

HANDLES = frozenset({"VAR_HANDLE", "HASHTABLE"})
"""Operators that create a handle to named state; the slicer copies them into every slice that uses the handle."""

SHAPE_READERS = frozenset({"SHAPE", "RANK"})
"""Operators that read only the shape of their input."""

SHAPED_BY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("RESHAPE", "TILE", "PAD", "PADV2", "MIRROR_PAD", "BROADCAST_TO", "ONE_HOT", "TOPK_V2"), (1,)),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "TRANSPOSE", "EXPAND_DIMS", "RFFT2D"), (1,)),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY", "REDUCE_ALL"), (1,)),
    **dict.fromkeys(("ARG_MAX", "ARG_MIN", "SPARSE_TO_DENSE", "MULTINOMIAL"), (1,)),
    **dict.fromkeys(("SLICE", "SPLIT_V", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"), (1, 2)),
    **dict.fromkeys(("FILL", "SPLIT", "TRANSPOSE_CONV", "CONV_3D_TRANSPOSE", "RANDOM_UNIFORM"), (0,)),
    **dict.fromkeys(("SCATTER_ND", "UNSORTED_SEGMENT_SUM", "UNSORTED_SEGMENT_MAX", "UNSORTED_SEGMENT_MIN"), (2,)),
    **dict.fromkeys(("NON_MAX_SUPPRESSION_V4", "NON_MAX_SUPPRESSION_V5", "UNSORTED_SEGMENT_PROD"), (2,)),
    "RANDOM_STANDARD_NORMAL": (0,),
    "STRIDED_SLICE": (1, 2, 3),
    "RANGE": (0, 1, 2),
}
"""Operands whose *values* determine the shape of the result."""

SHAPED_BY_VALUES = frozenset({"WHERE", "UNIQUE", "SEGMENT_SUM"})
"""Operators whose result's size depends on the input's values."""

WRITERS = frozenset({"ASSIGN_VARIABLE", "HASHTABLE_IMPORT"})
"""Operators that change the state behind a handle."""

UNREPEATABLE = frozenset(
    {"RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM", "MULTINOMIAL", "STABLEHLO_RNG_BIT_GENERATOR", "DELEGATE"}
)
"""Operators whose result is not determined by their inputs, so that two slices would compute different values."""


KEPT_METADATA = frozenset({"min_runtime_version", "CONVERSION_METADATA", "reduced_precision_support"})
"""Metadata that apply to every part. Others may refer to tensors or operators of the whole model by index."""


def kind_of(code: Any) -> str:
    """The kind of an operator code of the object API."""
    kind = KINDS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
    return f"CUSTOM:{text(code.customCode)}" if kind == "CUSTOM" else kind


def subgraphs_of(operator: Any, kind: str) -> list[tuple[str, int]]:
    """(option name, subgraph index) for every subgraph that the operator runs."""
    fields = CONTROL_FLOW.get(kind)
    if fields is None:
        if kind == "STABLEHLO_CASE" and operator.builtinOptions2 is not None:
            indices = operator.builtinOptions2.branchSubgraphIndices
            return [("branchSubgraphIndices", int(index)) for index in ([] if indices is None else indices)]
        return []
    options = operator.builtinOptions if operator.builtinOptions is not None else operator.builtinOptions2
    return [] if options is None else [(field, int(getattr(options, field))) for field in fields]


def constants_without_elements(graph: Any) -> set[int]:
    """Tensors of a subgraph that have no elements, are no input, and are made by no operator.

    They are constants: a tensor of shape (0,) is complete without data, whichever buffer it names.
    """
    elsewhere = {int(index) for index in (() if graph.inputs is None else graph.inputs)}
    for operator in graph.operators or []:
        elsewhere.update(int(index) for index in (() if operator.outputs is None else operator.outputs))
    return {
        index
        for index, tensor in enumerate(graph.tensors or [])
        if index not in elsewhere and tensor.type in ITEM_BITS and tensor.shape is not None and 0 in tensor.shape
    }


def text(raw: bytes | str | None) -> str:
    """A string of the file; bytes that are not UTF-8 are escaped."""
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw or ""


def multiply_accumulates(kind: str, inputs: list[tuple[int, ...] | None], outputs: Iterable[tuple[int, ...]]) -> float:
    """Estimated multiply-accumulates of an operator from its shapes; by default one per output value.

    `inputs` holds None for an absent optional input. Convolutions and matrix products are counted exactly.
    """
    made = float(sum(prod(shape) for shape in outputs))
    kernel = inputs[1] if len(inputs) > 1 else None
    first = inputs[0] if inputs else None
    if kind in ("CONV_2D", "CONV_3D") and kernel is not None and kernel:
        # a kernel is (filters, height, width, channels), (depth, height, width, channels, filters) in 3-D
        return made * prod(kernel[1:] if kind == "CONV_2D" else kernel[:-1])
    if kind == "DEPTHWISE_CONV_2D" and kernel is not None:
        return made * prod(kernel[1:3])
    if kind == "TRANSPOSE_CONV" and kernel is not None and len(inputs) > 2 and inputs[2] is not None:
        return float(prod(inputs[2])) * prod(kernel[:3])
    if kind == "FULLY_CONNECTED" and kernel is not None and kernel:
        return made * kernel[-1]
    if kind == "BATCH_MATMUL" and first:
        return made * first[-1]
    if kind in ("MAX_POOL_2D", "AVERAGE_POOL_2D", "MEAN", "SUM", "REDUCE_MAX") and first is not None:
        return max(made, float(prod(first)))
    if kind.endswith(("LSTM", "RNN", "SVDF")):
        steps = first[0] * first[1] if first is not None and len(first) == 3 else 1
        return max(
            made, float(sum(prod(shape) for shape in inputs[1:] if shape is not None and len(shape) == 2) * steps)
        )
    if kind in ("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "SHAPE", "RANK"):
        return 0.0
    return made
