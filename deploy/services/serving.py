"""The endpoint of a device process: where it listens, and how it is attached to the device."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import structlog

from bus.errors import ConfigError, ModelError
from bus.values import Role
from deploy.services.settings import DeviceOptions
from stages.runner import Runner
from stages.serving.catalogue import ServedModel, served_model
from stages.serving.inference import DeviceInference, InferenceOptions
from stages.serving.limits import Admission, ServingLimits
from stages.serving.security import Listening, parse_address, read_tokens
from stages.serving.submission import ServingDevice

GATEWAY_TIERS = (Role.EDGE, Role.CLOUD)
"""The tiers that compute for the clients of a gateway."""

log = structlog.get_logger("deepar")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a device serves clients, and how it computes their requests."""

    http: Listening | None = None
    grpc: Listening | None = None
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    limits: ServingLimits = field(default_factory=ServingLimits)

    @contextlib.asynccontextmanager
    async def serving(
        self, name: str, device: Callable[[], ServingDevice], ready: Callable[[], bool], runner: Runner
    ) -> AsyncIterator[DeviceInference]:
        """Serve clients while the block runs. Raises `ConfigError` where an address or a model cannot be served."""
        inference = DeviceInference(name, device, _served(runner), ready, self.inference)
        admission = Admission(self.limits)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(inference.serving())
            if self.http is not None:
                from stages.serving.http.server import rest_endpoint  # imported here: aiohttp takes half a second

                version = metadata.version("deepar")
                port = await stack.enter_async_context(rest_endpoint(inference, self.http, admission, version))
                log.info("serving over HTTP", url=self.http.url(port))
            if self.grpc is not None:
                from stages.serving.grpc.endpoint import grpc_endpoint  # imported here: an extra

                port = await stack.enter_async_context(grpc_endpoint(inference, self.grpc, admission))
                log.info("serving over gRPC", host=self.grpc.host, port=port)
            yield inference


def endpoint_of(options: DeviceOptions) -> Endpoint | None:
    """The endpoint that a device's options describe; None without `serve` and `serve_grpc`. Raises `ConfigError`."""
    if options.serve is None and options.serve_grpc is None:
        if options.gateway:
            raise ConfigError(f"device {options.name} is a gateway but serves nowhere", remedy="set serve = HOST:PORT")
        return None
    tokens = read_tokens(_path(options.serve_token_file))

    def listening(address: str | None, flag: str) -> Listening | None:
        if address is None:
            return None
        host, port = parse_address(address, flag)
        found = Listening(
            host=host,
            port=port,
            tokens=tokens,
            certificate=_path(options.serve_certificate),
            key=_path(options.serve_key),
            forced=options.serve_insecure,
            flag=flag,
        )
        found.require_safe()
        found.tls()
        return found

    return Endpoint(
        http=listening(options.serve, "--serve"),
        grpc=listening(options.serve_grpc, "--serve-grpc"),
        inference=InferenceOptions(sessions=options.sessions, allowed=GATEWAY_TIERS if options.gateway else None),
    )


def _served(runner: Runner) -> list[ServedModel]:
    """The models of a runner that computes. Raises `ConfigError`."""
    from stages.litert_runner import LitertRunner

    if not isinstance(runner, LitertRunner):
        raise ConfigError("--serve needs --runner litert: a modelled runner computes no answers")
    found = []
    for model in runner.models():
        try:
            found.append(served_model(model))
        except ModelError as error:
            log.warning("model not served", model=model.name, reason=error.fault)
    return found


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
