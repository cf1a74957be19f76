"""Topic checks of `deepar doctor`: whether the topics exist and have the settings of the table of topics."""

from __future__ import annotations

from bus import topic_settings, topics
from bus.errors import UnknownTopicError
from bus.port import Bus
from bus.topic_settings import REPAIR
from deploy.doctor.machine_checks import Check

NAME = "topics"
CHECKED_BY_SIZE_CHECKS = "max.message.bytes"
"""Setting that `size_checks` checks, because it also depends on brokers, producer and consumers."""


async def missing(bus: Bus) -> list[Check]:
    """Check that the topics of the table exist; each edge creates its own topic."""
    gone = []
    for spec in topics.specs():
        try:
            await bus.partitions(spec.name)
        except UnknownTopicError:
            gone.append(spec.name)
    if gone:
        return [Check(NAME, False, f"missing: {', '.join(gone)}", "deepar topics create")]
    return [Check(NAME, True, "all there")]


async def settings(bus: Bus) -> list[Check]:
    """Check retention, record types and partition counts of the topics."""
    found = await bus.found_topics()
    wrong = [one for one in topic_settings.contradictions(found) if one.key != CHECKED_BY_SIZE_CHECKS]
    if wrong:
        return [
            Check(NAME, not one.fatal, str(one), f"{REPAIR}, or: {one.command}", warning=not one.fatal) for one in wrong
        ]
    hidden = [topic.name for topic in found if not topic.settings]
    detail = f"{len(found)} topics have the required settings"
    if hidden:
        detail += f"; not checked, this user lacks the permission DescribeConfigs: {', '.join(hidden)}"
    return [Check(NAME, True, detail)]
