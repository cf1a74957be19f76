"""Small models with everything that breaks a naive cut, built by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from stages.models.files.flatbuffer_writer import tflite_bytes
from stages.models.files.graph_builder import GraphBuilder, Quantization
from stages.models.files.operators import kind_of

RELU, RELU6, NONE = (
    schema.ActivationFunctionType.RELU,
    schema.ActivationFunctionType.RELU6,
    schema.ActivationFunctionType.NONE,
)
SAME = schema.Padding.SAME


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _weights(graph: GraphBuilder, name: str, shape: Sequence[int], seed: int) -> int:
    return graph.constant(name, (_rng(seed).standard_normal(shape) * 0.3).astype(np.float32))


def conv(
    graph: GraphBuilder, name: str, x: int, shape: Sequence[int], filters: int, size: int = 3, act: int = RELU
) -> int:
    """A convolution that keeps height and width; `shape` is the input's."""
    kernel = _weights(graph, f"{name}/kernel", (filters, size, size, shape[3]), len(name) + filters)
    bias = _weights(graph, f"{name}/bias", (filters,), 3)
    y = graph.tensor(name, (*shape[:3], filters))
    graph.operator("CONV_2D", [x, kernel, bias], [y], schema.Conv2DOptionsT(SAME, 1, 1, act))
    return y


def residual() -> GraphBuilder:
    graph = GraphBuilder("residual")
    shape = (1, 8, 8, 4)
    x = graph.input("input", shape)
    first = conv(graph, "conv_1", x, shape, 4)
    second = conv(graph, "conv_2", first, shape, 4)
    third = conv(graph, "conv_3", second, shape, 4, act=NONE)
    added = graph.tensor("add", shape)
    graph.operator("ADD", [first, third], [added], schema.AddOptionsT(fusedActivationFunction=RELU))
    graph.output(conv(graph, "conv_4", added, shape, 2))
    return graph


def inverted_residual() -> GraphBuilder:
    graph = GraphBuilder("inverted residual")
    shape, wide = (1, 10, 10, 8), (1, 10, 10, 24)
    x = graph.input("input", shape)
    expanded = conv(graph, "expand", x, shape, 24, 1, RELU6)
    kernel = _weights(graph, "depthwise/kernel", (1, 3, 3, 24), 5)
    bias = _weights(graph, "depthwise/bias", (24,), 6)
    deep = graph.tensor("depthwise", wide)
    options = schema.DepthwiseConv2DOptionsT(SAME, 1, 1, 1, RELU6)
    graph.operator("DEPTHWISE_CONV_2D", [expanded, kernel, bias], [deep], options)
    narrow = conv(graph, "project", deep, wide, 8, 1, NONE)
    added = graph.tensor("add", shape)
    graph.operator("ADD", [x, narrow], [added], schema.AddOptionsT())
    graph.output(added)
    return graph


def branches() -> GraphBuilder:
    graph = GraphBuilder("branches that are concatenated")
    shape = (1, 8, 8, 3)
    x = graph.input("input", shape)
    left = conv(graph, "left", x, shape, 4, 1)
    right = conv(graph, "right", x, shape, 5, 5)
    pooled = graph.tensor("pool", shape)
    graph.operator("MAX_POOL_2D", [x], [pooled], schema.Pool2DOptionsT(SAME, 1, 1, 3, 3, NONE))
    joined = graph.tensor("concat", (1, 8, 8, 12))
    graph.operator("CONCATENATION", [left, pooled, right], [joined], schema.ConcatenationOptionsT(axis=3))
    graph.output(conv(graph, "last", joined, (1, 8, 8, 12), 2))
    return graph


