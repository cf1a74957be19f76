"""Requests to the brokers of one cluster: a slow broker is not given up, another one is asked beside it.

Some requests are answered only after others have agreed. A broker forwards the creation of topics to the active controller,
which needs a majority of the controllers. While a dead broker is replaced on a busy machine this has taken 6 to 35 s. Brokers
also differ: one may still be connecting to the dead controller when another already knows its successor. So the first answer
counts, and each broker has at most one attempt at a time. An attempt has a connection of its own, closed if it fails: Kafka
answers the requests of a connection in order, so an abandoned request would delay the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import InvalidReplicationFactorError, KafkaConnectionError, KafkaError
from aiokafka.protocol.metadata import MetadataRequest

from bus.errors import BusUnavailableError
from bus.kafka.connection import (
    CHECK_TIMEOUT_S,
    FAILOVER_S,
    HANG_UP_S,
    REQUEST_S,
    KafkaConnection,
    addresses,
    advertised,
)
from bus.kafka.errors import translated

TRY_S = 20.0
"""Timeout of one attempt: more than a request takes during a failover, so that it ends only those on a lost connection."""

_SLOW_S = 1.5  # time without an answer after which another broker is asked as well
_RETRY_S = 0.1  # pause after a failed attempt

T = TypeVar("T")
Connect = Callable[[str], Awaitable[AIOKafkaConnection]]
Request = Callable[[AIOKafkaAdminClient], Awaitable[T]]


class Brokers:
    """The brokers of one cluster, and a connection to each that has answered."""

    def __init__(self, connection: KafkaConnection, servers: str, connect: Connect | None = None) -> None:
        """`connect` opens a connection to an address."""
        self._servers = servers
        self._connect = connect or (lambda address: connection.connect(address, TRY_S))
        self._addresses = addresses(servers)  # in the order in which they are asked
        self._idle: dict[str, AIOKafkaConnection] = {}
        self._closed = False
        self.are_several = False
        """Whether the cluster has ever listed several brokers. On a busy machine it lists too few at times."""

    async def ask(self, request: Request[T], what: str, *, at: str | None = None) -> T:
        """The first answer to a request; `at` is the address of the only broker to ask.

        `request` may be sent several times. Raises `BusUnavailableError` after `REQUEST_S` in which no broker could be
        reached, or after `FAILOVER_S`.
        """
        loop = asyncio.get_running_loop()
        began_s = reached_s = loop.time()
        attempts: dict[asyncio.Task[T], str] = {}
        last: BaseException | None = None
        try:
            while (left_s := min(began_s + FAILOVER_S, reached_s + REQUEST_S) - loop.time()) > 0:
                if (address := self._next({*attempts.values()}, at)) is not None:
                    attempts[loop.create_task(self._attempt(address, request))] = address
                wait_s = min(_SLOW_S, left_s)
                done, _ = await asyncio.wait(attempts, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    address, last = attempts.pop(task), task.exception()
                    self._rank(address, last)
                    if last is None:
                        return task.result()
                    if not _may_pass(last):
                        raise last
                    if not isinstance(last, OSError | KafkaConnectionError):
                        reached_s = loop.time()
                if attempts:  # a broker that is slow can be reached
                    reached_s = loop.time()
                if done:
                    await asyncio.sleep(_RETRY_S)
        except KafkaError as error:
            raise translated(error, self._servers) from error
        finally:
            await _cancel(attempts)
        cause = "" if last is None else f": {last!r}"
        raise BusUnavailableError(
            f"{at or self._servers} did not answer in time about {what}{cause}",
            remedy="check that the brokers run and reach each other; `deepar doctor` says what is wrong",
        ) from last

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        closing = [connection.close() for connection in self._idle.values()]
        self._idle.clear()
        if closing:
            await asyncio.wait(closing, timeout=HANG_UP_S)

    def _next(self, asked: set[str], at: str | None) -> str | None:
        """The address to ask next, or None if every broker is being asked."""
        if at is not None and at not in self._addresses:
            self._addresses.append(at)
        return next((one for one in self._addresses if one not in asked and at in (None, one)), None)

    def _rank(self, address: str, error: BaseException | None) -> None:
        """Ask a broker that answered first the next time, one that failed last."""
        self._addresses.remove(address)
        self._addresses.insert(0 if error is None else len(self._addresses), address)

    async def _attempt(self, address: str, request: Request[T]) -> T:
        connection = self._idle.pop(address, None)
        if connection is None or not connection.connected():
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                connection = await self._connect(address)
        try:
            self._learn(advertised(await connection.send(MetadataRequest([]))))
            answer = await request(_OneBroker(connection))
        except BaseException:
            connection.close()
            raise
        if self._closed or self._idle.setdefault(address, connection) is not connection:
            connection.close()
        return answer

    def _learn(self, found: Iterable[str]) -> None:
        """Keep what was known: a broker that lacked CPU time is not listed for some seconds, and can answer."""
        listed = list(found)
        self.are_several = self.are_several or len(listed) > 1
        self._addresses += [address for address in listed if address not in self._addresses]


class _OneBroker(AIOKafkaAdminClient):  # type: ignore[misc]
    """aiokafka's admin requests, sent over one connection. aiokafka itself chooses a random broker, which may be dead.

    Every broker accepts requests for the controller and forwards them; where it does not (before KRaft), it says so, and the
    next broker is asked.
    """

    def __init__(self, connection: AIOKafkaConnection) -> None:
        self._connection = connection
        self._request_timeout_ms = int(TRY_S * 1000)  # what the controller is given to create topics

    async def _send_request(self, request: Any, node_id: int | None = None) -> Any:
        return await self._connection.send(request)

    async def _send_to_controller(self, request: Any) -> Any:
        return await self._send_request(request)


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed. `check_created` raises `InvalidReplicationFactorError` only where it may."""
    temporary = isinstance(error, OSError | EOFError | InvalidReplicationFactorError)
    return temporary or (isinstance(error, KafkaError) and error.retriable)


async def _cancel(attempts: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel attempts, and retrieve the outcome of those that ended at the same time."""
    waiting = list(attempts)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
