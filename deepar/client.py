"""Clients of DeePar's endpoint: `Client`, its twin `AsyncClient` for asyncio, and their sessions.

They speak the Open Inference Protocol over HTTP with binary tensors; a session is a WebSocket.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import ssl
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import aiohttp

from deepar.defaults import DEFAULT_TIMEOUT_S, DEFAULT_URL
from deepar.protocol import (
    LENGTH_BYTES,
    Answer,
    InferenceError,
    ModelInfo,
    check_inputs,
    read_answer,
    read_error,
    read_model,
    write_request,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_ANSWER_BYTES = 1 << 30
END = "end"
"""The text message with which the client ends a stream: no more frames follow."""

READ_AHEAD = 128
"""Frames without an answer from which `send` reads answers: else an endpoint that waits for its answers to be read, and a
client that sends first and reads later, would wait for each other.
"""

T = TypeVar("T")


class AsyncClient:
    """A client for asyncio. Use it as `async with AsyncClient(url) as client`, or call `close` at the end."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`token` is sent as a bearer token. `timeout_s` limits a request, at the client and at the endpoint. `tls` is for
        an endpoint with a certificate that the system does not trust. A `url` without a scheme is one of `http`.
        """
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._http: aiohttp.ClientSession | None = None
        self._models: dict[str, ModelInfo] = {}
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def ready(self) -> bool:
        """Whether the endpoint accepts requests now. False also where it cannot be reached."""
        try:
            status, _, _ = await self._request("GET", "/v2/health/ready")
        except InferenceError:
            return False
        return status == 200

    async def models(self) -> list[str]:
        """The names of the served models. Raises `InferenceError`."""
        status, headers, body = await self._request("POST", "/v2/repository/index", data=b"{}")
        _require(status, headers, body)
        return [str(one["name"]) for one in json.loads(body)]

    async def model(self, name: str) -> ModelInfo:
        """The inputs and outputs of a model, asked for once. Raises `InferenceError`."""
        if name not in self._models:
            status, headers, body = await self._request("GET", f"/v2/models/{quote(name, safe='')}")
            _require(status, headers, body)
            self._models[name] = read_model(body)
        return self._models[name]

    async def infer(
        self,
        model: str,
        inputs: Any,
        *,
        outputs: tuple[str, ...] = (),
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Answer:
        """Compute one request, and return its answer.

        `inputs` is one array, a sequence of arrays in the model's order, or a mapping by name. The first dimension of an
        array counts the samples; an array without it is one sample. Dimensions of size 1 may be left out. `parameters` are
        those of the request: `priority`, `max_link1_bps`, `placement`, ... Raises `InputError` before anything is sent, and
        `InferenceError`.
        """
        checked = check_inputs(await self.model(model), inputs)
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        parameters.setdefault("timeout", max(1, int(limit_s * 1e6)))
        header, tensors = write_request(
            checked, request_id=str(next(self._ids)), outputs=outputs, parameters=parameters
        )
        status, headers, body = await self._request(
            "POST",
            f"/v2/models/{quote(model, safe='')}/infer",
            data=b"".join((header, *tensors)),
            headers={HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"},
            timeout_s=limit_s,
        )
        _require(status, headers, body)
        length = int(headers.get(HEADER_LENGTH, len(body)))
        view = memoryview(body)
        return read_answer(view[:length], view[length:])

    async def session(
        self,
        model: str,
        *,
        rate_hz: float | None = None,
        latency_s: float | None = None,
        frames: Literal["all", "latest"] = "all",
        **parameters: Any,
    ) -> AsyncSession:
        """Open a session: frames are sent without waiting, and answers come as they are ready.

        `rate_hz` is the number of frames a second that the placement shall sustain. With `latest`, a new frame replaces one
        that waits, whose answer is then an error. `parameters` are those of a request: `placement`, `priority`, ... Raises
        `InferenceError`.
        """
        info = await self.model(model)
        query = {"frames": frames, **{name: str(value) for name, value in parameters.items()}}
        if rate_hz is not None:
            query["rate_hz"] = repr(float(rate_hz))
        if latency_s is not None:
            query["latency_s"] = repr(float(latency_s))
        try:
            socket = await self._session().ws_connect(
                f"{self.url}/v2/models/{quote(model, safe='')}/stream",
                params=query,
                max_msg_size=MAX_ANSWER_BYTES,
                ssl=self._tls,
            )
        except aiohttp.WSServerHandshakeError as error:
            message = f"{model}: the endpoint refused the session with HTTP status {error.status}"
            retry_after = error.headers.get("Retry-After") if error.headers else None
            raise read_error(error.status, message.encode(), retry_after) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from None
        return AsyncSession(info, socket)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, Any, bytes]:
        limit = aiohttp.ClientTimeout(total=self.timeout_s if timeout_s is None else timeout_s)
        try:
            async with self._session().request(
                method, self.url + path, data=data, headers=headers, timeout=limit, ssl=self._tls
            ) as answer:
                return answer.status, answer.headers, await answer.read()
        except TimeoutError:
            raise InferenceError(f"{self.url} did not answer within {limit.total:g} s", 504) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from None

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            # An inference may be long, so only whole requests have a time limit.
            self._http = aiohttp.ClientSession(headers=self._headers)
        return self._http

    def _unreachable(self, error: Exception) -> InferenceError:
        cause = getattr(error, "os_error", error)
        number = getattr(cause, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(cause, "strerror", None) or str(cause) or repr(cause)
        return InferenceError(
            f"no answer from {self.url}: {reason}", repeatable=isinstance(error, aiohttp.ClientConnectorError)
        )


def _require(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise the `InferenceError` of an answer that is not a success."""
    if status != 200:
        raise read_error(status, body, headers.get("Retry-After"))


