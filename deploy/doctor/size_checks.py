"""Record size checks of `deepar doctor`: topics, brokers, producer and consumers must agree on the maximum size."""

from __future__ import annotations

from collections.abc import Iterable

from bus import topics
from bus.errors import BusError
from bus.kafka.connection import KafkaConnection
from bus.kafka.limits import BrokerLimits, SiteLimits, read_limits
from bus.kafka.readers import FETCH_BYTES
from bus.topic_settings import needed_bytes
from deploy.doctor.machine_checks import Check

NAME = "sizes"
NEEDED_BYTES = max(needed_bytes(topic.name) for topic in topics.TABLE)


async def look(connection: KafkaConnection) -> list[Check]:
    """Read the limits from the brokers and compare them. A broker that does not answer becomes a failed check."""
    try:
        sites = await read_limits(connection, "deepar.")
    except BusError as error:
        return [Check(NAME, False, str(error), error.remedy or "check that the broker answers, then run this again")]
    return compare(sites, producer_bytes=connection.max_record_bytes, consumer_bytes=FETCH_BYTES)


def compare(sites: Iterable[SiteLimits], *, producer_bytes: int, consumer_bytes: int) -> list[Check]:
    """One failed check per disagreement, or a single passed check.

    `producer_bytes` is the largest record that our producer accepts, `consumer_bytes` the size of one fetch per partition.
    """
    bad: list[Check] = []
    if producer_bytes < NEEDED_BYTES:
        bad.append(
            Check(
                NAME,
                False,
                f"our producer refuses records over {producer_bytes:,} bytes, a frame takes up to {NEEDED_BYTES:,}",
                f"raise max_record_bytes of the connection to {NEEDED_BYTES:,} or more",
            )
        )
    if producer_bytes > consumer_bytes:
        bad.append(
            Check(
                NAME,
                False,
                f"our producer sends records up to {producer_bytes:,} bytes, our consumers fetch {consumer_bytes:,}",
                "lower max_record_bytes of the connection",
            )
        )
    least, seen = producer_bytes, 0
    hidden: list[str] = []
    for site in sites:
        hidden += site.hidden
        for name, limit_bytes in site.topics.items():
            seen += 1
            least = min(least, limit_bytes)
            bad += _topic(site.servers, name, limit_bytes, consumer_bytes)
        for broker in site.brokers:
            bad += _broker(site.servers, broker, producer_bytes)
    if bad:
        return bad
    detail = (
        f"records up to {NEEDED_BYTES:,} bytes fit our producer ({producer_bytes:,}), {seen} topics (the least takes "
        f"{least:,}), their brokers, and our consumers ({consumer_bytes:,} a fetch)"
    )
    if hidden:
        detail += f"; not checked, this user lacks the permission DescribeConfigs: {', '.join(hidden)}"
    return [Check(NAME, True, detail)]


def _topic(servers: str, name: str, limit_bytes: int, consumer_bytes: int) -> Iterable[Check]:
    needed = needed_bytes(name)
    change = f"kafka-configs.sh --bootstrap-server {servers} --entity-type topics --entity-name {name} --alter"
    if limit_bytes < needed:
        yield Check(
            NAME,
            False,
            f"{name} refuses records over {limit_bytes:,} bytes (max.message.bytes), we send up to {needed:,}",
            f"{change} --add-config max.message.bytes={NEEDED_BYTES}",
        )
    if limit_bytes > consumer_bytes:
        yield Check(
            NAME,
            False,
            f"{name} takes records up to {limit_bytes:,} bytes (max.message.bytes), our consumers fetch {consumer_bytes:,}",
            f"{change} --add-config max.message.bytes={NEEDED_BYTES}",
        )


def _broker(servers: str, broker: BrokerLimits, producer_bytes: int) -> Iterable[Check]:
    held = (
        ("message.max.bytes", broker.message_max_bytes, NEEDED_BYTES, "new topics there refuse our frames"),
        ("replica.fetch.max.bytes", broker.replica_fetch_max_bytes, NEEDED_BYTES, "its copies of our frames lag"),
        (
            "socket.request.max.bytes",
            broker.socket_request_max_bytes,
            producer_bytes,
            "it closes the connection of our producer",
        ),
    )
    for key, value_bytes, least_bytes, so in held:
        if value_bytes < least_bytes:
            yield Check(
                NAME,
                False,
                f"broker {broker.node} at {servers} has {key}={value_bytes:,}, records take up to {least_bytes:,}: {so}",
                f"set {key}={max(least_bytes, NEEDED_BYTES)} or more in its server.properties",
            )
