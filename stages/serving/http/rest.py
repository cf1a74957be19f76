"""The Open Inference Protocol over HTTP.

One handler serves all paths. Nothing of a request is read before it is checked: token, path, size, body, tensors.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from stages.serving.checking import MAX_SAMPLES
from stages.serving.http.body import decode_request, encode_response, json_bytes_of, parsed
from stages.serving.http.compression import SMALLEST_BYTES, accepted_coding, compressed, decompressed
from stages.serving.http.stream import serve_stream
from stages.serving.limits import Admission, Claim, too_large
from stages.serving.metadata import model_config, model_metadata, repository_index, server_metadata
from stages.serving.security import Guard
from stages.serving.unexpected import internal_error
from stages.serving.values import Fault, ServingError, StreamingInference

JSON_LENGTH: Final = "Inference-Header-Content-Length"
OFF_LOOP_BYTES: Final = 64 << 10
"""Larger bodies are compressed and decompressed in a thread."""

NOT_OFFERED: Final = frozenset({"systemsharedmemory", "cudasharedmemory", "trace", "logging"})
"""Paths of Triton's that this endpoint lacks."""


class RestServer:
    """Answers HTTP requests by an `Inference`."""

    def __init__(self, inference: StreamingInference, guard: Guard, admission: Admission, *, version: str) -> None:
        self._inference = inference
        self._version = version  # of DeePar
        self._guard = guard
        self._admission = admission

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        try:
            return await self._routed(request)
        except ServingError as error:
            return _refusal(error, request)
        except Exception as error:
            return _refusal(internal_error("HTTP", error), request)

    async def _routed(self, request: web.BaseRequest) -> web.StreamResponse:
        path = [unquote(part) for part in request.raw_path.partition("?")[0].rstrip("/").split("/")[1:]]
        if path[:2] == ["v2", "health"]:
            return self._health(request, path[2:])
        token = self._check(request)
        match path:
            case ["v2", "models", name, *rest] if name != "stats" or rest:
                version = ""
                if rest[:1] == ["versions"] and len(rest) > 1:
                    version, rest = rest[1], rest[2:]
                return await self._model(request, (name, version), rest, token or request.remote or "")
            case ["v2"]:
                return _allowed(request, "GET") or _json(server_metadata(self._version))
            case ["v2", "models", "stats"]:
                return _allowed(request, "GET") or _json({"model_stats": list(self._inference.statistics())})
            case ["v2", "repository", "index"]:
                return _allowed(request, "POST") or await self._index(request, token or request.remote or "")
            case ["v2", "repository", "models", _, "load" | "unload"]:
                raise ServingError(Fault.NOT_IMPLEMENTED, "models are loaded when the device starts")
            case ["v2", word, *_] if word in NOT_OFFERED:
                raise ServingError(Fault.NOT_IMPLEMENTED, f"{word} is not offered")
            case _:
                raise ServingError(Fault.NOT_FOUND, "there is no such path; the protocol begins at /v2")

    def _check(self, request: web.BaseRequest) -> str:
        get = request.headers.get
        return self._guard.check(authorization=get("Authorization", ""), host=get("Host", ""), origin=get("Origin", ""))

    def _health(self, request: web.BaseRequest, rest: list[str]) -> web.Response:
        match rest:
            case ["live"]:
                word, good = "live", self._inference.live()
            case ["ready"]:
                word, good = "ready", self._inference.ready()
            case _:
                raise ServingError(Fault.NOT_FOUND, "there are /v2/health/live and /v2/health/ready")
        return _allowed(request, "GET") or _json({word: good}, status=200 if good else 503)

    async def _index(self, request: web.BaseRequest, client: str) -> web.Response:
        with self._admission.admitted(client, request.content_length or 0) as claim:
            body = await self._body(request, claim)
        wanted = parsed(body).get("ready") if body.strip() else None
        return _json(repository_index(self._inference, only_ready=wanted is True))

    async def _model(
        self, request: web.BaseRequest, named: tuple[str, str], rest: list[str], client: str
    ) -> web.StreamResponse:
        model = self._inference.model(*named)
        match rest:
            case ["infer"]:
                return _allowed(request, "POST") or await self._infer(request, named, client)
            case ["stream"]:
                return _allowed(request, "GET") or await serve_stream(
                    request, self._inference, self._admission, named, client
                )
            case []:
                value: Any = model_metadata(model)
            case ["ready"]:
                ready = self._inference.ready()
                value = {"name": model.name, "ready": ready}
                return _allowed(request, "GET") or _json(value, status=200 if ready else 503)
            case ["config"]:
                value = model_config(model, MAX_SAMPLES)
            case ["stats"]:
                value = {"model_stats": list(self._inference.statistics(model.name))}
            case _:
                raise ServingError(Fault.NOT_FOUND, f"model {model.name} has no such path")
        return _allowed(request, "GET") or _json(value)

    # --- inference ---------------------------------------------------------------------------------------------------

    async def _infer(self, request: web.BaseRequest, named: tuple[str, str], client: str) -> web.StreamResponse:
        with self._admission.admitted(client, request.content_length or 0) as claim:
            body = await self._body(request, claim)
            json_bytes = _json_length(request, len(body))
            if (len(body) if json_bytes is None else json_bytes) > self._admission.limits.json_bytes:
                limit = f"{self._admission.limits.json_bytes:,} bytes"
                raise ServingError(Fault.TOO_LARGE, f"the JSON has more than {limit}; send large tensors as raw bytes")
            name, version = named
            inference, form = decode_request(memoryview(body), json_bytes, model=name, version=version, client=client)
            del body
            answer = encode_response(await self._inference.infer(inference), form)
            headers = {"Content-Type": "application/json"}
            if answer.json_bytes is not None:
                headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(answer.json_bytes)}
            payload = answer.parts[0] if len(answer.parts) == 1 else b"".join(answer.parts)
            asked = request.headers.get("Accept-Encoding")
            if asked and len(payload) >= SMALLEST_BYTES and (coding := accepted_coding(asked)):
                payload = await _off_loop(len(payload), compressed, bytes(payload), coding)
                headers["Content-Encoding"] = coding
            return await self._sent(request, web.Response(body=payload, headers=headers), len(payload))

    async def _body(self, request: web.BaseRequest, claim: Claim) -> bytes:
        """The body, decompressed. Raises `ServingError` where it is too large, too slow or incomplete."""
        limits = self._admission.limits
        try:
            async with asyncio.timeout(limits.time_for(claim.size_bytes or limits.body_bytes)):
                body = await _received(request, claim, limits.body_bytes)
        except TimeoutError:
            raise ServingError(Fault.TIMEOUT, "the body did not arrive in time") from None
        except (HttpProcessingError, web.RequestPayloadError):
            raise ServingError(Fault.INVALID, "the body is incomplete or badly framed") from None
        coding = request.headers.get("Content-Encoding")
        if coding:
            body = await _off_loop(len(body), decompressed, body, coding.strip().lower(), limits.body_bytes)
            claim.grow(len(body))
        return body

    async def _sent(self, request: web.BaseRequest, response: web.Response, size_bytes: int) -> web.Response:
        """Send the answer while its request still counts; give up where the client does not read it."""
        try:
            async with asyncio.timeout(self._admission.limits.time_for(size_bytes)):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            raise ConnectionResetError("the client did not read the answer") from None
        return response


