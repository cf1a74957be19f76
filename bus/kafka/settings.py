"""Topic settings on Kafka: reads them and repairs those that contradict the table of topics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import for_code

from bus import topics
from bus.errors import BusError
from bus.kafka.brokers import Brokers
from bus.kafka.connection import KafkaConnection
from bus.port import FoundTopic
from bus.topic_settings import KEYS, PARTITIONS, Contradiction

_SET_ON_TOPIC = 1  # Kafka's ConfigSource DYNAMIC_TOPIC_CONFIG


async def found_topics(admin: AIOKafkaAdminClient, servers: str, names: Iterable[str] | None) -> list[FoundTopic]:
    """Those of `names` that exist on the cluster; None: all topics of the table. Raises `KafkaError`."""
    wanted = None if names is None else set(names)
    there = {}
    for topic in await admin.describe_topics():
        name = topic["topic"]
        if (
            topic["error_code"] == 0
            and topic["partitions"]
            and (topics.is_ours(name) if wanted is None else name in wanted)
        ):
            there[name] = topic["partitions"]
    settings = await _settings(admin, there)
    return [
        FoundTopic(name, servers, len(partitions), min(len(one["replicas"]) for one in partitions), settings[name])
        for name, partitions in sorted(there.items())
    ]


async def _settings(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The settings of each topic that this user may see."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    asked = [ConfigResource(ConfigResourceType.TOPIC, name, dict.fromkeys(KEYS)) for name in found]
    for response in await admin.describe_configs(asked) if asked else ():
        for code, _message, _kind, name, entries in (tuple(resource) for resource in response.resources):
            if not code:
                found[name] = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
    return found


async def repair(connection: KafkaConnection, wrong: Iterable[Contradiction]) -> None:
    """Set the values that the table of topics requires. Raises `BusError` with the broker's reason."""
    by_site: dict[str, list[Contradiction]] = defaultdict(list)
    for one in wrong:
        by_site[one.servers].append(one)
    for servers, there in by_site.items():
        brokers = Brokers(connection, servers)
        try:
            await brokers.ask(partial(_repair, wrong=there), "its settings")
        finally:
            await brokers.close()


async def _repair(admin: AIOKafkaAdminClient, wrong: Iterable[Contradiction]) -> None:
    settings: dict[str, dict[str, str]] = defaultdict(dict)
    counts = {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics()}
    for one in wrong:
        if one.key == PARTITIONS:
            if counts.get(one.topic) != int(one.repair):  # else an earlier, slow attempt has done it
                await admin.create_partitions({one.topic: NewPartitions(int(one.repair))})
        else:
            settings[one.topic][one.key] = one.repair
    if not settings:
        return
    # The request replaces all settings of a topic, so it includes the existing ones.
    responses = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in settings])
    for response in responses:
        for code, message, _kind, name, entries in (tuple(resource) for resource in response.resources):
            if code:
                raise BusError(f"cannot read the settings of {name}: {message or for_code(code).__name__}")
            kept = {entry[0]: entry[1] for entry in entries if entry[3] == _SET_ON_TOPIC}
            settings[name] = kept | settings[name]
    altered = await admin.alter_configs(
        [ConfigResource(ConfigResourceType.TOPIC, name, values) for name, values in settings.items()]
    )
    for response in altered:
        for code, message, _kind, name in (tuple(resource) for resource in response.resources):
            if code:
                raise BusError(f"{name} cannot be repaired: {message or for_code(code).__name__}")