def two_in_three_out() -> GraphBuilder:
    graph = GraphBuilder("two inputs, three outputs, one of them early, names repeated")
    a, b = graph.input("a", (1, 16)), graph.input("b", (1, 16))
    tanh, logistic, added, product = (graph.tensor(name, (1, 16)) for name in ("early", "same", "same", "product"))
    graph.operator("TANH", [a], [tanh])
    graph.operator("LOGISTIC", [b], [logistic])
    graph.operator("ADD", [tanh, logistic], [added], schema.AddOptionsT())
    graph.operator("MUL", [added, a], [product], schema.MulOptionsT())
    graph.output(product, tanh, added)
    graph.signature("serving_default", {"left": a, "right": b}, {"p": product, "t": tanh, "s": added})
    return graph


def fp16_weights() -> GraphBuilder:
    graph = GraphBuilder("fp16 weights behind DEQUANTIZE")
    x = graph.input("input", (1, 32))
    for number in (1, 2):
        half = graph.constant(f"w{number}/fp16", _rng(number).standard_normal((32, 32)).astype(np.float16))
        whole = graph.tensor(f"w{number}", (32, 32))
        graph.operator("DEQUANTIZE", [half], [whole], schema.DequantizeOptionsT())
        y = graph.tensor(f"fc_{number}", (1, 32))
        graph.operator("FULLY_CONNECTED", [x, whole, -1], [y], schema.FullyConnectedOptionsT(RELU))
        x = y
    graph.output(x)
    return graph


def sparse_weights() -> GraphBuilder:
    graph = GraphBuilder("sparse weights behind DENSIFY")
    x = graph.input("input", (1, 24))
    for number in (1, 2):
        dense = _rng(number).standard_normal((24, 24)).astype(np.float32)
        kept = _rng(number + 10).random((24, 24)) < 0.2
        places = [np.flatnonzero(row) for row in kept]
        sparse = graph.constant(f"w{number}/sparse", dense[kept])
        record = graph.record(sparse)
        record.shape = [24, 24]
        segments = np.concatenate([[0], np.cumsum([len(row) for row in places])])
        record.sparsity = schema.SparsityParametersT(
            traversalOrder=[0, 1],
            dimMetadata=[
                schema.DimensionMetadataT(format=0, denseSize=24),
                schema.DimensionMetadataT(
                    format=1,
                    arraySegmentsType=1,
                    arraySegments=schema.Int32VectorT([int(at) for at in segments]),
                    arrayIndicesType=1,
                    arrayIndices=schema.Int32VectorT([int(at) for row in places for at in row]),
                ),
            ],
        )
        whole = graph.tensor(f"w{number}", (24, 24))
        graph.operator("DENSIFY", [sparse], [whole], schema.DensifyOptionsT())
        y = graph.tensor(f"fc_{number}", (1, 24))
        graph.operator("FULLY_CONNECTED", [x, whole, -1], [y], schema.FullyConnectedOptionsT(RELU))
        x = y
    graph.output(x)
    return graph


def quantized() -> GraphBuilder:
    graph = GraphBuilder("full int8 with a skip")
    shape = (1, 8, 8, 4)
    x = graph.input("input", shape, "int8", quantization=Quantization([0.05], [-3]))
    first = x
    for number in (1, 2):
        kernel = graph.constant(
            f"k{number}",
            _rng(number).integers(-127, 128, (4, 3, 3, 4)).astype(np.int8),
            quantization=Quantization([0.01, 0.02, 0.015, 0.03], [0] * 4),
        )
        bias = graph.constant(
            f"b{number}",
            _rng(number).integers(-500, 500, 4).astype(np.int32),
            quantization=Quantization([5e-4, 1e-3, 7.5e-4, 1.5e-3], [0] * 4),
        )
        y = graph.tensor(f"conv_{number}", shape, "int8", quantization=Quantization([0.05], [-3]))
        graph.operator("CONV_2D", [x, kernel, bias], [y], schema.Conv2DOptionsT(SAME, 1, 1, NONE), version=3)
        x = y
    added = graph.tensor("add", shape, "int8", quantization=Quantization([0.08], [4]))
    graph.operator("ADD", [x, first], [added], schema.AddOptionsT(), version=2)
    graph.output(added)
    return graph