async def _received(request: web.BaseRequest, claim: Claim, limit_bytes: int) -> bytes:
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer is still to come
    chunks, size_bytes = [], 0
    content = request.content
    while not content.at_eof():
        chunk = await content.readany()
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise too_large(limit_bytes)
        claim.grow(size_bytes)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _off_loop(size_bytes: int, work: Any, *args: Any) -> bytes:
    """`work(*args)`, in a thread where it takes long."""
    found: bytes = work(*args) if size_bytes < OFF_LOOP_BYTES else await asyncio.to_thread(work, *args)
    return found


def _json_length(request: web.BaseRequest, size_bytes: int) -> int | None:
    given = request.headers.get(JSON_LENGTH)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit()) or len(given) > 12 or int(given) > size_bytes:
        raise ServingError(
            Fault.INVALID,
            f"{JSON_LENGTH} must be the length of the JSON, at most that of the body ({size_bytes:,} bytes)",
        )
    return int(given)


def _json(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=json_bytes_of(value), status=status, content_type="application/json")


def _allowed(request: web.BaseRequest, method: str) -> web.Response | None:
    """The refusal of another method, or None."""
    if request.method == method:
        return None
    error = {"error": f"{request.method[:20]} is not possible here; use {method}", "repeatable": False}
    response = _json(error, status=405)
    response.headers["Allow"] = method
    return response


def _refusal(error: ServingError, request: web.BaseRequest) -> web.Response:
    fault = error.fault
    response = _json({"error": error.for_client, "repeatable": error.repeatable}, status=fault.http)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if fault is Fault.UNAUTHENTICATED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if not request.content.at_eof():
        response.force_close()  # the rest of the body is not read
    return response
