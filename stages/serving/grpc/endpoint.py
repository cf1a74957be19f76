"""Start and end of the gRPC endpoint."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bus.errors import ConfigError
from stages.serving.values import Inference

MIB = 1 << 20
EXTRA = frozenset(("grpc", "google"))
"""The packages of the extra `grpc`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcOptions:
    """How the endpoint listens and what it accepts."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    token: str | None = None  # demanded as `authorization: Bearer TOKEN`
    tls_certificate: Path | None = None  # the server's certificate chain, PEM; with tls_key
    tls_key: Path | None = None  # its key, PEM
    max_request_bytes: int = 64 * MIB  # of one message, after decompression
    max_calls: int = 1_024  # calls and streams under way at once; more are refused
    max_samples: int = 1_024  # of one request, as the configuration of a model says
    grace_s: float = 1.0  # time for calls under way when the endpoint ends


@contextlib.asynccontextmanager
async def grpc_endpoint(inference: Inference, options: GrpcOptions) -> AsyncIterator[int]:
    """Serve `inference` over gRPC while the block runs; yields the port.

    Raises `ConfigError` if the extra is missing, the address cannot be used, or the certificate is wrong.
    """
    try:
        import grpc

        from stages.serving.grpc.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise ConfigError(
            f"serving over gRPC needs the package {error.name}, which is not installed",
            remedy="pip install 'deepar[grpc]', or pip install --require-hashes -r requirements-grpc.lock",
        ) from None
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", options.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=options.max_calls,
    )
    server.add_generic_rpc_handlers((Service(inference, token=options.token, max_samples=options.max_samples),))
    address = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    credentials = _credentials(options)
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address} for gRPC", remedy="choose a free port and an address of this machine"
        ) from error
    await server.start()
    try:
        yield port
    finally:
        await server.stop(options.grace_s)


def _credentials(options: GrpcOptions) -> Any:
    """The credentials for TLS; None without TLS. A wrong file is found here, since gRPC would only log it."""
    if options.tls_certificate is None and options.tls_key is None:
        return None
    if options.tls_certificate is None or options.tls_key is None:
        raise ConfigError("TLS needs both a certificate and its key", remedy="give both, or neither for no TLS")
    import grpc

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_certificate, options.tls_key)
        chain, key = options.tls_certificate.read_bytes(), options.tls_key.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use the certificate {options.tls_certificate} with the key {options.tls_key}: {error}",
            remedy="give a PEM certificate and the unencrypted PEM key that belongs to it",
        ) from error
    return grpc.ssl_server_credentials([(key, chain)])