def wide_integers() -> GraphBuilder:
    """int16 activations and a uint8 branch."""
    graph = GraphBuilder("int16 and uint8")
    x = graph.input("input", (1, 40), "int16", quantization=Quantization([0.001], [0]))
    back = graph.tensor("float", (1, 40))
    graph.operator("DEQUANTIZE", [x], [back], schema.DequantizeOptionsT(), version=3)
    small = graph.tensor("uint8", (1, 40), "uint8", quantization=Quantization([0.25], [128]))
    graph.operator("QUANTIZE", [back], [small], schema.QuantizeOptionsT())
    last = graph.tensor("again", (1, 40))
    graph.operator("DEQUANTIZE", [small], [last], schema.DequantizeOptionsT(), version=2)
    summed = graph.tensor("sum", (1, 40))
    graph.operator("ADD", [back, last], [summed], schema.AddOptionsT())
    graph.output(summed)
    return graph


def branching() -> GraphBuilder:
    graph = GraphBuilder("an IF with its subgraphs")
    x = graph.input("input", (1, 12))
    doubled, total, answer, yes = (
        graph.tensor(*spec) for spec in (("double", (1, 12)), ("total", ()), ("if", (1, 12)), ("yes", (), "bool"))
    )
    graph.operator("ADD", [x, x], [doubled], schema.AddOptionsT())
    axes = graph.constant("axes", np.array([0, 1], np.int32))
    graph.operator("SUM", [doubled, axes], [total], schema.ReducerOptionsT(keepDims=False))
    graph.operator(
        "GREATER", [total, graph.constant("limit", np.array(12.0, np.float32))], [yes], schema.GreaterOptionsT()
    )
    one = graph.begin_subgraph("then")
    _unary(graph, "TANH")
    two = graph.begin_subgraph("else")
    _unary(graph, "LOGISTIC")
    graph.resume_subgraph(0)
    graph.operator("IF", [yes, doubled], [answer], schema.IfOptionsT(one, two))
    last = graph.tensor("last", (1, 12))
    graph.operator("MUL", [answer, x], [last], schema.MulOptionsT())
    graph.output(last)
    return graph


def _unary(graph: GraphBuilder, kind: str) -> None:
    x = graph.input("x", (1, 12))
    y = graph.tensor("y", (1, 12))
    graph.operator(kind, [x], [y])
    graph.output(y)


def looping() -> GraphBuilder:
    graph = GraphBuilder("a WHILE with its subgraphs")
    x = graph.input("input", (1, 12))
    first = graph.tensor("first", (1, 12))
    graph.operator("TANH", [x], [first])
    start = graph.constant("start", np.array(0, np.int32))
    condition = graph.begin_subgraph("condition")
    count, _ = graph.input("count", (), "int32"), graph.input("value", (1, 12))
    more = graph.tensor("more", (), "bool")
    graph.operator("LESS", [count, graph.constant("times", np.array(4, np.int32))], [more], schema.LessOptionsT())
    graph.output(more)
    body = graph.begin_subgraph("body")
    count, value = graph.input("count", (), "int32"), graph.input("value", (1, 12))
    following, grown = graph.tensor("following", (), "int32"), graph.tensor("grown", (1, 12))
    graph.operator("ADD", [count, graph.constant("one", np.array(1, np.int32))], [following], schema.AddOptionsT())
    matrix = _weights(graph, "matrix", (12, 12), 8)
    graph.operator("FULLY_CONNECTED", [value, matrix, -1], [grown], schema.FullyConnectedOptionsT())
    graph.output(following, grown)
    graph.resume_subgraph(0)
    counted, looped = graph.tensor("counted", (), "int32"), graph.tensor("looped", (1, 12))
    graph.operator("WHILE", [start, first], [counted, looped], schema.WhileOptionsT(condition, body))
    last = graph.tensor("last", (1, 12))
    graph.operator("ADD", [looped, x], [last], schema.AddOptionsT())
    graph.output(last)
    return graph


