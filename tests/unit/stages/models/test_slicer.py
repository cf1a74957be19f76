"""Cutting: what crosses, what goes along, what cannot be cut."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from bus.errors import CutError, UnknownNameError
from stages.models.cuts import even_cuts, useful_positions, work_shares
from stages.models.files.graph_builder import GraphBuilder
from stages.models.files.operators import CONTROL_FLOW, kind_of, text
from stages.models.files.validation import validated
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import manifest, position_of, slice_model, write_parts
from stages.models.verify import run_part
from stages.zoo.registry import load_model
from tests.unit.stages import built_models


def load(tmp_path: Path, graph: GraphBuilder) -> Model:
    path = tmp_path / "model.tflite"
    path.write_bytes(graph.to_bytes())
    return load_model(path)


def kinds(data: bytes) -> list[str]:
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    return [kind_of(model.operatorCodes[operator.opcodeIndex]) for operator in model.subgraphs[0].operators]


def test_what_crosses_a_skip_is_every_live_tensor(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.residual())
    crossing = [[spec.name for spec in cut.tensors] for cut in manifest(model).cuts]
    assert crossing == [["input"], ["conv_1"], ["conv_1", "conv_2"], ["conv_1", "conv_3"], ["add"], ["conv_4"]]
    assert manifest(model).cuts[2].cut_bytes == 2 * 8 * 8 * 4 * 4


def test_a_tensor_that_passes_over_a_part_is_forwarded_and_not_in_its_file(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.residual())
    part = slice_model(model, 2, 3)
    assert part.reads == ("conv_1",)
    assert part.makes == ("conv_3",)
    assert part.forwarded == ("conv_1",)
    assert [spec.name for spec in part.outputs] == ["conv_1", "conv_3"]
    values = [np.ones((1, 8, 8, 4), np.float32)]
    outputs = run_part(part, SegmentRunner(part.to_bytes()), values)
    assert outputs[0] is values[0]


def test_early_outputs_cross_every_later_cut(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.two_in_three_out())
    cuts = manifest(model).cuts
    assert [spec.name for spec in cuts[0].tensors] == ["a", "b"]
    assert [spec.name for spec in cuts[-1].tensors] == ["product", "early", "same#4"]
    # `a` is multiplied at the end; repeated names are distinguished by their number
    assert [spec.name for spec in cuts[3].tensors] == ["a", "early", "same#4"]


def test_weights_computed_from_constants_travel_with_the_part(tmp_path: Path) -> None:
    for make, carried in ((built_models.fp16_weights, "DEQUANTIZE"), (built_models.sparse_weights, "DENSIFY")):
        model = load(tmp_path, make())
        assert [layer.kind for layer in model.graph.layers] == ["FULLY_CONNECTED"] * 2
        assert [len(cut.tensors) for cut in manifest(model).cuts] == [1, 1, 1]
        assert kinds(slice_model(model, 2, 2).to_bytes()) == [carried, "FULLY_CONNECTED"]


def test_a_part_holds_only_the_weights_it_needs(alexnet: Model) -> None:
    assert slice_model(alexnet, 1, 3).size_bytes < 200_000
    assert slice_model(alexnet, 11, 11).size_bytes == 4 * (9216 * 4096 + 4096)


def test_control_flow_stays_whole_with_its_subgraphs(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.branching())
    position = next(layer.position for layer in model.graph.layers if layer.kind == "IF")
    part = schema.ModelT.InitFromPackedBuf(slice_model(model, position, position).to_bytes(), 0)
    assert [graph.name for graph in part.subgraphs] == [b"main", b"then", b"else"]
    before = schema.ModelT.InitFromPackedBuf(slice_model(model, 1, position - 1).to_bytes(), 0)
    assert len(before.subgraphs) == 1


def test_quantisation_crosses_the_cut(tmp_path: Path) -> None:
    spec = manifest(load(tmp_path, built_models.quantized())).cuts[1].tensors[-1]
    assert (spec.dtype, spec.zero_points) == ("int8", (-3,))
    assert spec.scales[0] == pytest.approx(0.05)


def test_a_shape_computed_from_a_fixed_shape_is_a_constant(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.reshaping())
    assert [layer.kind for layer in model.graph.layers] == ["RELU", "RESHAPE", "TANH"]
    assert manifest(model).cuts[2].tensors[0].shape == (1, 32)
    # SHAPE itself is replaced by its value, which the operators behind it go on from
    assert kinds(slice_model(model, 2, 2).to_bytes()) == ["STRIDED_SLICE", "PACK", "RESHAPE"]


def test_a_reshape_that_only_flattens_belongs_to_the_layer_that_reads_it(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.reshaped())
    assert [(layer.name, layer.kind) for layer in model.graph.layers] == [
        ("conv", "CONV_2D"),
        ("fc", "FULLY_CONNECTED"),
    ]
    assert [[spec.shape for spec in cut.tensors] for cut in manifest(model).cuts] == [
        [(1, 3, 5, 2)],
        [(1, 3, 5, 4)],
        [(1, 6)],
    ]
    assert kinds(slice_model(model, 1, 1).to_bytes()) == ["CONV_2D"]
    assert kinds(slice_model(model, 2, 2).to_bytes()) == ["RESHAPE", "FULLY_CONNECTED"]


def test_a_flatten_far_from_its_reader_moves_to_it(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.flattened_early())
    crossing = [{spec.name for spec in cut.tensors} for cut in manifest(model).cuts]
    assert crossing == [{"input"}, {"input", "conv_1"}, {"input", "conv_2"}, {"conv_2", "fc"}, {"scaled"}]
    assert kinds(slice_model(model, 1, 1).to_bytes()) == ["CONV_2D"]
    assert kinds(slice_model(model, 3, 3).to_bytes()) == ["RESHAPE", "FULLY_CONNECTED"]


def test_a_flatten_to_a_shape_computed_from_a_fixed_shape_belongs_to_its_reader(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.reshaping(dense=True))
    assert [layer.kind for layer in model.graph.layers] == ["RELU", "FULLY_CONNECTED"]
    assert kinds(slice_model(model, 2, 2).to_bytes()) == ["STRIDED_SLICE", "PACK", "RESHAPE", "FULLY_CONNECTED"]


@pytest.mark.parametrize(
    ("graph", "layers"),
    [
        (built_models.reshaped(branch=True), ["CONV_2D", "RESHAPE", "FULLY_CONNECTED", "TANH"]),
        (built_models.reshaped(shown=True), ["CONV_2D", "RESHAPE", "FULLY_CONNECTED"]),
        (built_models.reshaped(wanted=(15, -1)), ["CONV_2D", "RESHAPE", "FULLY_CONNECTED"]),
        (built_models.reshaped(wanted=(1, 1, -1)), ["CONV_2D", "RESHAPE", "FULLY_CONNECTED"]),
        (built_models.reshaping(), ["RELU", "RESHAPE", "TANH"]),
    ],
    ids=["another reader", "an output", "another first dimension", "three dimensions", "another operator reads it"],
)
def test_any_other_reshape_is_a_layer(tmp_path: Path, graph: GraphBuilder, layers: list[str]) -> None:
    assert [layer.kind for layer in load(tmp_path, graph).graph.layers] == layers


def test_state_is_not_cut_in_two_and_the_rest_can_be(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.stateful())
    assert sorted(model.graph.blocked) == [2, 3, 4]
    assert model.graph.blocked[3] == "layers 2 to 5 share the state counter"
    with pytest.raises(CutError, match="cannot be cut at 3: layers 2 to 5 share the state counter"):
        slice_model(model, 1, 3)
    assert "CALL_ONCE" in kinds(slice_model(model, 2, 5).to_bytes())
    assert "CALL_ONCE" not in kinds(slice_model(model, 6, 6).to_bytes())


def test_a_shape_that_depends_on_the_input_is_not_cut(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.finding())
    assert model.graph.blocked == {
        3: "places has a shape that is known only at run time",
        4: "rows has a shape that is known only at run time",
    }
    assert [cut.position for cut in manifest(model).cuts if not cut.cuttable] == [3, 4]


def test_an_operator_without_a_kernel_is_named_and_the_rest_can_be_cut(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.custom())
    assert model.facts.missing_kernels == {"Strange"}
    assert list(model.graph.blocked) == [3]
    assert "Strange" in model.graph.blocked[3]
    data = slice_model(model, 3, 4).to_bytes()
    operator = schema.ModelT.InitFromPackedBuf(data, 0).subgraphs[0].operators[0]
    assert bytes(operator.customOptions) == b"\x01\x02"


@pytest.mark.parametrize("name", built_models.IDENTICAL)
def test_every_part_is_a_sound_file_that_keeps_names(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, built_models.IDENTICAL[name]())
    names = {bytes(tensor.name) for tensor in model.graph.tensors}
    for first in range(1, model.graph.depth + 1):
        if {first - 1, first} & set(model.graph.blocked):
            continue
        data = slice_model(model, first, first).to_bytes()
        validated(data, "part")
        assert {bytes(t.name) for t in schema.ModelT.InitFromPackedBuf(data, 0).subgraphs[0].tensors} <= names


def details_by_name(data: bytes) -> dict[str, str]:
    """Tensor -> the tensor that its details name as scales."""
    tensors = schema.ModelT.InitFromPackedBuf(data, 0).subgraphs[0].tensors
    return {
        text(tensor.name): text(tensors[details.scales].name)
        for tensor in tensors
        if (details := tensor.quantization and tensor.quantization.details) is not None
    }


def test_tensors_that_quantisation_details_name_go_along_under_their_new_numbers(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.blockwise())
    assert details_by_name(slice_model(model, 2, 2).to_bytes()) == {"weights_1": "scales_1"}
    assert details_by_name(slice_model(model, 3, 4).to_bytes()) == {"weights_2": "scales_2"}
    assert details_by_name(slice_model(model, 3, 3).to_bytes()) == {}
    both = {"weights_1": "scales_1", "weights_2": "scales_2"}
    assert details_by_name(slice_model(model, 1, 4).to_bytes()) == both
    part = schema.ModelT.InitFromPackedBuf(slice_model(model, 4, 4).to_bytes(), 0).subgraphs[0]
    scales = next(tensor for tensor in part.tensors if tensor.name == b"scales_2")
    whole = next(tensor for tensor in model.graph.tensors if tensor.name == b"scales_2")
    assert list(scales.shape) == list(whole.shape)
    assert len(part.tensors) == 4  # what goes in, weights, scales, what comes out


def test_tensors_named_by_tensors_that_are_named_go_along_too(tmp_path: Path) -> None:
    """Scales may be quantised themselves; and the field for zero points is 0, not -1, where it is not set."""
    graph = built_models.blockwise()
    deeper = graph.constant("deeper", np.ones((24,), np.float16))
    source = graph.record(1).quantization
    graph.record(1).quantization.details.zeroPoints = 0  # tensor 0 is the model's input
    scales = graph.record(source.details.scales)
    scales.quantization = schema.QuantizationParametersT(
        detailsType=schema.QuantizationDetails.BlockwiseQuantization,
        details=schema.BlockwiseQuantizationT(scales=deeper, zeroPoints=-1, blockSize=8),
    )
    data = slice_model(load(tmp_path, graph), 2, 2).to_bytes()
    assert details_by_name(data) == {"weights_1": "scales_1", "scales_1": "deeper"}
    tensors = schema.ModelT.InitFromPackedBuf(data, 0).subgraphs[0].tensors
    assert [t.quantization.details.zeroPoints for t in tensors if t.name == b"weights_1"] == [-1]


NAMING = re.compile(r"(?i)subgraph|tensor|buffer|^scales$|^zeroPoints$|Index$|^inputs$|^outputs$|intermediates")
RENUMBERED_OR_REFUSED = {
    "BlockwiseQuantizationT": {"scales", "zeroPoints"},
    "MultiAxisQuantizationT": {"scales", "zeroPoints"},
    "MetadataT": {"buffer"},
    "ModelT": {"subgraphs", "buffers", "metadataBuffer", "externalBufferGroups", "externalBuffers"},
    "OperatorT": {"opcodeIndex", "inputs", "outputs", "intermediates", "debugMetadataIndex"},
    "SignatureDefT": {"subgraphIndex", "inputs", "outputs"},
    "SubGraphT": {"tensors", "inputs", "outputs", "debugMetadataIndex"},
    "TensorMapT": {"tensorIndex"},
    "TensorT": {"buffer", "externalBuffer"},
}
NAMES_NOTHING = {
    "OperatorT": {"mutatingVariableInputs"},
    "TensorT": {"variantTensors"},
    "UnidirectionalSequenceLSTMOptionsT": {"diagonalRecurrentTensors"},
}
"""Flags, and types of what a variant tensor may hold."""


def test_every_field_of_the_schema_that_names_a_tensor_a_buffer_or_a_subgraph_is_known() -> None:
    """A schema that names things in more places must be looked at before it is used: a part must not keep old numbers."""
    options = {field for fields in CONTROL_FLOW.values() for field in fields} | {"branchSubgraphIndices"}
    found, in_options = {}, set()
    for name, record in inspect.getmembers(schema, inspect.isclass):
        if not name.endswith("T") or not hasattr(record, "InitFromPackedBuf"):
            continue
        fields = {field for field in vars(record()) if NAMING.search(field)} - NAMES_NOTHING.get(name, set())
        if name.endswith("OptionsT"):
            in_options |= fields
        elif fields:
            found[name] = fields
    assert in_options == options
    assert found == RENUMBERED_OR_REFUSED


def test_signatures_keep_the_callers_names_at_the_model_s_ends(tmp_path: Path) -> None:
    model = load(tmp_path, built_models.two_in_three_out())
    signature = schema.ModelT.InitFromPackedBuf(slice_model(model, 1, 2).to_bytes(), 0).signatureDefs[0]
    assert signature.signatureKey == b"serving_default"
    assert [entry.name for entry in signature.inputs] == [b"left", b"right"]
    assert [entry.name for entry in signature.outputs] == [b"t", b"same#3"]


def test_metadata_go_along_unless_they_speak_of_the_whole(tmp_path: Path) -> None:
    graph = built_models.residual()
    graph.metadata("min_runtime_version", b"2.3.0")
    graph.metadata("TFLITE_METADATA", b"about the whole model's inputs")
    graph.metadata("OfflineMemoryAllocation", b"about the whole model's tensors, by their numbers")
    model = load(tmp_path, graph)
    part = schema.ModelT.InitFromPackedBuf(slice_model(model, 2, 3).to_bytes(), 0)
    assert [entry.name for entry in part.metadata] == [b"min_runtime_version"]
    assert bytes(part.buffers[part.metadata[0].buffer].data) == b"2.3.0"


def test_parts_are_even_where_nobody_names_cuts(alexnet: Model, tmp_path: Path) -> None:
    cuts = even_cuts(alexnet.manifest)
    shares = [work_shares(alexnet.manifest)[cut] for cut in cuts]
    for share, wanted in zip(shares, (1 / 3, 2 / 3), strict=True):
        others = [abs(other - wanted) for other in work_shares(alexnet.manifest)[1:-1]]
        assert abs(share - wanted) == pytest.approx(min(others))
    assert cuts[0] < cuts[1]
    stateful = load(tmp_path, built_models.stateful())
    assert not {*even_cuts(stateful.manifest)} & stateful.graph.blocked.keys()
    single = GraphBuilder("one layer")
    x, y = single.input("x", (1, 4)), single.tensor("y", (1, 4))
    single.operator("TANH", [x], [y])
    single.output(y)
    assert even_cuts(load(tmp_path, single).manifest) == (0, 0)


def test_cuts_are_named_by_layer_or_position(lenet: Model) -> None:
    assert position_of(lenet, "maxpool_1") == position_of(lenet, 2) == position_of(lenet, "2") == 2
    assert position_of(lenet, "input") == 0
    with pytest.raises(UnknownNameError, match="no layer of lenet called 'pool_9'; did you mean maxpool_"):
        position_of(lenet, "pool_9")
    with pytest.raises(CutError, match="positions 0 to 7, not 8"):
        position_of(lenet, "8")


@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 2), (1, 8)])
def test_layers_that_are_not_there_cannot_be_cut_out(lenet: Model, first: int, last: int) -> None:
    with pytest.raises(CutError, match="has layers 1 to 7"):
        slice_model(lenet, first, last)


def test_useful_cuts_are_those_no_earlier_one_undercuts(alexnet: Model) -> None:
    names = [alexnet.manifest.cuts[position].name for position in useful_positions(alexnet.manifest)]
    assert names == ["input", "maxpool_1", "maxpool_2", "maxpool_3", "fc_1", "fc_3"]


def test_work_is_counted_in_multiply_accumulates(alexnet: Model) -> None:
    conv = alexnet.manifest.cuts[1]
    assert conv.work == 55 * 55 * 96 * 11 * 11 * 3
    shares = work_shares(alexnet.manifest)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)


def test_the_manifest_describes_files_that_are_there(lenet: Model, tmp_path: Path) -> None:
    path, parts = write_parts(lenet, [2, 4], tmp_path / "out")
    document = json.loads(path.read_text())
    assert document["sha256"] == lenet.sha256
    assert [cut["name"] for cut in document["cuts"]] == ["maxpool_1", "maxpool_2"]
    roles = [(part["role"], part["first"], part["last"]) for part in parts]
    assert roles == [("device", 1, 2), ("edge", 3, 4), ("cloud", 5, 7)]
    for part in document["parts"]:
        data = (path.parent / part["file"]).read_bytes()
        assert len(data) == part["size_bytes"]
        assert hashlib.sha256(data).hexdigest() == part["sha256"]
    assert document["parts"][1]["inputs"] == document["parts"][0]["outputs"]


def test_a_part_without_layers_has_no_file(lenet: Model, tmp_path: Path) -> None:
    _, parts = write_parts(lenet, [0, 3], tmp_path)
    assert [part["role"] for part in parts] == ["edge", "cloud"]
