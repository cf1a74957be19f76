"""What `deepar doctor` looks at in the topics: whether they are there, and set as the table of topics says."""

from __future__ import annotations

from bus import topic_settings, topics
from bus.errors import UnknownTopicError
from bus.port import Bus
from bus.topic_settings import REPAIR
from deploy.doctor.machine_checks import Check

NAME = "topics"
JUDGED_ELSEWHERE = "max.message.bytes"
"""`size_checks` compares it with brokers, producer and consumers, too."""


async def missing(bus: Bus) -> list[Check]:
    """Whether the topics of the table are there (those of edges are made by the edges)."""
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
    """Whether they keep what they must, take what we send, and have a partition for every region."""
    found = await bus.found_topics()
    wrong = [one for one in topic_settings.contradictions(found) if one.key != JUDGED_ELSEWHERE]
    if wrong:
        return [
            Check(NAME, not one.fatal, str(one), f"{REPAIR}, or: {one.command}", warning=not one.fatal) for one in wrong
        ]
    hidden = [topic.name for topic in found if not topic.settings]
    detail = f"{len(found)} are set as the table of topics says"
    if hidden:
        detail += f"; not looked at, this user may not (DescribeConfigs): {', '.join(hidden)}"
    return [Check(NAME, True, detail)]