def reshaping(*, dense: bool = False) -> GraphBuilder:
    graph = GraphBuilder("a batch left open, shapes computed at run time")
    x = graph.input("input", (1, 4, 4, 2), signature=(-1, 4, 4, 2))
    first = graph.tensor("relu", (1, 4, 4, 2), signature=(-1, 4, 4, 2))
    graph.operator("RELU", [x], [first])
    shape, batch = graph.tensor("shape", (4,), "int32"), graph.tensor("batch", (), "int32")
    graph.operator("SHAPE", [first], [shape], schema.ShapeOptionsT(outType=schema.TensorType.INT32))
    ends = [graph.constant(name, np.array([at], np.int32)) for name, at in (("from", 0), ("to", 1), ("by", 1))]
    graph.operator("STRIDED_SLICE", [shape, *ends], [batch], schema.StridedSliceOptionsT(shrinkAxisMask=1))
    wanted = graph.tensor("wanted", (2,), "int32")
    rest = graph.constant("rest", np.array(32, np.int32))
    graph.operator("PACK", [batch, rest], [wanted], schema.PackOptionsT(valuesCount=2))
    flat = graph.tensor("flat", (1, 1), signature=(-1, -1))
    graph.operator("RESHAPE", [first, wanted], [flat], schema.ReshapeOptionsT())
    last = graph.tensor("last", (1, 1), signature=(-1, -1))
    if dense:
        graph.operator("FULLY_CONNECTED", [flat, _weights(graph, "matrix", (3, 32), 9), -1], [last], _PLAIN)
    else:
        graph.operator("TANH", [flat], [last])
    graph.output(last)
    return graph


def stateful() -> GraphBuilder:
    """A counter that every sample adds to, between two layers that do not care."""
    graph = GraphBuilder("a variable that is read and written")
    x = graph.input("input", (1, 4))
    first = graph.tensor("first", (1, 4))
    graph.operator("TANH", [x], [first])
    setting = graph.begin_subgraph("setting")
    handle = graph.tensor("handle", (1,), "resource")
    options = schema.VarHandleOptionsT(container="", sharedName="counter")
    graph.operator("VAR_HANDLE", [], [handle], options)
    zero = graph.constant("zero", np.zeros((1, 4), np.float32))
    graph.operator("ASSIGN_VARIABLE", [handle, zero], [], schema.AssignVariableOptionsT())
    graph.resume_subgraph(0)
    graph.operator("CALL_ONCE", [], [], schema.CallOnceOptionsT(setting))
    handle = graph.tensor("handle", (1,), "resource")
    graph.operator("VAR_HANDLE", [], [handle], options)
    known, added, twice, last = (graph.tensor(name, (1, 4)) for name in ("known", "added", "twice", "last"))
    graph.operator("READ_VARIABLE", [handle], [known], schema.ReadVariableOptionsT())
    graph.operator("ADD", [known, first], [added], schema.AddOptionsT())
    graph.operator("ADD", [added, added], [twice], schema.AddOptionsT())
    graph.operator("ASSIGN_VARIABLE", [handle, added], [], schema.AssignVariableOptionsT())
    graph.operator("LOGISTIC", [twice], [last])
    graph.output(last)
    return graph


def finding() -> GraphBuilder:
    """WHERE: as many rows as there are values above zero."""
    graph = GraphBuilder("a shape that depends on the input")
    x = graph.input("input", (6,))
    yes, places, rows = (
        graph.tensor("yes", (6,), "bool"),
        graph.tensor("places", (1, 1), "int64"),
        graph.tensor("rows", (1,)),
    )
    shifted = graph.tensor("shifted", (6,))
    half = graph.constant("half", np.array(0.5, np.float32))
    graph.operator("SUB", [x, half], [shifted], schema.SubOptionsT())
    graph.operator(
        "GREATER", [shifted, graph.constant("zero", np.array(0, np.float32))], [yes], schema.GreaterOptionsT()
    )
    graph.operator("WHERE", [yes], [places], schema.WhereOptionsT())
    graph.operator("GATHER_ND", [shifted, places], [rows], schema.GatherNdOptionsT())
    total = graph.tensor("total", ())
    graph.operator("SUM", [rows, graph.constant("axis", np.array([0], np.int32))], [total], schema.ReducerOptionsT())
    graph.output(total)
    return graph


