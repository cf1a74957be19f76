"""TCP ports of this machine: choice of a free one, and check of a requested one."""

from __future__ import annotations

import contextlib
import errno
import random
import socket

from bus.errors import ConfigError
from deploy.kafka_local.handshake import ask

_OUR_PORTS = range(20_000, 32_000)


class PortTakenError(ConfigError):
    """Another process listens on the requested port."""


def free_port() -> int:
    """Return a free TCP port of the loopback interface. Raises OSError if there is none.

    Ports from 32768 on are left out, because the kernel gives them to outgoing connections: one could take the port of a
    broker while it restarts.
    """
    for port in random.SystemRandom().sample(_OUR_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "no free port was found")


def require_free(port: int) -> None:
    """Check that a port of the loopback interface can be bound. Raises `PortTakenError`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise _port_error(port, error) from error


def _port_error(port: int, error: OSError) -> ConfigError:
    """The error for a port that cannot be bound, with its remedy."""
    if isinstance(error, PermissionError):
        return PortTakenError(f"port {port} may not be used by this user", remedy="choose one above 1023 with --port")
    try:
        ask(f"127.0.0.1:{port}", 1.0)
    except OSError:
        return PortTakenError(
            f"port {port} is taken by another program ({error.strerror})",
            remedy=f"choose another with --port (`ss -ltnp sport = {port}` shows the process)",
        )
    return PortTakenError(
        f"a Kafka broker answers at 127.0.0.1:{port} already",
        remedy=f"use that one (KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:{port}), or choose another port with --port",
    )