class AsyncSession:
    """A session: `await send(frame)` and `async for answer in session`.

    The iteration ends when `end` was called and every answer has come. An answer that is an error is yielded as the
    `InferenceError` that it is, so that the stream goes on.
    """

    def __init__(self, model: ModelInfo, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.model = model
        self._socket = socket
        self._ids = itertools.count()
        self._ended = False
        self._read: deque[Answer | InferenceError] = deque()  # answers that `send` has read
        self._reading = asyncio.Lock()
        self.unanswered = 0  # frames sent whose answer has not been read yet

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def send(self, inputs: Any, **parameters: Any) -> str:
        """Send a frame, and return its id, which its answer carries. Raises `InputError`, `InferenceError`."""
        if self._ended:
            raise InferenceError("the session has ended: no more frames can be sent")
        frame_id = str(next(self._ids))
        header, tensors = write_request(check_inputs(self.model, inputs), request_id=frame_id, parameters=parameters)
        try:
            await self._socket.send_bytes(b"".join((len(header).to_bytes(LENGTH_BYTES, "big"), header, *tensors)))
        except (aiohttp.ClientError, OSError) as error:
            raise InferenceError(f"the session is closed: {error}", repeatable=True) from None
        self.unanswered += 1
        while self.unanswered - len(self._read) > READ_AHEAD:
            async with self._reading:
                if self.unanswered - len(self._read) > READ_AHEAD and (answer := await self._next()) is not None:
                    self._read.append(answer)
        return frame_id

    async def end(self) -> None:
        """Say that no more frames follow; the answers under way still come."""
        if not self._ended:
            self._ended = True
            with suppress(aiohttp.ClientError, OSError):  # `receive` says that the connection is gone
                await self._socket.send_str(END)

    async def receive(self) -> Answer | InferenceError | None:
        """The next answer, or the error of a frame that gets none. None: the session is over.

        Raises `InferenceError` where the connection ended with frames under way.
        """
        async with self._reading:
            if self._ended and not self.unanswered:
                return None
            answer = self._read.popleft() if self._read else await self._next()
            self.unanswered -= answer is not None
            return answer

    async def _next(self) -> Answer | InferenceError | None:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            data = memoryview(message.data)
            length = int.from_bytes(data[:LENGTH_BYTES], "big") + LENGTH_BYTES
            try:
                return read_answer(data[LENGTH_BYTES:length], data[length:])
            except InferenceError as error:
                return error
        if missing := self.unanswered - len(self._read):
            why = message.extra or f"code {self._socket.close_code}"
            raise InferenceError(f"the session ended with {missing} frames without an answer: {why}", repeatable=True)
        return None

    async def __aiter__(self) -> AsyncIterator[Answer | InferenceError]:
        while (answer := await self.receive()) is not None:
            yield answer

    async def close(self) -> None:
        """Close the connection. Frames without an answer are given up."""
        self._ended = True
        await self._socket.close()


class Client:
    """A client for code without asyncio, safe to use from several threads. It runs an `AsyncClient` in a thread of its own.

    Use it as `with Client(url) as client`, or call `close` at the end.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """The parameters are those of `AsyncClient`."""
        self._client = AsyncClient(url, token=token, timeout_s=timeout_s, tls=tls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="deepar client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._loop.is_closed():
            return
        self.run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the client's thread, and return its result."""
        waiting = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return waiting.result()
        except BaseException:  # Ctrl-C included: the request ends with its caller
            waiting.cancel()
            raise

    def ready(self) -> bool:
        """See `AsyncClient.ready`."""
        return self.run(self._client.ready())

    def models(self) -> list[str]:
        """See `AsyncClient.models`."""
        return self.run(self._client.models())

    def model(self, name: str) -> ModelInfo:
        """See `AsyncClient.model`."""
        return self.run(self._client.model(name))

    def infer(
        self,
        model: str,
        inputs: Any,
        *,
        outputs: tuple[str, ...] = (),
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> Answer:
        """See `AsyncClient.infer`."""
        return self.run(self._client.infer(model, inputs, outputs=outputs, timeout_s=timeout_s, **parameters))

    def session(
        self,
        model: str,
        *,
        rate_hz: float | None = None,
        latency_s: float | None = None,
        frames: Literal["all", "latest"] = "all",
        **parameters: Any,
    ) -> Session:
        """See `AsyncClient.session`."""
        opened = self._client.session(model, rate_hz=rate_hz, latency_s=latency_s, frames=frames, **parameters)
        return Session(self, self.run(opened))


class Session:
    """A session: `send(frame)` and `for answer in session`; see `AsyncSession`.

    Iterating ends the sending: it yields the answers of all frames sent. To send and receive in turns, call `receive`.
    """

    def __init__(self, client: Client, session: AsyncSession) -> None:
        self._client, self._session = client, session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, inputs: Any, **parameters: Any) -> str:
        """See `AsyncSession.send`."""
        return self._client.run(self._session.send(inputs, **parameters))

    def receive(self) -> Answer | InferenceError | None:
        """See `AsyncSession.receive`."""
        return self._client.run(self._session.receive())

    def end(self) -> None:
        """See `AsyncSession.end`."""
        self._client.run(self._session.end())

    def __iter__(self) -> Iterator[Answer | InferenceError]:
        self.end()
        while (answer := self.receive()) is not None:
            yield answer

    def close(self) -> None:
        """See `AsyncSession.close`."""
        self._client.run(self._session.close())