def custom() -> GraphBuilder:
    graph = GraphBuilder("a custom operator that nobody knows")
    x = graph.input("input", (1, 8))
    tensors = [graph.tensor(name, (1, 8)) for name in ("one", "two", "strange", "last")]
    graph.operator("TANH", [x], [tensors[0]])
    graph.operator("LOGISTIC", [tensors[0]], [tensors[1]])
    graph.operator("CUSTOM", [tensors[1]], [tensors[2]], custom_code="Strange", custom_options=b"\x01\x02")
    graph.operator("TANH", [tensors[2]], [tensors[3]])
    graph.output(tensors[3])
    return graph


def random_numbers() -> GraphBuilder:
    graph = GraphBuilder("random numbers")
    x = graph.input("input", (1, 8))
    noise, added, last = (graph.tensor(name, (1, 8)) for name in ("noise", "added", "last"))
    shape = graph.constant("shape", np.array([1, 8], np.int32))
    graph.operator("RANDOM_UNIFORM", [shape], [noise], schema.RandomOptionsT(seed=0, seed2=0))
    graph.operator("ADD", [x, noise], [added], schema.AddOptionsT())
    graph.operator("TANH", [added], [last])
    graph.output(last)
    return graph


def without_elements(kind: str, spelling: str) -> bytes:
    """TANH, an operator that reads a constant of no elements, NEG; the constant's buffer is spelled in one of three ways."""
    graph = GraphBuilder(f"{kind} over a constant without elements")
    shape, after = {"RESHAPE": ((1, 1), ()), "SUM": ((2, 3), (2, 3)), "CONCATENATION": ((2, 3), (2, 3))}[kind]
    x = graph.input("input", shape)
    tanh = graph.tensor("tanh", shape)
    graph.operator("TANH", [x], [tanh])
    empty, middle, last = (
        graph.tensor("empty", (2, 0) if kind == "CONCATENATION" else (0,), EMPTY_TYPES[kind]),
        graph.tensor("middle", after),
        graph.tensor("last", after),
    )
    options = {
        "RESHAPE": schema.ReshapeOptionsT(newShape=[]),
        "SUM": schema.ReducerOptionsT(keepDims=False),
        "CONCATENATION": schema.ConcatenationOptionsT(axis=1),
    }[kind]
    graph.operator(kind, [tanh, empty], [middle], options)
    graph.operator("NEG", [middle], [last], schema.NegOptionsT())
    graph.output(last)
    model = schema.ModelT.InitFromPackedBuf(graph.to_bytes(), 0)
    if spelling != "buffer 0":
        data = np.zeros(0, np.uint8) if spelling == "empty vector" else None
        model.buffers.append(schema.BufferT(data=data))
        model.subgraphs[0].tensors[empty].buffer = len(model.buffers) - 1
    return packed(model)


EMPTY_TYPES = {"RESHAPE": "int32", "SUM": "int32", "CONCATENATION": "float32"}


