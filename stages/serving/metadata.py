"""What the endpoint says of itself and its models, in the JSON form of the protocol; gRPC has messages of the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.serving.values import Inference, ModelInfo, TensorInfo

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "sequence", "statistics")
PLATFORM = "tflite"


def server_metadata(version: str) -> dict[str, Any]:
    """The answer to `/v2`; `version` is that of DeePar."""
    return {"name": "deepar", "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(model: ModelInfo) -> dict[str, Any]:
    """Names, datatypes and shapes; -1 is the number of samples.

    `parameters` tell what the model file says of its classes and images; gRPC's message has no field for them.
    """
    batched = takes_batches(model)
    described: dict[str, Any] = {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor(info, batched) for info in model.inputs],
        "outputs": [_tensor(info, batched) for info in model.outputs],
    }
    if model.metadata is not None:
        found = {name: list(getattr(model.metadata, name)) for name in ("labels", "mean", "std")}
        described["parameters"] = {name: values for name, values in found.items() if values}
    return described


def model_config(model: ModelInfo, max_samples: int) -> dict[str, Any]:
    """The model as Triton configures it; `max_samples` is the largest batch of a request."""
    batched = takes_batches(model)

    def tensors(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name,
                "data_type": f"TYPE_{info.datatype}",
                "dims": list(info.shape[1:] if batched else info.shape),
            }
            for info in infos
        ]

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "deepar",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_samples if batched else 0,
        "input": tensors(model.inputs),
        "output": tensors(model.outputs),
    }


def repository_index(inference: Inference, *, only_ready: bool = False) -> list[dict[str, Any]]:
    """The served models and whether they are ready."""
    ready = inference.ready()
    if only_ready and not ready:
        return []
    state = {"state": "READY", "reason": ""} if ready else {"state": "UNAVAILABLE", "reason": "the device is not ready"}
    return [{"name": model.name, "version": model.version, **state} for model in inference.models()]


def takes_batches(model: ModelInfo) -> bool:
    """Whether the first dimension of every tensor is the batch: requests may then have many samples."""
    return all(info.shape[:1] == (1,) for info in (*model.inputs, *model.outputs))


def _tensor(info: TensorInfo, batched: bool) -> dict[str, Any]:
    shape = [-1, *info.shape[1:]] if batched else list(info.shape)
    return {"name": info.name, "datatype": info.datatype, "shape": shape}
