"""Table of topics, from which topic creation, subscriptions, ACLs, the documentation and the AsyncAPI document are derived.

A *region* is a partition of the control topics, with its planner, edges and devices. Topic names contain dots but no
underscores, since brokers confuse the two in metric names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from aiokafka.partitioner import murmur2

EDGE_PLACEHOLDER = "<edge>"

NODES = "deepar.nodes"
TASKS = "deepar.tasks"
DECISIONS = "deepar.decisions"
SNAPSHOTS = "deepar.snapshots"
EVENTS = "deepar.events"
ACTIVATIONS_EDGE = f"deepar.activations.{EDGE_PLACEHOLDER}"
ACTIVATIONS_CLOUD = "deepar.activations.cloud"
RESULTS = "deepar.results"
DEAD_LETTER = "deepar.dead-letter"

CLOUD_GROUP = "deepar.cloud"
"""The consumer group that all cloud stages join."""

RESERVED_EDGE_NAMES = frozenset({"cloud"})
"""An edge of this name would use the cloud's topic."""


class Encoding(StrEnum):
    """How a topic's records are encoded."""

    JSON = "JSON"
    MSGPACK = "msgpack frames"
    ORIGINAL = "original bytes, origin and error in headers"


class PartitionBy(StrEnum):
    """How the partition of a record is chosen."""

    REGION = "region"
    KEY = "hash of the key"


@dataclass(frozen=True, slots=True)
class Topic:
    """One row of the table."""

    name: str  # may contain EDGE_PLACEHOLDER
    encoding: Encoding
    messages: tuple[str, ...]  # class names in bus.messages, or bus.frames
    key: str  # meaning of the record's key
    partition_by: PartitionBy
    writers: tuple[str, ...]  # roles
    readers: tuple[str, ...]  # roles
    purpose: str  # one line for people
    compacted: bool = False  # keep the last record of each key without limit
    retention_s: int = 7 * 24 * 3600  # retention time, if not compacted; -1: no limit
    retention_bytes: int = -1  # retention size per partition; -1: no limit
    beside: str = ""  # a topic: this one is created at every site that holds it


TABLE: tuple[Topic, ...] = (
    Topic(NODES, Encoding.JSON, ("NodeAnnounced", "NodeLeft"), "node", PartitionBy.REGION,
          ("device", "edge", "cloud"), ("planner", "loadgen", "tools"), "who is there, and how fast", compacted=True),
    Topic(TASKS, Encoding.JSON, ("TaskSubmitted", "TaskCancelled"), "task", PartitionBy.REGION,
          ("device", "loadgen"), ("planner", "tools"), "what is to be done"),
    Topic(DECISIONS, Encoding.JSON, ("EpochOpened", "PlannerHeartbeat", "PlannerLeft", "DecisionPart", "Decision"),
          "region", PartitionBy.REGION, ("planner",), ("planner", "device", "edge", "cloud", "loadgen", "tools"),
          "the planner's truth: placements, grants, starts, ends", retention_s=-1),
    Topic(SNAPSHOTS, Encoding.JSON, ("Snapshot", "SnapshotPart"), "region, place and part", PartitionBy.REGION,
          ("planner",), ("planner", "device", "edge", "cloud", "loadgen", "tools"), "where a restart begins to read",
          compacted=True),
    Topic(EVENTS, Encoding.JSON, ("NodeHeartbeat", "TaskProgress", "TaskCompleted", "TaskFailed"), "task or node",
          PartitionBy.REGION, ("device", "edge", "cloud"), ("planner", "loadgen", "tools"), "what happened"),
    Topic(ACTIVATIONS_EDGE, Encoding.MSGPACK, ("Frame",), "task", PartitionBy.KEY,
          ("device", "cloud"), ("edge",), "activations, and the plan with them, to one edge; the cloud echoes probes",
          retention_s=3600, retention_bytes=4 << 30),
    Topic(ACTIVATIONS_CLOUD, Encoding.MSGPACK, ("Frame",), "task", PartitionBy.KEY,
          ("edge",), ("cloud",), "activations to the cloud stages, one consumer group", retention_s=3600,
          retention_bytes=4 << 30),
    Topic(RESULTS, Encoding.MSGPACK, ("Frame",), "device", PartitionBy.KEY,
          ("edge", "cloud"), ("device",), "results, and what was measured", retention_s=3600, retention_bytes=4 << 30,
          beside=ACTIVATIONS_EDGE),
    Topic(DEAD_LETTER, Encoding.ORIGINAL, (), "origin", PartitionBy.KEY,
          ("planner", "device", "edge", "cloud"), ("tools",), "what could not be read, for people",
          retention_s=30 * 24 * 3600),
)  # fmt: skip

CONTROL_TOPICS = tuple(topic.name for topic in TABLE if topic.encoding is Encoding.JSON)

SIGNED_TOPICS = tuple(
    topic.name for topic in TABLE if topic.encoding is Encoding.JSON and topic.writers != ("planner",)
)
"""Control topics written by other roles than the planner; `bus.identity` signs and checks the records on them."""


@dataclass(frozen=True, slots=True)
class Partitions:
    """Partition counts of the topics, fixed at creation."""

    regions: int = 1  # of the control topics
    activations: int = 1  # of each edge's topic: an edge is one process
    cloud: int = 8  # maximum number of cloud stages that share the work
    results: int = 4
    dead_letter: int = 1


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to create: a row of the table with its placeholder replaced and its partition count."""

    name: str
    partitions: int
    compacted: bool = False
    retention_s: int = -1
    retention_bytes: int = -1
    beside: tuple[str, ...] = ()  # topics at whose sites it is created too


def activations_topic(edge: str) -> str:
    """The topic on which `edge` receives activations. Raises ValueError for a reserved name."""
    if edge in RESERVED_EDGE_NAMES:
        raise ValueError(f"an edge cannot be named {edge!r}: the name is reserved for a topic")
    return ACTIVATIONS_EDGE.replace(EDGE_PLACEHOLDER, edge)


def row(name: str) -> Topic:
    """The row of the table for a topic, including the topics of edges. Raises KeyError."""
    for topic in TABLE:
        if topic.name == name:
            return topic
    if name.startswith("deepar.activations."):
        return next(topic for topic in TABLE if topic.name == ACTIVATIONS_EDGE)
    raise KeyError(name)


def is_ours(name: str) -> bool:
    """Whether the table contains this topic, including the topics of edges."""
    return name.startswith("deepar.activations.") or any(topic.name == name for topic in TABLE)


def specs(edges: Iterable[str] = (), partitions: Partitions | None = None) -> list[TopicSpec]:
    """Every topic that a system with these edges needs."""
    edges = tuple(edges)
    partitions = partitions or Partitions()
    counts = {
        ACTIVATIONS_EDGE: partitions.activations,
        ACTIVATIONS_CLOUD: partitions.cloud,
        RESULTS: partitions.results,
        DEAD_LETTER: partitions.dead_letter,
    }
    wanted = []
    for topic in TABLE:
        names = [activations_topic(edge) for edge in edges] if topic.name == ACTIVATIONS_EDGE else [topic.name]
        count = counts.get(topic.name, partitions.regions)
        beside = tuple(activations_topic(edge) for edge in edges) if topic.beside else ()
        wanted += [
            TopicSpec(name, count, topic.compacted, topic.retention_s, topic.retention_bytes, beside) for name in names
        ]
    return wanted


def partition_of(key: str, partitions: int) -> int:
    """The partition for `key`, chosen like Kafka's default partitioner (murmur2) so that other clients agree."""
    return int((murmur2(key.encode()) & 0x7FFFFFFF) % partitions)
