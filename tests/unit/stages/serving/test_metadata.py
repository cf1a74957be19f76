"""What the endpoint says of its models."""

from __future__ import annotations

from stages.serving.metadata import model_config, model_metadata, repository_index, server_metadata
from tests.unit.stages.serving.fake_inference import FakeInference, tensor


def test_the_metadata_have_the_number_of_samples_as_an_open_dimension() -> None:
    info = FakeInference().model("double")
    assert model_metadata(info) == {
        "name": "double",
        "versions": ["1"],
        "platform": "tflite",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }


def test_the_config_states_the_largest_batch_and_the_shape_of_a_sample() -> None:
    config = model_config(FakeInference().model("double"), max_samples=64)
    assert config["max_batch_size"] == 64
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]


def test_a_model_without_a_batch_dimension_has_fixed_shapes() -> None:
    info = FakeInference(inputs=(tensor("x", (3, 4)),)).model("double")
    assert model_metadata(info)["inputs"][0]["shape"] == [3, 4]
    config = model_config(info, max_samples=64)
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [3, 4]


def test_the_index_tells_readiness() -> None:
    inference = FakeInference()
    ready = {"name": "double", "version": "1", "state": "READY", "reason": ""}
    assert repository_index(inference) == repository_index(inference, only_ready=True) == [ready]
    inference.is_ready = False
    (entry,) = repository_index(inference)
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "the device is not ready")
    assert repository_index(inference, only_ready=True) == []


def test_the_server_names_itself() -> None:
    assert server_metadata("0.9")["version"] == "0.9"
