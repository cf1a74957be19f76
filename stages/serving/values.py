"""Requests and answers of the Open Inference Protocol, independent of the transport.

A transport (REST, gRPC, WebSocket) turns bytes into an `InferRequest`, awaits `Inference.infer`, and turns the result, an
`InferResponse` or a `ServingError`, into bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Protocol

from bus.errors import DeeparError
from bus.tensors import Array
from bus.values import Role
from stages.devices.session import Keep
from stages.models.files.metadata import ModelMetadata


class Fault(Enum):
    """Why a request was refused: the HTTP status, the gRPC status, and whether the same request may be sent again."""

    INVALID = (400, "INVALID_ARGUMENT", False)  # wrong tensors, types or parameters
    UNAUTHENTICATED = (401, "UNAUTHENTICATED", False)  # no or a wrong token
    FORBIDDEN = (403, "PERMISSION_DENIED", False)  # asked by a page of another site, through a browser
    NOT_FOUND = (404, "NOT_FOUND", False)  # unknown model or version
    TIMEOUT = (408, "DEADLINE_EXCEEDED", True)  # the request did not arrive in time
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED", False)  # larger than the endpoint accepts
    BUSY = (429, "RESOURCE_EXHAUSTED", True)  # a queue or a client's limit is full
    CANCELLED = (499, "CANCELLED", True)  # the client went away
    INTERNAL = (500, "INTERNAL", False)  # the model failed on this input
    NOT_IMPLEMENTED = (501, "UNIMPLEMENTED", False)
    UNAVAILABLE = (503, "UNAVAILABLE", True)  # not ready, draining, or a stage was lost
    DEADLINE = (504, "DEADLINE_EXCEEDED", False)  # the request's time is over

    def __init__(self, http: int, grpc: str, repeatable: bool) -> None:
        self.http, self.grpc, self.repeatable = http, grpc, repeatable


class ServingError(DeeparError):
    """A request that gets no answer, with the reason in words for the client."""

    def __init__(
        self, fault: Fault, message: str, *, retry_after_s: float | None = None, repeatable: bool | None = None
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.retry_after_s = retry_after_s
        self.repeatable = fault.repeatable if repeatable is None else repeatable  # whether sending it again may help

    @property
    def for_client(self) -> str:
        """The message, and where it holds, that the same request may be sent again: every transport sends this text."""
        return f"{self}; the request may be repeated" if self.repeatable else str(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One input or output of a model, as its metadata says."""

    name: str
    datatype: str  # the protocol's name: FP32, INT8, UINT8, BOOL, ...
    dtype: str  # numpy's name
    shape: tuple[int, ...]  # of one sample, the model's batch dimension included


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model."""

    name: str
    version: str
    sha256: str
    inputs: tuple[TensorInfo, ...]  # in the order of the signature
    outputs: tuple[TensorInfo, ...]
    metadata: ModelMetadata | None = None  # how to prepare an image, and names of classes; None: the file has none


class Mode(StrEnum):
    """How a request is computed."""

    AUTO = "auto"  # in a warm session where possible
    REQUEST = "request"  # as a task of its own, planned for this request
    SESSION = "session"  # in a session, never as a task of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTerms:
    """The `parameters` of a request that the planner and the endpoint read."""

    timeout_s: float | None = None  # from `timeout`, in microseconds on the wire
    priority: int | None = None  # 1 is the most urgent; 0 on the wire is the default, None
    max_link1_bps: int | None = None
    max_link2_bps: int | None = None
    min_agreement: float | None = None  # of lossy codecs on the links; None: lossless ones only
    mode: Mode = Mode.AUTO  # from `deepar_mode`
    tiers: tuple[Role, ...] | None = None  # from `placement`: tiers that may compute
    session: str | None = None  # `sequence_id`: the session that the request belongs to
    session_start: bool = False
    session_end: bool = False
    rate_hz: float | None = None  # of the session
    latency_s: float | None = None  # the session's target


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A request for one inference on `samples` samples."""

    model: str
    inputs: Mapping[str, Array]  # by name; the first dimension is the number of samples
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()  # wanted outputs in this order; empty: all
    terms: RequestTerms = field(default_factory=RequestTerms)
    client: str = ""  # who asks, for the limits: an address or the name of a token


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    """The answer: whole tensors, bit-identical to those of the uncut model unless `min_agreement` allowed lossy codecs."""

    model: str
    version: str
    id: str
    outputs: Sequence[tuple[TensorInfo, Array]]
    parameters: Mapping[str, Any]  # `deepar_kind`, `deepar_edge`, `deepar_cuts`, predicted and measured parts, attempt


class Inference(Protocol):
    """What a transport calls."""

    def models(self) -> Sequence[ModelInfo]:
        """The served models."""

    def model(self, name: str, version: str = "") -> ModelInfo:
        """One served model. Raises `ServingError` (`NOT_FOUND`)."""

    def live(self) -> bool:
        """Whether the process works."""

    def ready(self) -> bool:
        """Whether a request for any model would be accepted now."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Compute. Raises `ServingError`. Cancelling the call cancels the task."""

    def statistics(self, name: str = "") -> Sequence[Mapping[str, Any]]:
        """The statistics of one model or of all, in the protocol's form (times in nanoseconds)."""


class InferenceStream(Protocol):
    """The session of one connection."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Compute one frame. Raises `ServingError`."""


class StreamingInference(Inference, Protocol):
    """An `Inference` with sessions for the frames of one connection."""

    def stream(
        self, model: str, version: str, terms: RequestTerms, keep: Keep
    ) -> AbstractAsyncContextManager[InferenceStream]:
        """A session. Raises `ServingError` where none can be opened."""
