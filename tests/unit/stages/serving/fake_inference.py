"""An `Inference` for the tests of transports: its model `double` doubles its inputs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bus.tensors import Array
from stages.devices.session import Keep
from stages.serving.tensors import DATATYPE_OF
from stages.serving.values import (
    Fault,
    InferenceStream,
    InferRequest,
    InferResponse,
    ModelInfo,
    RequestTerms,
    ServingError,
    TensorInfo,
)


def tensor(name: str, shape: tuple[int, ...] = (1, 4), dtype: str = "float32") -> TensorInfo:
    """The description of one tensor."""
    return TensorInfo(name=name, datatype=DATATYPE_OF[dtype], dtype=dtype, shape=shape)


def doubled(request: InferRequest) -> list[Array]:
    """The outputs of `double`: its inputs times two; of true and false: the opposite."""
    return [~array if array.dtype == np.bool_ else array + array for array in request.inputs.values()]


class FakeInference:
    """Answers with `compute`, after `gate` where one is set; records every request and cancellation."""

    def __init__(
        self,
        inputs: Sequence[TensorInfo] = (tensor("x"),),
        outputs: Sequence[TensorInfo] | None = None,
        compute: Callable[[InferRequest], Sequence[Array]] = doubled,
        *,
        info: ModelInfo | None = None,
    ) -> None:
        """`info` describes the model in place of `inputs` and `outputs`."""
        named = [tensor("y" + info.name[1:], info.shape, info.dtype) for info in inputs] if outputs is None else outputs
        self._info = info or ModelInfo(
            name="double", version="1", sha256="0" * 64, inputs=tuple(inputs), outputs=tuple(named)
        )
        self._compute = compute
        self.is_live = self.is_ready = True
        self.fault: ServingError | None = None  # raised by the next requests
        self.gate: asyncio.Event | None = None  # a request waits for it
        self.requests: list[InferRequest] = []
        self.cancelled = 0
        self.streams: list[tuple[RequestTerms, Keep]] = []
        self.closed_streams = 0

    def models(self) -> Sequence[ModelInfo]:
        return [self._info]

    def model(self, name: str, version: str = "") -> ModelInfo:
        if name != self._info.name or version not in ("", self._info.version):
            raise ServingError(Fault.NOT_FOUND, f"there is no model {name!r} of version {version!r}")
        return self._info

    def live(self) -> bool:
        return self.is_live

    def ready(self) -> bool:
        return self.is_ready

    async def infer(self, request: InferRequest) -> InferResponse:
        info = self.model(request.model, request.version)
        self.requests.append(request)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.fault is not None:
            raise self.fault
        self._check(request)
        outputs = dict(zip([one.name for one in info.outputs], self._compute(request), strict=True))
        described = {one.name: one for one in info.outputs}
        wanted = request.outputs or tuple(described)
        if unknown := set(wanted) - set(described):
            raise ServingError(Fault.INVALID, f"there is no output {min(unknown)!r}")
        return InferResponse(
            model=info.name,
            version=info.version,
            id=request.id,
            outputs=[(described[name], outputs[name]) for name in wanted],
            parameters={"deepar_kind": "device", "deepar_attempt": 1, "deepar_delay_s": 0.25, "deepar_late": False},
        )

    def _check(self, request: InferRequest) -> None:
        for info in self._info.inputs:
            array = request.inputs.get(info.name)
            if array is None:
                raise ServingError(Fault.INVALID, f"input {info.name!r} is missing")
            if array.dtype.name != info.dtype or array.shape[1:] != info.shape[1:]:
                raise ServingError(Fault.INVALID, f"input {info.name!r}: expected {info.datatype} {list(info.shape)}")

    @contextlib.asynccontextmanager
    async def stream(self, model: str, version: str, terms: RequestTerms, keep: Keep) -> AsyncIterator[InferenceStream]:
        self.model(model, version)
        self.streams.append((terms, keep))
        if self.fault is not None:
            raise self.fault
        try:
            yield self
        finally:
            self.closed_streams += 1

    def statistics(self, name: str = "") -> Sequence[Mapping[str, Any]]:
        if name:
            self.model(name)
        count = len(self.requests)
        times = {"count": count, "ns": 1000 * count}
        return [
            {
                "name": self._info.name,
                "version": self._info.version,
                "last_inference": 1_700_000_000_000,
                "inference_count": count,
                "execution_count": count,
                "inference_stats": {"success": times, "fail": {"count": 0, "ns": 0}, "queue": times},
            }
        ]
