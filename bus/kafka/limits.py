"""Record size limits of Kafka's brokers and topics, read for `deepar doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from bus.kafka.brokers import Brokers
from bus.kafka.connection import KafkaConnection, address_of

_WHAT = "its limits"
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
        brokers = Brokers(connection, servers)
        try:
            found.append(await _site(brokers, servers, prefix))
        finally:
            await brokers.close()
    return found


async def _site(brokers: Brokers, servers: str, prefix: str) -> SiteLimits:
    names = sorted(
        name for name in await brokers.ask(lambda admin: admin.list_topics(), _WHAT) if name.startswith(prefix)
    )
    wanted = [ConfigResource(ConfigResourceType.TOPIC, name, {_TOPIC_KEY: None}) for name in names]
    responses = list(await brokers.ask(lambda admin: admin.describe_configs(wanted), _WHAT))
    cluster = await brokers.ask(lambda admin: admin.describe_cluster(), _WHAT)
    for broker in sorted(cluster["brokers"], key=itemgetter("node_id")):
        own = [ConfigResource(ConfigResourceType.BROKER, str(broker["node_id"]), dict.fromkeys(_BROKER_KEYS))]
        at = address_of(broker["host"], broker["port"])
        responses += await brokers.ask(
            partial(AIOKafkaAdminClient.describe_configs, config_resources=own), _WHAT, at=at
        )
    topics: dict[str, int] = {}
    limits: list[BrokerLimits] = []
    hidden: list[str] = []
    for response in responses:
        for code, _message, kind, name, entries in (tuple(resource) for resource in response.resources):
            values = {entry[0]: entry[1] for entry in entries}
            if code:
                hidden.append(name if kind == ConfigResourceType.TOPIC else f"broker {name}")
            elif kind == ConfigResourceType.TOPIC:
                topics[name] = int(values[_TOPIC_KEY])
            else:
                limits.append(_broker(int(name), values))
    return SiteLimits(servers, dict(sorted(topics.items())), tuple(limits), tuple(hidden))


def _broker(node: int, values: Mapping[str, Any]) -> BrokerLimits:
    message, replica, request = (int(values[key]) for key in _BROKER_KEYS)
    return BrokerLimits(node, message, replica, request)
