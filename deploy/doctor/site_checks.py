"""Site checks of `deepar doctor`: whether the broker of every site answers and has the topics of its site."""

from __future__ import annotations

from collections.abc import Iterable

from bus import topics
from bus.errors import DeeparError, UnknownTopicError
from bus.kafka.bus import KafkaBus, KafkaConnection
from deploy.doctor.machine_checks import Check

_ACTIVATIONS = topics.ACTIVATIONS_EDGE.removesuffix(topics.EDGE_PLACEHOLDER)


async def brokers(connection: KafkaConnection) -> list[Check]:
    """Check that every broker of the main site is reachable, including those that the cluster advertises."""
    wrong = await connection.unreachable()
    if not wrong:
        return [Check("broker", True, f"Kafka at {connection.bootstrap_servers} answers")]
    return _half_down("broker", wrong)


def _half_down(name: str, wrong: Iterable[DeeparError]) -> list[Check]:
    return [Check(name, False, f"{error}; others answer", error.remedy or "check that it runs") for error in wrong]


async def look(bus: KafkaBus) -> list[Check]:
    """Check that the broker of every other site answers and has the topics that this process would use there."""
    checks = []
    connection = bus.connection
    for servers in connection.sites[1:]:
        held = sorted(prefix for prefix, there in connection.routes.items() if there == servers)
        try:
            await connection.check(servers)
            checks += _half_down("site", await connection.unreachable(servers))
            missing = [topic for topic in _kept_at(connection, held) if not await _has(bus, *topic)]
        except DeeparError as error:
            detail = f"{error}; it holds {', '.join(held)}"
            checks.append(Check("site", False, detail, error.remedy or "deepar broker, on a machine of that site"))
            continue
        detail = f"{servers} answers and holds {', '.join(held)}"
        if missing:
            detail = f"{servers} answers, but lacks {', '.join(topic for topic, _ in missing)}"
        checks.append(Check("site", not missing, detail, "start the edge, or: deepar topics create --edge NAME"))
    return checks


def _kept_at(connection: KafkaConnection, held: list[str]) -> list[tuple[str, str]]:
    """The topics of one site that follow from its routes, each with the topic whose site it shares."""
    names = {topic.name for topic in topics.TABLE}
    kept = []
    for name in held:
        is_edge = name not in names and name.startswith(_ACTIVATIONS)
        if is_edge or name in names:
            kept.append((name, name))
        if is_edge and connection.servers_of(topics.RESULTS, beside=name) == connection.servers_of(name):
            kept.append((topics.RESULTS, name))
    return list(dict.fromkeys(kept))


async def _has(bus: KafkaBus, topic: str, neighbour: str) -> bool:
    try:
        await bus.beside(topic, neighbour).partitions(topic)
    except UnknownTopicError:
        return False
    return True
