"""What a file leaves open: which signature is meant, and how large its inputs are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from bus.errors import ConfigError, ModelError, UnknownNameError
from stages.models.files.choice import ModelChoice, parse_shapes
from stages.models.files.graph_builder import GraphBuilder
from stages.models.files.validation import validated
from stages.models.profiler import TimedRuns, measure
from stages.models.runtime.litert import SegmentRunner
from stages.models.segments.store import SegmentStore
from stages.models.slicer import slice_model
from stages.models.verify import pairs_of, random_inputs, verify
from stages.zoo.registry import load_model
from tests.unit.stages import built_models

DECODE = ModelChoice("decode")


def written(tmp_path: Path, graph: GraphBuilder, name: str = "model") -> Path:
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(graph.to_bytes())
    return path


def test_the_main_subgraph_is_meant_unless_a_signature_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, built_models.two_halves())
    model = load_model(path)
    assert (model.name, model.contents.meant) == ("model", "encode")
    assert model.contents.unseen == ("signature decode",)
    assert [(one.name, one.inputs, one.outputs, one.meant) for one in model.contents.signatures] == [
        ("encode", ("picture",), ("code",), True),
        ("decode", ("code",), ("picture",), False),
    ]
    same = load_model(path, choice=ModelChoice("encode"))
    assert (same.sha256, same.data, same.name) == (model.sha256, model.data, "model")


def test_a_signature_s_subgraph_is_what_is_cut_and_run(tmp_path: Path) -> None:
    path = written(tmp_path, built_models.two_halves())
    model = load_model(path, choice=DECODE)
    assert model.name == "model.decode"
    assert [layer.kind for layer in model.graph.layers] == ["FULLY_CONNECTED", "SUM", "GREATER", "IF", "NEG"]
    assert model.file_sha256 == load_model(path).sha256 != model.sha256
    runner = Interpreter(model_path=str(path)).get_signature_runner("decode")
    for sign in (-1.0, 1.0):  # each side of the branch
        code = (sign * np.random.default_rng(3).random((1, 200))).astype(np.float32)
        wanted = runner(code=code)["picture"]
        for values in (
            SegmentRunner(model.source).run([code]),
            SegmentStore(model, tmp_path / "pieces").prepare(0, 5).run([code]),
        ):
            np.testing.assert_array_equal(values[0], wanted)
    report = verify(model, pairs_of(model, "all", 0), [random_inputs(model, np.random.default_rng(1))])
    assert report.bit_identical
    assert report.signature == "decode"
    part = schema.ModelT.InitFromPackedBuf(slice_model(model, 4, 5).to_bytes(), 0)
    assert [entry.signatureKey for entry in part.signatureDefs] == [b"decode"]
    assert len(part.subgraphs) == 3


def test_no_verdict_hides_what_was_not_looked_at(tmp_path: Path) -> None:
    graph = built_models.two_halves()
    graph.begin_subgraph("forgotten")
    graph.output(graph.input("x", (1,)))
    for choice, meant, other in ((ModelChoice(), "encode", "decode"), (DECODE, "decode", "encode")):
        model = load_model(written(tmp_path, graph), choice=choice)
        report = verify(model, [(1, 1)], [random_inputs(model, np.random.default_rng(1))])
        assert report.bit_identical
        assert report.unseen == (f"signature {other}", "subgraph 4, which nothing runs")
        assert f"this is about signature {meant} alone; not looked at: signature {other}" in str(report.explanation)
    whole = load_model(written(tmp_path, built_models.two_in_three_out(), "whole"))
    assert verify(whole, [(1, 1)], [random_inputs(whole, np.random.default_rng(1))]).explanation is None


def test_a_signature_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="has no signature train") as caught:
        load_model(written(tmp_path, built_models.two_halves()), choice=ModelChoice("train"))
    assert caught.value.remedy == "it has encode, decode"


def test_open_inputs_are_named_with_the_way_to_give_them(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sound is open, \?x\?x1x1, and was run at 1x1x1x1") as caught:
        load_model(written(tmp_path, built_models.open_length()))
    assert caught.value.remedy == "give a number for every question mark: --input-shape sound=?x?x1x1"


@pytest.mark.parametrize("name", ["sound", "audio"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 60, 1, 1)])
def test_a_given_shape_holds_for_everything(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = written(tmp_path, built_models.open_length())
    model = load_model(path, choice=ModelChoice(None, {name: shape}))
    assert model.manifest.cuts[0].tensors[0].shape == shape
    frames = (shape[0], (shape[1] - 8) // 2 + 1, 1, 3)
    assert [cut.tensors[0].shape for cut in model.manifest.cuts[1:]] == [frames] * 3
    whole = Interpreter(model_path=str(path))
    whole.resize_tensor_input(whole.get_input_details()[0]["index"], shape, strict=True)
    whole.allocate_tensors()
    sound = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    whole.set_tensor(whole.get_input_details()[0]["index"], sound)
    whole.invoke()
    wanted = whole.get_tensor(whole.get_output_details()[0]["index"])
    np.testing.assert_array_equal(SegmentStore(model, tmp_path / "pieces").prepare(0, 3).run([sound])[0], wanted)
    assert verify(model, pairs_of(model, "all", 0), [[sound]]).bit_identical
    assert measure(model, TimedRuns(num_runs=1)).profile("here").sha256 == model.sha256
    part = schema.ModelT.InitFromPackedBuf(slice_model(model, 2, 3).to_bytes(), 0)
    assert list(part.subgraphs[0].tensors[part.subgraphs[0].inputs[0]].shape) == list(frames)
    assert model.contents.open_inputs == ()


def test_models_that_were_chosen_differently_have_hashes_of_their_own(tmp_path: Path) -> None:
    path = written(tmp_path, built_models.open_length())
    hashes = [
        load_model(path, choice=ModelChoice(None, {name: shape})).sha256
        for name, shape in (("sound", (1, 8, 1, 1)), ("audio", (1, 8, 1, 1)), ("sound", (1, 9, 1, 1)))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("shapes", "error", "words"),
    [
        ({"noise": (1, 8, 1, 1)}, UnknownNameError, "has no input noise"),
        ({"sound": (1, 8)}, ConfigError, r"--input-shape sound=1x8: the input of .* is \?x\?x1x1"),
        ({"sound": (1, 8, 2, 1)}, ConfigError, r"sound=1x8x2x1: the input of .* is \?x\?x1x1"),
        ({"sound": (1, 3, 1, 1)}, ModelError, "its input sound was given as 1x3x1x1"),
        ({"sound": (1, 1 << 30, 1, 1)}, ModelError, "declares sound of the shape"),
        ({"sound": (1, 1 << 31, 1, 1)}, ConfigError, "a dimension is at most 2,147,483,647"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, ...]], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load_model(written(tmp_path, built_models.open_length()), choice=ModelChoice(None, shapes))


def test_a_shape_that_is_not_open_is_refused(lenet: object) -> None:
    with pytest.raises(ConfigError, match=r"the input of .* is 1x28x28x1"):
        load_model("lenet", choice=ModelChoice(None, {"input": (2, 28, 28, 1)}))


def test_shapes_are_written_as_names_and_sizes() -> None:
    assert parse_shapes(["x=1x1280", "a=b:0=5"]) == {"x": (1, 1280), "a=b:0": (5,)}
    for wrong in ("x", "=1x2", "x=", "x=1x", "x=0x2", "x=-1x2", "x=1,2", "x=1x99999999999"):
        with pytest.raises(ConfigError, match="write NAME=1x1280"):
            parse_shapes([wrong])
    with pytest.raises(ConfigError, match="has a shape already"):
        parse_shapes(["x=1", "x=2"])


def test_the_copy_that_a_choice_makes_is_sound(tmp_path: Path) -> None:
    model = load_model(written(tmp_path, built_models.two_halves()), choice=DECODE)
    assert isinstance(model.data, bytes)
    validated(model.data, "copy")
    assert b"code" in model.data
