"""Required topic settings, derived from the table of topics, and the commands that repair wrong settings.

Topic creation, the check at the start of a service, `deepar doctor` and `deepar topics repair` use these rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from bus import topics
from bus.dead_letter import DEAD_LETTER_VALUE_BYTES
from bus.errors import ConfigError
from bus.frames import MAX_FRAME_BYTES
from bus.limits import record_bytes
from bus.messages import MAX_MESSAGE_BYTES
from bus.port import FoundTopic
from bus.topics import Encoding, Topic, TopicSpec

PARTITIONS = "partitions"
"""Key of the partition count, used beside Kafka's names of settings."""

KEY_BYTES = 200
"""Maximum length of a record's key."""
HEADERS_BYTES = 2048
"""Upper bound for the headers of our records."""
READABLE_COMPRESSION = ("producer", "uncompressed", "gzip")
"""Compression that all our clients can read; other codecs need libraries that may not be installed."""
ANY_TIME_MS = (1 << 63) - 1
LEAST_SEGMENT_MS = 60_000
"""Minimum `segment.ms`: with shorter segments a broker runs out of open files."""

CLOCKS_SEEN_ON = (topics.EVENTS,)
"""Topics with retention whose records keep the sender's timestamp: `deepar doctor` sees the nodes' clocks in heartbeats."""

REPAIR = "deepar topics repair"


class Judged(Enum):
    """How a value is compared with the required one."""

    EXACTLY = "exactly"
    AT_LEAST = "at least"  # -1: no limit
    ONE_OF = "one of"


@dataclass(frozen=True, slots=True)
class Rule:
    """A required setting of a topic."""

    key: str  # Kafka's name
    needed: tuple[str, ...]  # allowed values; a repair sets the first
    judged: Judged
    why: str  # consequence of a wrong value
    fatal: bool = True  # True: services do not start; False: `deepar doctor` warns

    def holds(self, value: str) -> bool:
        """Whether the value satisfies the rule."""
        if self.judged is not Judged.AT_LEAST:
            return value in self.needed
        return _limit(value) >= _limit(self.needed[0])

    def __str__(self) -> str:
        return {
            Judged.EXACTLY: self.needed[0],
            Judged.AT_LEAST: self.needed[0] if self.needed[0] == "-1" else f"{self.needed[0]} or more",
            Judged.ONE_OF: f"one of {', '.join(self.needed)}",
        }[self.judged]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A setting of a topic that contradicts the table of topics."""

    servers: str  # bootstrap servers of the cluster
    topic: str
    key: str  # Kafka's name of the setting, or `PARTITIONS`
    found: str
    needed: str  # description for people
    repair: str  # the value that a repair sets
    why: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.topic} has {self.key}={self.found}, required is {self.needed}: {self.why}"

    @property
    def command(self) -> str:
        """The command of Kafka's tools that repairs it."""
        if self.key == PARTITIONS:
            return (
                f"kafka-topics.sh --bootstrap-server {self.servers} --alter --topic {self.topic}"
                f" --partitions {self.repair}"
            )
        return (
            f"kafka-configs.sh --bootstrap-server {self.servers} --alter --entity-type topics"
            f" --entity-name {self.topic} --add-config {self.key}={self.repair}"
        )


def needed_bytes(topic: str) -> int:
    """Size of the largest record that DeePar writes to a topic, as Kafka computes it."""
    value_bytes = {
        Encoding.MSGPACK: MAX_FRAME_BYTES,
        Encoding.JSON: MAX_MESSAGE_BYTES,
        Encoding.ORIGINAL: DEAD_LETTER_VALUE_BYTES,
    }[topics.row(topic).encoding]
    return record_bytes(value_bytes, KEY_BYTES, ()) + HEADERS_BYTES


def rules(topic: str) -> list[Rule]:
    """The required settings of a topic. Raises KeyError for a topic outside the table."""
    row = topics.row(topic)
    size = str(needed_bytes(topic))
    return [
        *_keeping(row),
        Rule("max.message.bytes", (size,), Judged.AT_LEAST, "the broker rejects our largest records"),
        Rule("segment.bytes", (size,), Judged.AT_LEAST, "a record must fit into one file"),
        Rule("compression.type", READABLE_COMPRESSION, Judged.ONE_OF, "our consumers cannot read other codecs"),
        Rule(
            "segment.ms",
            (str(LEAST_SEGMENT_MS),),
            Judged.AT_LEAST,
            "the broker runs out of open files",
            fatal=False,
        ),
        Rule(
            "message.timestamp.after.max.ms",
            (str(ANY_TIME_MS),),
            Judged.AT_LEAST,
            "the broker rejects records of a machine whose clock is further ahead",
            fatal=False,
        ),
        _stamped(row),
    ]


