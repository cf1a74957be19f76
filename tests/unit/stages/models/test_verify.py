"""Parts say what the whole says, bit for bit; and where they do not, it is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ConfigError, ModelError
from stages.models.files.graph_builder import GraphBuilder
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions, SegmentRunner
from stages.models.slicer import slice_model
from stages.models.verify import difference, identical, named_inputs, pairs_of, random_inputs, verify
from stages.zoo.networks import LENET, build, seeded
from stages.zoo.registry import digits, load_model
from tests.unit.stages import built_models


def load(tmp_path: Path, name: str) -> Model:
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(getattr(built_models, name)().to_bytes())
    return load_model(path)


def samples(model: Model, count: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(5)
    return [random_inputs(model, rng) for _ in range(count)]


def test_every_pair_of_cuts_of_lenet_is_bit_identical(lenet: Model) -> None:
    report = verify(lenet, pairs_of(lenet, "all", 0), [[digits()[0][k][None]] for k in range(3)])
    assert report.checked == 8 * 9 / 2
    assert report.bit_identical
    assert report.worst is None
    assert report.max_abs_diff == 0


def test_a_sample_of_alexnet_s_cuts_is_bit_identical(alexnet: Model) -> None:
    pairs = [(3, 10), (1, 4), (0, 6), (8, 8), (5, 13)]
    assert verify(alexnet, pairs, samples(alexnet, 1)).bit_identical


@pytest.mark.parametrize("name", built_models.IDENTICAL)
@pytest.mark.parametrize("delegate", [True, False])
def test_models_of_every_shape_are_bit_identical_at_every_pair(name: str, delegate: bool, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    pairs = pairs_of(model, "all", 0)
    report = verify(model, pairs, samples(model, 2), InterpreterOptions(delegate=delegate))
    assert report.checked == len(pairs) > 3
    assert report.bit_identical, (report.differing, report.max_abs_diff)


@pytest.mark.parametrize("kind", built_models.EMPTY_TYPES)
@pytest.mark.parametrize("spelling", ["empty vector", "buffer without data", "buffer 0"])
def test_constants_without_elements_are_constants(kind: str, spelling: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.tflite"
    path.write_bytes(built_models.without_elements(kind, spelling))
    model = load_model(path)
    assert model.graph.blocked == {}
    assert [spec.name for spec in model.manifest.cuts[1].tensors] == ["tanh"]
    assert model.manifest.cuts[2].tensors[0].shape == (() if kind == "RESHAPE" else (2, 3))
    report = verify(model, pairs_of(model, "all", 0), samples(model, 2))
    assert report.checked == 10
    assert report.bit_identical


def test_a_fully_connected_layer_flattens_a_convolution_by_itself(tmp_path: Path) -> None:
    """Its slice alone, given the four dimensions that cross the cut, computes the matrix product row by row."""
    model = load(tmp_path, "flattening")
    assert model.manifest.cuts[1].tensors[0].shape == (1, 3, 5, 4)
    part = slice_model(model, 2, 2)
    value = np.random.default_rng(2).standard_normal((1, 3, 5, 4)).astype(np.float32)
    (found,) = SegmentRunner(part.to_bytes()).run([value])
    (matrix,) = (at for at, tensor in enumerate(model.graph.tensors) if tensor.name == b"matrix")
    data = model.graph.buffer(model.graph.tensors[matrix].buffer)
    assert data is not None
    weights = np.frombuffer(data, np.float32).reshape(6, 60)
    np.testing.assert_allclose(found, value.reshape(1, 60) @ weights.T, rtol=1e-5)


def test_a_tensor_without_elements_is_still_made_before_it_is_read(tmp_path: Path) -> None:
    """The order of operators stands, also where what passes between them is nothing."""
    graph = GraphBuilder("an empty activation")
    x, empty = graph.input("input", (1, 0)), graph.tensor("empty", (1, 0))
    last = graph.tensor("last", (1, 0))
    graph.operator("NEG", [empty], [last], schema.NegOptionsT())
    graph.operator("TANH", [x], [empty])
    graph.output(last)
    path = tmp_path / "early.tflite"
    path.write_bytes(graph.to_bytes())
    with pytest.raises(ModelError, match="read empty before anything makes it"):
        load_model(path)


def test_random_numbers_are_named_as_the_cause(tmp_path: Path) -> None:
    report = verify(load(tmp_path, "random_numbers"), [(1, 2)], samples(load(tmp_path, "random_numbers"), 1))
    assert not report.bit_identical
    assert report.explained
    assert "RANDOM_UNIFORM" in str(report.explanation)


def test_a_model_is_verified_up_to_an_operator_without_kernel(tmp_path: Path) -> None:
    model = load(tmp_path, "custom")
    report = verify(model, pairs_of(model, "all", 0), samples(model, 1))
    assert report.checked == 6
    assert report.bit_identical
    assert "layers behind 2 were not run" in str(report.explanation)
    assert report.uncuttable == ((3, "layer 3 is the operator Strange, for which there is no kernel"),)


class WrongWhole(Model):
    """LeNet whose whole runs with other weights than its parts."""

    @property
    def source(self) -> bytes:
        return build(LENET, seeded(3)).to_bytes()


def test_parts_that_differ_from_the_whole_are_caught(lenet: Model) -> None:
    wrong = WrongWhole(lenet.name, lenet.path, lenet.sha256, lenet.data, facts=lenet.facts, trusted=True)
    report = verify(wrong, [(2, 4)], samples(lenet, 1))
    assert not report.bit_identical
    assert not report.explained
    assert report.differing == ((2, 4),)
    assert report.worst == (2, 4)
    assert report.max_abs_diff > 0


def test_identical_means_the_same_bits() -> None:
    zero, minus = np.zeros(1, np.float32), np.full(1, -0.0, np.float32)
    nan = np.full(1, np.nan, np.float32)
    assert identical(nan, nan)
    assert not identical(zero, minus)
    assert difference(zero, minus) == 0
    assert difference(zero, nan) == float("inf")
    assert difference(nan, nan) == 0
    assert difference(np.zeros(2), np.zeros(3)) == float("inf")
    assert difference(np.array([1, 250], np.uint8), np.array([1, 3], np.uint8)) == 247


def test_pairs_are_asked_for_in_words_and_numbers(lenet: Model, tmp_path: Path) -> None:
    assert pairs_of(lenet, "single", 0) == [(p, p) for p in range(8)]
    some = pairs_of(lenet, "5", 1)
    assert len(some) == 8 + 5
    assert some == pairs_of(lenet, "5", 1)
    assert len(pairs_of(lenet, "1000", 1)) == 36
    assert all(3 not in pair for pair in pairs_of(load(tmp_path, "stateful"), "all", 0))
    with pytest.raises(ConfigError, match=r"--cuts .* is invalid: give all, single"):
        pairs_of(lenet, "some", 1)


def test_inputs_of_a_file_are_matched_by_name_and_shape(lenet: Model, tmp_path: Path) -> None:
    images = digits()[0]
    assert len(named_inputs(lenet, {"anything": images[:4]})) == 4
    assert len(named_inputs(lenet, {"input": images[:1]})) == 1
    with pytest.raises(ConfigError, match=r"is float64\[1, 28, 28, 1\], the model takes float32"):
        named_inputs(lenet, {"input": images[:1].astype(np.float64)})
    two = load(tmp_path, "two_in_three_out")
    both = {"a": np.ones((3, 16), np.float32), "b": np.zeros((3, 16), np.float32)}
    assert [[float(v[0, 0]) for v in sample] for sample in named_inputs(two, both)] == [[1.0, 0.0]] * 3
    # the model's signature calls them left and right
    assert len(named_inputs(two, {"left": both["a"], "right": both["b"]})) == 3
    with pytest.raises(ConfigError, match="lacks the array right; it contains a"):
        named_inputs(two, {"a": both["a"]})
