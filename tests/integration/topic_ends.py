"""What stands on one broker, whatever the routes say: for tests of several sites."""

from __future__ import annotations

from bus import topics
from bus.errors import UnknownTopicError
from bus.kafka.bus import KafkaBus, KafkaConnection


async def topic_ends(bootstrap: str, edges: list[str]) -> dict[str, int]:
    """How many records ever stood on each of our topics that this broker has."""
    found = {}
    async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
        for spec in topics.specs(edges):
            try:
                found[spec.name] = sum((await bus.end_offsets(spec.name)).values())
            except UnknownTopicError:
                continue
    return found


def held_by_site(edge_site: dict[str, int], cloud_site: dict[str, int], edge: str) -> None:
    """Assert that what goes to the edge and what comes back through it is at its site only, and the rest at the cloud's."""
    assert edge_site.keys() == {topics.activations_topic(edge), topics.RESULTS}
    assert min(edge_site.values()) > 0, edge_site
    assert topics.activations_topic(edge) not in cloud_site
    assert cloud_site[topics.ACTIVATIONS_CLOUD] > 0, cloud_site
    assert cloud_site[topics.RESULTS] == 0  # there for tasks through edges without a broker of their own
