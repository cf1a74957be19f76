"""Streams: a session over a WebSocket.

A binary message is one frame: the length of its JSON (4 bytes, big-endian), the JSON of a request, and its raw tensors. Its
answer has the same form and the `id` of the frame; that of a refused frame has `error` and `repeatable` instead of outputs.
The text message `end` says that no more frames follow: the endpoint answers those under way and closes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Final

from aiohttp import WSMsgType, web

from stages.devices.session import Keep
from stages.serving.http.body import OutputForm, decode_request, encode_response, json_bytes_of, parsed
from stages.serving.limits import Admission
from stages.serving.terms import request_terms
from stages.serving.unexpected import internal_error
from stages.serving.values import (
    Fault,
    InferenceStream,
    InferRequest,
    RequestTerms,
    ServingError,
    StreamingInference,
)

LENGTH_BYTES: Final = 4
END: Final = "end"
HEARTBEAT_S: Final = 20.0
"""A connection is pinged at this interval, and closed if the answer takes longer than half of it."""

LONGEST_HEAD_BYTES: Final = 64 << 10
"""The JSON of a refused frame is searched for its `id` up to this length; it is longer only where it holds tensors."""

UNDER_WAY: Final = 256
"""Frames of one stream that may be under way; more are not read until one is answered."""


async def serve_stream(
    request: web.BaseRequest, inference: StreamingInference, admission: Admission, named: tuple[str, str], client: str
) -> web.StreamResponse:
    """Serve one WebSocket until its client ends it. Raises `ServingError` before it is open."""
    terms, keep = stream_terms(request.query)
    socket = web.WebSocketResponse(max_msg_size=admission.limits.body_bytes, heartbeat=HEARTBEAT_S, compress=False)
    if not socket.can_prepare(request):
        raise ServingError(Fault.INVALID, "a stream is a WebSocket: the request must ask for an upgrade")
    with admission.admitted(client, 0):
        async with inference.stream(*named, terms, keep) as stream:
            await socket.prepare(request)
            await _Frames(socket, stream, admission, named, client).serve()
            with contextlib.suppress(ConnectionError):
                await socket.close()
    return socket


def stream_terms(query: Mapping[str, str]) -> tuple[RequestTerms, Keep]:
    """What a stream's address asks for. Raises `ServingError`."""
    frames = query.get("frames", "all")
    if frames not in ("all", "latest"):
        raise ServingError(Fault.INVALID, "parameter 'frames': expected all or latest")
    return request_terms({name: value for name, value in query.items() if name != "frames"}), Keep(frames)


class _Frames:
    """The frames of one stream."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        stream: InferenceStream,
        admission: Admission,
        named: tuple[str, str],
        client: str,
    ) -> None:
        self._socket = socket
        self._stream = stream
        self._admission = admission
        self._named = named
        self._client = client
        self._room = asyncio.Semaphore(UNDER_WAY)
        self._answers: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer the frames; return when the client has ended the stream or is gone."""
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT and message.data == END:
                    await asyncio.gather(*self._answers)
                    return
                if message.type is not WSMsgType.BINARY:
                    await self._socket.close(code=1003, message=b"frames are binary; the only text message is: end")
                    return
                await self._room.acquire()
                task = asyncio.create_task(self._answer(message.data))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
        finally:
            for task in self._answers:
                task.cancel()

    async def _answer(self, data: bytes) -> None:
        try:
            try:
                with self._admission.admitted(self._client, len(data)):
                    answer = await self._computed(data)
            except ServingError as error:
                answer = refused(error, frame_id(data))
            except Exception as error:
                answer = refused(internal_error("stream", error), frame_id(data))
            with contextlib.suppress(ConnectionError):
                await self._socket.send_bytes(answer)
        finally:
            self._room.release()

    async def _computed(self, data: bytes) -> bytes:
        request, form = self._read(data)
        answer = encode_response(await self._stream.infer(request), form)
        return b"".join((len(answer.parts[0]).to_bytes(LENGTH_BYTES, "big"), *answer.parts))

    def _read(self, data: bytes) -> tuple[InferRequest, OutputForm]:
        length = int.from_bytes(data[:LENGTH_BYTES], "big")
        if length > self._admission.limits.json_bytes:
            raise ServingError(Fault.TOO_LARGE, f"the JSON of a frame has {length:,} bytes")
        model, version = self._named
        return decode_request(
            memoryview(data)[LENGTH_BYTES:], length, model=model, version=version, client=self._client
        )


def frame_id(data: bytes) -> str:
    """The `id` of a refused frame, so that its client knows which one it is; empty where it cannot be read."""
    length = int.from_bytes(data[:LENGTH_BYTES], "big")
    if length > LONGEST_HEAD_BYTES:
        return ""
    try:
        found = parsed(data[LENGTH_BYTES : LENGTH_BYTES + length]).get("id")
        return found if isinstance(found, str) and found.encode() else ""
    except (ServingError, UnicodeEncodeError):
        return ""


def refused(error: ServingError, frame_id: str) -> bytes:
    """The error that is sent in place of a frame's answer."""
    text = json_bytes_of({"id": frame_id, "error": error.for_client, "repeatable": error.repeatable})
    return len(text).to_bytes(LENGTH_BYTES, "big") + text
