"""Record size limits of Kafka's brokers and topics, read for `deepar doctor`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from bus.errors import BusUnavailableError
from bus.kafka.connection import KafkaConnection, hang_up

_REQUEST_S = 5.0
_TOPIC_KEY = "max.message.bytes"
_BROKER_KEYS = ("message.max.bytes", "replica.fetch.max.bytes", "socket.request.max.bytes")


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """One broker's limits, bytes."""

    node: int
    message_max_bytes: int  # default for topics without their own limit
    replica_fetch_max_bytes: int  # fetch size of a follower replica per partition
    socket_request_max_bytes: int  # largest request that the broker accepts


@dataclass(frozen=True, slots=True)
class SiteLimits:
    """The limits of one Kafka cluster."""

    servers: str
    topics: Mapping[str, int]  # topic -> largest record batch in bytes, its own or the broker's default
    brokers: tuple[BrokerLimits, ...]
    hidden: tuple[str, ...]  # topics and brokers whose settings this user may not read


async def read_limits(connection: KafkaConnection, prefix: str) -> list[SiteLimits]:
    """The limits of every topic below `prefix`, and of the brokers that hold them. Raises `BusUnavailableError`."""
    found = []
    for servers in connection.sites:
        admin = AIOKafkaAdminClient(**connection.client_settings(servers))
        try:
            async with asyncio.timeout(2 * _REQUEST_S):
                await admin.start()
                names = sorted(name for name in await admin.list_topics() if name.startswith(prefix))
                found.append(await _site(admin, servers, names))
        except (KafkaError, TimeoutError) as error:
            raise BusUnavailableError(f"{servers} does not tell its limits: {error!r}") from error
        finally:
            await hang_up(admin._client)
    return found


async def _site(admin: AIOKafkaAdminClient, servers: str, names: Iterable[str]) -> SiteLimits:
    nodes = sorted(int(broker["node_id"]) for broker in (await admin.describe_cluster())["brokers"])
    wanted = [ConfigResource(ConfigResourceType.TOPIC, name, {_TOPIC_KEY: None}) for name in names]
    wanted += [ConfigResource(ConfigResourceType.BROKER, str(node), dict.fromkeys(_BROKER_KEYS)) for node in nodes]
    topics: dict[str, int] = {}
    brokers: list[BrokerLimits] = []
    hidden: list[str] = []
    for response in await admin.describe_configs(wanted):
        for code, _message, kind, name, entries in (tuple(resource) for resource in response.resources):
            values = {entry[0]: entry[1] for entry in entries}
            if code:
                hidden.append(name if kind == ConfigResourceType.TOPIC else f"broker {name}")
            elif kind == ConfigResourceType.TOPIC:
                topics[name] = int(values[_TOPIC_KEY])
            else:
                brokers.append(_broker(int(name), values))
    return SiteLimits(servers, dict(sorted(topics.items())), tuple(brokers), tuple(hidden))


def _broker(node: int, values: Mapping[str, Any]) -> BrokerLimits:
    message, replica, request = (int(values[key]) for key in _BROKER_KEYS)
    return BrokerLimits(node, message, replica, request)
