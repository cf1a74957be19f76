"""Checks of a request against the model that it names."""

from __future__ import annotations

from collections.abc import Sequence

from bus.tensors import Array
from stages.serving.metadata import takes_batches
from stages.serving.values import Fault, InferRequest, ModelInfo, ServingError, TensorInfo

MAX_SAMPLES = 1_024
"""Largest number of samples in one request."""


def samples_of(request: InferRequest, model: ModelInfo) -> int:
    """The number of samples of a request that fits the model. Raises `ServingError` with the tensor that does not."""
    for name in request.inputs:
        if all(name != info.name for info in model.inputs):
            raise _wrong(f"model {model.name} has no input {name!r:.100}; {_known(model.inputs)}")
    batched = takes_batches(model)
    for info in model.inputs:
        if (array := request.inputs.get(info.name)) is None:
            raise _wrong(f"input {info.name!r} is missing; {_known(model.inputs)}")
        _check_tensor(info, array, batched)
    _check_outputs(request.outputs, model)
    if not batched:
        return 1
    counts = {name: len(array) for name, array in request.inputs.items()}
    samples = next(iter(counts.values()), 1)
    if any(count != samples for count in counts.values()):
        words = ", ".join(f"{name!r}: {count}" for name, count in counts.items())
        raise _wrong(f"the inputs differ in their number of samples, the first dimension: {words}")
    if samples > MAX_SAMPLES:
        raise ServingError(Fault.TOO_LARGE, f"{samples:,} samples in one request; at most {MAX_SAMPLES:,} are accepted")
    return samples


def _check_tensor(info: TensorInfo, array: Array, batched: bool) -> None:
    expected = [-1, *info.shape[1:]] if batched else list(info.shape)
    fits = array.shape[1:] == info.shape[1:] and array.ndim > 0 if batched else array.shape == info.shape
    if array.dtype.name != info.dtype or not fits:
        words = f"{info.datatype} of shape {expected}"
        raise _wrong(f"input {info.name!r}: {words} expected, got {array.dtype.name} of shape {list(array.shape)}")


def _check_outputs(wanted: Sequence[str], model: ModelInfo) -> None:
    for at, name in enumerate(wanted):
        if all(name != info.name for info in model.outputs):
            raise _wrong(f"model {model.name} has no output {name!r:.100}; {_known(model.outputs)}")
        if name in wanted[:at]:
            raise _wrong(f"output {name!r} is requested twice")


def _wrong(message: str) -> ServingError:
    return ServingError(Fault.INVALID, message)


def _known(tensors: Sequence[TensorInfo]) -> str:
    return "it has " + ", ".join(f"{one.name!r} ({one.datatype}, {list(one.shape)})" for one in tensors)