def packed(model: Any) -> bytes:
    """The file of a model of the object API, without changes."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def blockwise() -> GraphBuilder:
    """int4 weights with a float16 scale for each block of 32, in a tensor that no operator lists."""
    graph = GraphBuilder("blockwise int4 weights")
    x, columns = graph.input("input", (1, 64)), 64
    for number, rows in enumerate((96, 32), start=1):
        weights = graph.constant(f"weights_{number}", _rng(number).integers(0, 256, rows * columns // 2, np.uint8))
        scale = (_rng(number + 10).random((rows, columns // 32)) * 0.02 + 0.005).astype(np.float16)
        scales = graph.constant(f"scales_{number}", scale)
        record = graph.record(weights)
        record.shape, record.type = [rows, columns], schema.TensorType.INT4
        record.quantization = schema.QuantizationParametersT(quantizedDimension=0)
        record.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
        record.quantization.details = schema.BlockwiseQuantizationT(scales=scales, zeroPoints=-1, blockSize=32)
        tanh, y = graph.tensor(f"tanh_{number}", (1, columns)), graph.tensor(f"fc_{number}", (1, rows))
        graph.operator("TANH", [x], [tanh])
        graph.operator("FULLY_CONNECTED", [tanh, weights, -1], [y], schema.FullyConnectedOptionsT(NONE), version=12)
        x, columns = y, rows
    graph.output(x)
    return graph


def flattening() -> GraphBuilder:
    """FULLY_CONNECTED on the four dimensions of a convolution, which it flattens by itself."""
    graph = GraphBuilder("a fully-connected layer on a convolution")
    shape = (1, 3, 5, 2)
    x = graph.input("input", shape)
    first = conv(graph, "conv", x, shape, 4)
    matrix = _weights(graph, "matrix", (6, 60), 9)
    y = graph.tensor("fc", (1, 6))
    graph.operator("FULLY_CONNECTED", [first, matrix, -1], [y], schema.FullyConnectedOptionsT(keepNumDims=False))
    graph.output(y)
    return graph


def reshaped(*, wanted: Sequence[int] = (-1, 60), branch: bool = False, shown: bool = False) -> GraphBuilder:
    """FULLY_CONNECTED on a convolution that a RESHAPE flattens; `branch` adds a second reader, `shown` a second output."""
    graph = GraphBuilder("a convolution, a RESHAPE and a fully-connected layer")
    shape = (1, 3, 5, 2)
    x = graph.input("input", shape)
    first = conv(graph, "conv", x, shape, 4)
    after = tuple(60 // -int(np.prod(wanted)) if size == -1 else size for size in wanted)
    flat, y = graph.tensor("flat", after), graph.tensor("fc", (*after[:-1], 6))
    target = graph.constant("target", np.array(wanted, np.int32))
    graph.operator("RESHAPE", [first, target], [flat], schema.ReshapeOptionsT(list(wanted)))
    graph.operator("FULLY_CONNECTED", [flat, _weights(graph, "matrix", (6, after[-1]), 9), -1], [y], _PLAIN)
    graph.output(y, *([flat] if shown else []))
    if branch:
        twice = graph.tensor("tanh", after)
        graph.operator("TANH", [flat], [twice])
        graph.output(twice)
    return graph


def flattened() -> GraphBuilder:
    return reshaped()


def flattened_early() -> GraphBuilder:
    """Between the RESHAPE and the fully-connected layer that reads it are two layers of another branch."""
    graph = GraphBuilder("a RESHAPE long before its reader")
    shape = (1, 3, 5, 2)
    x = graph.input("input", shape)
    flat, y, last = graph.tensor("flat", (1, 30)), graph.tensor("fc", (1, 4)), graph.tensor("scaled", (1, 3, 5, 4))
    graph.operator("RESHAPE", [x, graph.constant("target", np.array([1, 30], np.int32))], [flat])
    side = conv(graph, "conv_2", conv(graph, "conv_1", x, shape, 4), (1, 3, 5, 4), 4)
    graph.operator("FULLY_CONNECTED", [flat, _weights(graph, "matrix", (4, 30), 9), -1], [y], _PLAIN)
    graph.operator("MUL", [side, y], [last], schema.MulOptionsT())
    graph.output(last)
    return graph


def normalizing(*, radius: int = 1, bias: float = 0.5, alpha: float = 0.3, beta: float = 0.6) -> GraphBuilder:
    """Two normalisations across channels, as in AlexNet, around a convolution that keeps negative values."""
    graph = GraphBuilder("normalisation across channels")
    shape = (1, 5, 4, 7)
    x = graph.input("input", shape)
    for number in (1, 2):
        y, options = graph.tensor(f"norm_{number}", shape), (radius, bias, alpha, beta)
        graph.operator("LOCAL_RESPONSE_NORMALIZATION", [x], [y], schema.LocalResponseNormalizationOptionsT(*options))
        x = conv(graph, f"conv_{number}", y, shape, 7, act=NONE)
    graph.output(x)
    return graph


def implicit_flatten(data: bytes) -> bytes:
    """The model without the RESHAPE before its first fully-connected layer, which then flattens its input itself."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for buffer in model.buffers:
        if not isinstance(buffer.data, np.ndarray):
            buffer.data = None
    main = model.subgraphs[0]
    (at,) = (
        at
        for at, operator in enumerate(main.operators)
        if kind_of(model.operatorCodes[operator.opcodeIndex]) == "RESHAPE"
    )
    reshape, reader = main.operators[at : at + 2]
    reader.inputs = [reshape.inputs[0], *reader.inputs[1:]]
    del main.operators[at]
    return tflite_bytes(model, {})


