"""Limits of the endpoint: what one request, one client and all clients may use at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from stages.serving.values import Fault, ServingError

RETRY_AFTER_S = 1.0
"""When a client that was refused may try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """Sizes in bytes are those of a body before and after it is decompressed, whichever is larger."""

    body_bytes: int = 64 << 20  # of one request
    json_bytes: int = 16 << 20  # of its JSON, which holds the event loop while it is read
    client_requests: int = 256  # of one client at once
    client_bytes: int = 256 << 20
    requests: int = 1_024  # of all clients at once
    bytes: int = 1 << 30
    connections: int = 1_024
    head_s: float = 15.0  # until the first request of a connection
    body_s: float = 10.0  # for a body, in addition to its size at the slowest rate
    slowest_bytes_per_s: int = 64 << 10

    def time_for(self, size_bytes: int) -> float:
        """How long a client may take to send a body."""
        return self.body_s + size_bytes / self.slowest_bytes_per_s


class Claim:
    """What one request uses; the admission counts it until the request ends."""

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission = admission
        self._client = client
        self.size_bytes = 0

    def grow(self, size_bytes: int) -> None:
        """Hold `size_bytes` in all. Raises `ServingError` where that exceeds a limit."""
        if size_bytes > self.size_bytes:
            self._admission.take(self._client, 0, size_bytes - self.size_bytes)
            self.size_bytes = size_bytes


class Admission:
    """Counts the requests and bytes under way, by client and in all."""

    def __init__(self, limits: ServingLimits) -> None:
        self.limits = limits
        self._clients: dict[str, tuple[int, int]] = {}
        self.requests = 0
        self.bytes = 0

    @contextlib.contextmanager
    def admitted(self, client: str, size_bytes: int) -> Iterator[Claim]:
        """Count a request with a body of `size_bytes` while the block runs. Raises `ServingError` where there is no room."""
        if size_bytes > self.limits.body_bytes:
            raise too_large(self.limits.body_bytes)
        self.take(client, 1, 0)
        claim = Claim(self, client)
        try:
            claim.grow(size_bytes)
            yield claim
        finally:
            self._give(client, claim.size_bytes)

    def take(self, client: str, requests: int, size_bytes: int) -> None:
        """Count more of a client. Raises `ServingError` (`BUSY`) where a limit would be exceeded."""
        limits = self.limits
        own_requests, own_bytes = self._clients.get(client, (0, 0))
        for used, limit, words in (
            (own_requests + requests, limits.client_requests, "requests of this client are under way"),
            (self.requests + requests, limits.requests, "requests are under way"),
            (own_bytes + size_bytes, limits.client_bytes, "bytes of this client are under way"),
            (self.bytes + size_bytes, limits.bytes, "bytes are under way"),
        ):
            if used > limit:
                raise ServingError(Fault.BUSY, f"more than {limit:,} {words}", retry_after_s=RETRY_AFTER_S)
        self._clients[client] = (own_requests + requests, own_bytes + size_bytes)
        self.requests += requests
        self.bytes += size_bytes

    def _give(self, client: str, size_bytes: int) -> None:
        own_requests, own_bytes = self._clients.pop(client)
        if own_requests > 1:
            self._clients[client] = (own_requests - 1, own_bytes - size_bytes)
        self.requests -= 1
        self.bytes -= size_bytes


def too_large(limit_bytes: int) -> ServingError:
    """The refusal of a body over the limit."""
    return ServingError(Fault.TOO_LARGE, f"the body has more than {limit_bytes:,} bytes")
