"""Start and end of the gRPC endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from bus.errors import ConfigError
from stages.serving.limits import Admission
from stages.serving.security import Listening
from stages.serving.values import Inference

EXTRA: Final = frozenset(("grpc", "google"))
"""The packages of the extra `grpc`."""

CLOSING_S: Final = 3.0
"""How long answers under way may take when the endpoint stops; streams that are idle end after it."""


@contextlib.asynccontextmanager
async def grpc_endpoint(inference: Inference, listening: Listening, admission: Admission) -> AsyncIterator[int]:
    """Serve `inference` over gRPC while the block runs; yields the port.

    Raises `ConfigError` if the extra is missing, the address is unsafe or cannot be used, or the certificate is wrong.
    """
    listening.require_safe()
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
            ("grpc.max_receive_message_length", admission.limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=admission.limits.requests,
    )
    server.add_generic_rpc_handlers((Service(inference, listening, admission),))
    shown = f"[{listening.host}]" if ":" in listening.host else listening.host
    address = f"{shown}:{listening.port}"
    credentials = _credentials(listening)
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError:
        raise ConfigError(
            f"{listening.flag} {address}: cannot listen", remedy="choose another port or address"
        ) from None
    await server.start()
    try:
        yield port
    finally:
        await server.stop(CLOSING_S)


def _credentials(listening: Listening) -> Any:
    """The credentials for TLS; None without TLS."""
    import grpc

    if listening.tls() is None:  # checks the files, since gRPC would only log what is wrong with them
        return None
    assert listening.certificate is not None
    assert listening.key is not None
    return grpc.ssl_server_credentials([(listening.key.read_bytes(), listening.certificate.read_bytes())])