IDENTICAL: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        residual, inverted_residual, branches, two_in_three_out, fp16_weights, sparse_weights, quantized, wide_integers,
        branching, looping, reshaping, stateful, blockwise, flattening, flattened, flattened_early,
        normalizing,
    )
}  # fmt: skip
"""Models whose parts must say exactly what the whole says, at every pair of cuts."""


def two_halves() -> GraphBuilder:
    """`encode` on the main subgraph, `decode` on another that runs a branch; weights large enough to be streamed."""
    graph = GraphBuilder("two signatures")
    x = graph.input("x", (1, 12))
    hidden, code = graph.tensor("hidden", (1, 200)), graph.tensor("code", (1, 200))
    graph.operator("FULLY_CONNECTED", [x, _weights(graph, "w1", (200, 12), 1), -1], [hidden], _PLAIN)
    graph.operator("TANH", [hidden], [code])
    graph.output(code)
    graph.signature("encode", {"picture": x}, {"code": code})
    then = graph.begin_subgraph("then")
    _unary(graph, "TANH")
    otherwise = graph.begin_subgraph("else")
    _unary(graph, "LOGISTIC")
    decoder = graph.begin_subgraph("decoder")
    given, yes = graph.input("given", (1, 200)), graph.tensor("yes", (), "bool")
    back, branched, y = (graph.tensor(name, (1, 12)) for name in ("back", "branched", "y"))
    total = graph.tensor("total", ())
    graph.operator("FULLY_CONNECTED", [given, _weights(graph, "w2", (12, 200), 2), -1], [back], _PLAIN)
    axes = graph.constant("axes", np.array([0, 1], np.int32))
    graph.operator("SUM", [back, axes], [total], schema.ReducerOptionsT(keepDims=False))
    zero = graph.constant("zero", np.array(0.0, np.float32))
    graph.operator("GREATER", [total, zero], [yes], schema.GreaterOptionsT())
    graph.operator("IF", [yes, back], [branched], schema.IfOptionsT(then, otherwise))
    graph.operator("NEG", [branched], [y], schema.NegOptionsT())
    graph.output(y)
    graph.signature("decode", {"code": given}, {"picture": y}, subgraph=decoder)
    return graph


_PLAIN = schema.FullyConnectedOptionsT(NONE)


def open_length() -> GraphBuilder:
    """Frames of 8 samples of a sound of any length; the declared length of 1 is too short for the window."""
    graph = GraphBuilder("an input of any length")
    x = graph.input("sound", (1, 1, 1, 1), signature=(-1, -1, 1, 1))
    kernel, bias = _weights(graph, "kernel", (3, 8, 1, 1), 4), graph.constant("bias", np.zeros(3, np.float32))
    frames, loud, last = (graph.tensor(n, (1, 1, 1, 3), signature=(-1, -1, 1, 3)) for n in ("frames", "loud", "last"))
    options = schema.Conv2DOptionsT(schema.Padding.VALID, 1, 2, NONE)
    graph.operator("CONV_2D", [x, kernel, bias], [frames], options)
    graph.operator("ABS", [frames], [loud])
    graph.operator("TANH", [loud], [last])
    graph.output(last)
    graph.signature("serving_default", {"audio": x}, {"energy": last})
    return graph