def _stamped(row: Topic) -> Rule:
    """Which clock timestamps records: it determines their deletion, and shows `deepar doctor` which clock is wrong."""
    key, seen = "message.timestamp.type", row.name in CLOCKS_SEEN_ON
    if row.compacted or row.retention_s < 0 or seen:
        why = "deepar doctor cannot tell which clock is wrong"
        return Rule(key, ("CreateTime",), Judged.EXACTLY, why, fatal=False)
    why = "records of a machine whose clock is behind are deleted at once"
    return Rule(key, ("LogAppendTime",), Judged.EXACTLY, why, fatal=False)


def _keeping(row: Topic) -> list[Rule]:
    """The rules for retention."""
    lost = "records are deleted that are still needed"
    policy = "compact" if row.compacted else "delete"
    kept = [Rule("cleanup.policy", (policy,), Judged.EXACTLY, lost)]
    if not row.compacted:
        kept.append(Rule("retention.ms", (str(_retention_ms(row.retention_s)),), Judged.AT_LEAST, lost))
        kept.append(Rule("retention.bytes", (str(row.retention_bytes),), Judged.AT_LEAST, lost))
    return kept


def created_with(spec: TopicSpec, *, older_kafka: bool = False) -> dict[str, str]:
    """The settings of a new topic. `older_kafka`: without settings that need Kafka 3.6 or newer."""
    stamped = _stamped(topics.row(spec.name)).needed[0] if topics.is_ours(spec.name) else "CreateTime"
    settings = {"message.timestamp.type": stamped}
    if not older_kafka:
        settings["message.timestamp.after.max.ms"] = str(ANY_TIME_MS)
    if spec.compacted:
        return settings | {"cleanup.policy": "compact"}
    return settings | {
        "cleanup.policy": "delete",
        "retention.ms": str(_retention_ms(spec.retention_s)),
        "retention.bytes": str(spec.retention_bytes),
    }


def _retention_ms(retention_s: int) -> int:
    return retention_s * 1000 if retention_s >= 0 else -1


KEYS = (*dict.fromkeys(rule.key for row in topics.TABLE for rule in rules(row.name)), "min.insync.replicas")
"""Names of the settings that are read for every topic."""


def contradictions(found: Iterable[FoundTopic]) -> list[Contradiction]:
    """The wrong settings of topics of the table. Settings that this user may not see count as correct."""
    known = [topic for topic in found if topics.is_ours(topic.name)]
    wrong = []
    for topic in known:
        for rule in rules(topic.name):
            value = topic.settings.get(rule.key)
            if value is not None and not rule.holds(value):
                wrong.append(
                    Contradiction(
                        topic.servers, topic.name, rule.key, value, str(rule), rule.needed[0], rule.why, rule.fatal
                    )
                )
        wrong += _insync(topic)
    return [*wrong, *_regions(known)]


def _insync(topic: FoundTopic) -> Iterable[Contradiction]:
    """A `min.insync.replicas` above the replica count, with which brokers before Kafka 4 reject every record."""
    value = topic.settings.get("min.insync.replicas")
    if value is not None and int(value) > topic.copies:
        needed, why = f"at most {topic.copies} (its copies)", "brokers before Kafka 4 reject every record"
        copies = str(topic.copies)
        yield Contradiction(topic.servers, topic.name, "min.insync.replicas", value, needed, copies, why, False)


def _regions(found: Iterable[FoundTopic]) -> Iterable[Contradiction]:
    """A region is a partition of every control topic, so all must have as many; partitions can only be added."""
    control = [topic for topic in found if topic.name in topics.CONTROL_TOPICS]
    regions = max((topic.partitions for topic in control), default=0)
    for topic in control:
        if topic.partitions < regions:
            most = next(other.name for other in control if other.partitions == regions)
            needed, why = f"{regions}, as {most} has", "a region is one partition of every control topic"
            yield Contradiction(
                topic.servers, topic.name, PARTITIONS, str(topic.partitions), needed, str(regions), why, True
            )


def require(found: Iterable[FoundTopic]) -> None:
    """Raises `ConfigError` where settings contradict the table so that records would be lost or refused."""
    wrong = [one for one in contradictions(found) if one.fatal]
    if wrong:
        raise ConfigError(
            "; ".join(map(str, wrong)), remedy="\n  ".join([f"{REPAIR}, or:", *(one.command for one in wrong)])
        )


def _limit(value: str) -> float:
    """A limit as a number; infinity for -1."""
    number = int(value)
    return float("inf") if number == -1 else number


__all__ = [
    "KEYS",
    "PARTITIONS",
    "Contradiction",
    "Rule",
    "contradictions",
    "created_with",
    "needed_bytes",
    "require",
    "rules",
]
