"""Whether topics, brokers, producer and consumers agree on how large a record may be."""

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
    """Ask the brokers and compare. Raises nothing: what cannot be asked is said."""
    try:
        sites = await read_limits(connection, "deepar.")
    except BusError as error:
        return [Check(NAME, False, str(error), error.remedy or "see that the broker answers, and ask again")]
    return compare(sites, producer_bytes=connection.max_record_bytes, consumer_bytes=FETCH_BYTES)


def compare(sites: Iterable[SiteLimits], *, producer_bytes: int, consumer_bytes: int) -> list[Check]:
    """One check a disagreement, or one that says that there is none.

    `producer_bytes` is the largest record that our producer lets through, `consumer_bytes` what our consumers fetch of one
    partition at once.
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
        detail += f"; not looked at, this user may not (DescribeConfigs): {', '.join(hidden)}"
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
        ("socket.request.max.bytes", broker.socket_request_max_bytes, producer_bytes, "it hangs up on our producer"),
    )
    for key, value_bytes, least_bytes, so in held:
        if value_bytes < least_bytes:
            yield Check(
                NAME,
                False,
                f"broker {broker.node} at {servers} has {key}={value_bytes:,}, records take up to {least_bytes:,}: {so}",
                f"set {key}={max(least_bytes, NEEDED_BYTES)} or more in its server.properties",
            )
