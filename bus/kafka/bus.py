"""`KafkaBus`: the bus port on Apache Kafka, through aiokafka. `docs/bus.md` explains its settings."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    InvalidConfigurationError,
    KafkaError,
    TopicAuthorizationFailedError,
    for_code,
)

from bus.errors import BusError, BusUnavailableError, ConfigError, MessageTooLargeError
from bus.kafka.brokers import Brokers
from bus.kafka.connection import FAILOVER_S, KafkaConnection, patience_s
from bus.kafka.errors import check_created, translated, unknown_topic
from bus.kafka.members import KafkaMember
from bus.kafka.readers import KafkaReader, cut_off, end_offsets, started
from bus.kafka.sender import KafkaSender
from bus.kafka.settings import found_topics
from bus.limits import record_bytes
from bus.port import FoundTopic, Headers, Position, RebalanceCallback, RecordValue, TopicPartition
from bus.topic_settings import created_with
from bus.topics import TopicSpec, partition_of

__all__ = ["KafkaBus", "KafkaConnection"]

_RETRY_S = 0.1
_COUNT_AGE_S = 5.0  # maximum age of a partition count: the topic may have been recreated
_SPREAD_S = 1.0  # time until all brokers know a new topic
_MAX_COPIES = 3  # default number of replicas, if there are enough brokers

_partition_of = lru_cache(maxsize=1 << 12)(partition_of)


class KafkaBus:
    """A process's connection to one Kafka cluster per site. Implements `bus.port.Bus`."""

    name = "kafka"

    def __init__(self, connection: KafkaConnection) -> None:
        self._connection = connection
        self._sites: dict[str, _Site] = {}
        self._beside: dict[str, KafkaBus] = {}  # by servers: buses whose home is another site
        self._is_checked = False  # whether the handshake with the home broker succeeded
        self._counts: dict[str, tuple[float, int]] = {}  # by topic: time of the request, partition count
        self._routes: dict[str, tuple[int, KafkaSender]] = {}  # by topic: partition count, sender
        self._readers: list[KafkaReader] = []
        self._turn = 0
        self._is_open = False
        library = logging.getLogger("aiokafka")
        if library.level < logging.WARNING:  # INFO is verbose, DEBUG prints record contents
            library.setLevel(logging.WARNING)

    def __repr__(self) -> str:
        return f"<KafkaBus {self._connection.client_id} at {self._connection.bootstrap_servers}>"

    @property
    def connection(self) -> KafkaConnection:
        """The settings of the connection."""
        return self._connection

    async def __aenter__(self) -> KafkaBus:
        """Connect to the broker of the control topics; other sites are contacted on first use."""
        await self._connection.check()
        self._is_open = self._is_checked = True
        for other in self._beside.values():  # created before this bus was opened
            other._is_open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._is_open = False
        for other in self._beside.values():
            await other.__aexit__()
        self._beside.clear()
        for reader in list(self._readers):
            await reader.close()
        for site in self._sites.values():
            await site.close()
        self._sites.clear()
        self._routes.clear()

    # --- topics ------------------------------------------------------------------------------------------------------

    def beside(self, topic: str, neighbour: str) -> KafkaBus:
        """A bus whose home is the neighbour's site; it is closed with this one."""
        servers = self._connection.servers_of(topic, beside=neighbour)
        if servers == self._connection.servers_of(topic):
            return self
        other = self._beside.get(servers)
        if other is None:
            there = self._connection.model_copy(update={"bootstrap_servers": servers, "routes": {}})
            other = self._beside[servers] = KafkaBus(there)
            other._is_open = self._is_open
        return other

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        wanted: dict[str, list[TopicSpec]] = defaultdict(list)
        for spec in specs:
            at = [self._connection.servers_of(spec.name, beside=neighbour) for neighbour in (None, *spec.beside)]
            for servers in dict.fromkeys(at):
                wanted[servers].append(spec)
        for servers, there in wanted.items():
            await (await self._site(servers)).create_topics(there)

    async def partitions(self, topic: str) -> int:
        now_s = asyncio.get_running_loop().time()
        asked_s, count = self._counts.get(topic, (float("-inf"), 0))
        if now_s - asked_s > _COUNT_AGE_S:
            self._counts.pop(topic, None)
            site = await self._site(self._connection.servers_of(topic))
            count = await site.partitions(topic)
            self._counts[topic] = (now_s, count)
        return count

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        if names is None:
            return [found for servers in self._connection.sites for found in await (await self._site(servers)).found()]
        asked: dict[str, list[str]] = defaultdict(list)
        for name in names:
            asked[self._connection.servers_of(name)].append(name)
        return [found for servers, there in asked.items() for found in await (await self._site(servers)).found(there)]

    async def prepare_topic(self, topic: str) -> None:
        _, sender = await self._route(topic)
        await sender.prepare_topic(topic)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        count = await self.partitions(topic)
        site = await self._site(self._connection.servers_of(topic))
        return await site.end_offsets(topic, count)

    # --- posting -----------------------------------------------------------------------------------------------------

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        count, sender = self._routes.get(topic) or await self._route(topic)
        if (now := sender.partitions(topic)) is not None and now != count:  # the topic was recreated or extended
            count = now
            self._routes[topic] = (count, sender)
        if partition is None:
            if key is not None:
                partition = _partition_of(key, count)
            else:
                partition = self._turn = (self._turn + 1) % count
        elif not 0 <= partition < count:
            raise BusError(f"{topic} has no partition {partition}: it has {count} partitions")
        key_bytes = None if key is None else key.encode()
        size_bytes = record_bytes(len(value or b""), len(key_bytes or b""), headers)
        if size_bytes > self._connection.max_record_bytes:
            raise MessageTooLargeError(topic, size_bytes, self._connection.max_record_bytes)
        data = value if value is None or type(value) is bytes else bytes(value)
        return await sender.post(topic, partition, key_bytes, data, headers, size_bytes)

    async def send(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Position:
        return await (await self.post(topic, value, key=key, partition=partition, headers=headers))

    # --- reading -----------------------------------------------------------------------------------------------------

    async def reader(
        self, partitions: Iterable[TopicPartition], *, start: Literal["start", "end"] | Mapping[TopicPartition, int]
    ) -> KafkaReader:
        wanted = list(partitions)
        for topic, number in wanted:
            count = await self.partitions(topic)  # assign() on a missing topic would wait without limit
            if not 0 <= number < count:
                raise BusError(f"{topic} has no partition {number}: it has {count} partitions")
        servers = self._one_site(topic for topic, _ in wanted)
        if isinstance(start, str):
            reader = KafkaReader(self._connection, servers, start, dict.fromkeys(wanted, -1))
        else:
            positions = {partition: start.get(partition, -1) for partition in wanted}
            reader = KafkaReader(self._connection, servers, "start", positions)
        await reader.open()
        self._keep(reader)
        return reader

    async def join(
        self,
        topics: Iterable[str],
        *,
        group: str,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
    ) -> KafkaMember:
        names = tuple(topics)
        for topic in names:
            await self.partitions(topic)
        member = KafkaMember(self._connection, self._one_site(names), group, names, on_assigned, on_revoked)
        await member.open()
        self._keep(member)
        return member

    async def abandon(self) -> None:
        """Stop like a killed process: unacknowledged records are lost, groups notice after the session timeout."""
        self._is_open = False
        for other in self._beside.values():
            await other.abandon()
        for reader in self._readers:
            await reader.abandon()
        for site in self._sites.values():
            await site.close()
        self._sites.clear()
        self._routes.clear()

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _route(self, topic: str) -> tuple[int, KafkaSender]:
        """Partition count and sender of a topic."""
        route = self._routes.get(topic)
        if route is None:
            count = await self.partitions(topic)
            route = self._routes[topic] = (count, (await self._site(self._connection.servers_of(topic))).sender)
        return route

    async def _site(self, servers: str) -> _Site:
        if not self._is_open:
            raise BusError("the bus is not open: use it as `async with KafkaBus(...) as bus`")
        site = self._sites.get(servers)
        if site is None:
            if servers != self._connection.bootstrap_servers or not self._is_checked:
                await self._connection.check(servers)
            site = self._sites.setdefault(servers, _Site(self._connection, servers))
        return site

    def _one_site(self, topics: Iterable[str]) -> str:
        servers = sorted({self._connection.servers_of(topic) for topic in topics})
        if len(servers) != 1:
            raise ConfigError(f"one reader cannot read from several sites: {', '.join(servers) or 'none named'}")
        return servers[0]

    def _keep(self, reader: KafkaReader) -> None:
        self._readers = [known for known in self._readers if not known.is_closed]
        self._readers.append(reader)


class _Site:
    """One cluster: its sender, and its clients for topics and offsets."""

    def __init__(self, connection: KafkaConnection, servers: str) -> None:
        self._connection = connection
        self._servers = servers
        self.sender = KafkaSender(connection, servers, self._limit_of)
        self._brokers = Brokers(connection, servers)
        self._asker: AIOKafkaConsumer | None = None  # reads end offsets
        self._starting = asyncio.Lock()

    async def create_topics(self, specs: list[TopicSpec]) -> None:
        async def create(admin: AIOKafkaAdminClient) -> None:
            brokers = len((await admin.describe_cluster())["brokers"])
            copies = self._connection.replication or max(1, min(brokers, _MAX_COPIES))
            made = await _create(admin, specs, copies)
            if any(code == InvalidConfigurationError.errno for _, code, *_ in made):
                made = await _create(admin, specs, copies, older_kafka=True)
            check_created(made, enough_brokers=copies <= max(1, brokers))

        await self._brokers.ask(create, "its topics")
        deadline = asyncio.get_running_loop().time() + FAILOVER_S
        missing = [spec.name for spec in specs]
        while missing:  # a created topic is not known to every broker at once
            known = await self._topics()
            missing = [name for name in missing if name not in known]
            if missing:
                if asyncio.get_running_loop().time() > deadline:
                    raise BusUnavailableError(
                        f"{self._servers} created topics but does not list them: {', '.join(missing)}",
                        remedy="see the logs of the brokers, and try again",
                    )
                await asyncio.sleep(_RETRY_S)

    async def partitions(self, topic: str) -> int:
        """Partition count of a topic. Requests all topics, since requesting one could create it automatically."""
        count = (await self._topics()).get(topic)
        if count is None and self._brokers.are_several:
            await asyncio.sleep(_SPREAD_S)  # some brokers learn about a new topic later
            count = (await self._topics()).get(topic)
        if count is None:
            raise unknown_topic(topic)
        if isinstance(count, BusError):
            raise count
        return count

    async def found(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        return await self._brokers.ask(lambda admin: found_topics(admin, self._servers, names), "its topics")

    async def _limit_of(self, topic: str) -> int | None:
        limits = [int(found.settings.get("max.message.bytes", 0)) for found in await self.found([topic])]
        return limits[0] or None if limits else None

    async def end_offsets(self, topic: str, count: int) -> dict[int, int]:
        asker = await self._started_asker()
        try:
            ends = await end_offsets(asker, [(topic, number) for number in range(count)], patience_s(asker._client))
        except (KafkaError, TimeoutError) as error:
            raise translated(error, topic) from error
        return {number: offset for (_, number), offset in sorted(ends.items())}

    async def close(self) -> None:
        await self.sender.close()
        await self._brokers.close()
        if self._asker is not None:
            await cut_off(self._asker)  # it reads without a consumer group

    async def _topics(self) -> dict[str, int | BusError]:
        """Partition count of every available topic, or the error if this user may not see it."""
        known: dict[str, int | BusError] = {}
        for topic in await self._brokers.ask(lambda admin: admin.describe_topics(), "its topics"):
            error_type = for_code(topic["error_code"])
            if error_type is TopicAuthorizationFailedError:
                known[topic["topic"]] = translated(error_type(), topic["topic"])
            elif topic["error_code"] == 0 and topic["partitions"]:
                known[topic["topic"]] = len(topic["partitions"])
        return known

    async def _started_asker(self) -> AIOKafkaConsumer:
        async with self._starting:
            if self._asker is None:
                settings = self._connection.client_settings(self._servers) | {"enable_auto_commit": False}
                try:
                    self._asker = await started(lambda: AIOKafkaConsumer(**settings), AIOKafkaConsumer.start)
                except (KafkaError, TimeoutError) as error:
                    raise translated(error, self._servers) from error
            return self._asker


async def _create(
    admin: AIOKafkaAdminClient, specs: list[TopicSpec], copies: int, *, older_kafka: bool = False
) -> list[tuple[Any, ...]]:
    """Name, error code and message of each topic."""
    made = await admin.create_topics(
        [
            NewTopic(spec.name, spec.partitions, copies, topic_configs=created_with(spec, older_kafka=older_kafka))
            for spec in specs
        ]
    )
    return list(made.topic_errors)
