"""Authorization table: which role may send which message for which node.

Kafka's access control decides which role writes to a topic; this table decides which nodes and tasks a sender may name in
its messages. In a region that requires proofs (`bus.identity.keys`) the planner checks it before it applies a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus import topics
from bus.identity.keys import Speaker, refused
from bus.messages import NodeAnnounced, TaskFailed
from bus.port import Record

STAGES: Final = ("device", "edge", "cloud")


@dataclass(frozen=True, slots=True)
class AuthorizationRule:
    """One row of the table: the field of a message that names a node, and the roles that may fill it."""

    message: str  # class name in bus.messages
    node: str | None  # the field that names the node; None: the message names only a task
    itself: tuple[str, ...]  # roles that may name only their own node
    others: tuple[str, ...] = ()  # roles that may name any node
    task: tuple[str, ...] | None = None  # roles whose node must take part in the named task; None: not checked


TABLE: Final = (
    AuthorizationRule("NodeAnnounced", "node", itself=STAGES),  # the announced role must also be the sender's
    AuthorizationRule("NodeLeft", "node", itself=STAGES),
    AuthorizationRule("NodeHeartbeat", "node", itself=STAGES),
    AuthorizationRule("TaskSubmitted", "device", itself=("device",), others=("loadgen",)),
    AuthorizationRule("TaskCancelled", None, itself=("device",), others=("loadgen",), task=("device",)),
    AuthorizationRule("TaskProgress", "node", itself=("device",), task=("device",)),
    AuthorizationRule("TaskCompleted", "node", itself=("device",), task=("device",)),
    AuthorizationRule("TaskFailed", "node", itself=STAGES, task=STAGES),
)

BY_MESSAGE: Final = {rule.message: rule for rule in TABLE}


@dataclass(frozen=True, slots=True)
class Parties:
    """The nodes that take part in a live task."""

    device: str
    attempt: int
    edge: str | None  # of the current attempt
    cloud: bool  # whether the cloud computes in it; every cloud worker then takes part


def check(speaker: Speaker, record: Record, message: object, parties: Parties | None) -> None:
    """Check that an authenticated speaker may send a message. `parties`: of the task it names, None if that is not live.

    Raises `ProtocolError` (`wrong_identity`) that says what the speaker may not do; KeyError for a message without a row.
    """
    rule = BY_MESSAGE[type(message).__name__]
    what = str(getattr(message, "type"))  # noqa: B009  # every message has one
    free = speaker.role in rule.others
    if not free and speaker.role not in rule.itself:
        raise refused(f"{speaker} may send no {what}")
    node = getattr(message, rule.node) if rule.node is not None else speaker.name
    if not free and node != speaker.name:
        raise refused(f"{speaker} speaks as {node} in a {what}")
    if isinstance(message, NodeAnnounced) and message.role.value != speaker.role:
        raise refused(f"{speaker} announces itself as {message.role.value}")
    if topics.row(record.topic).compacted and record.key != node:
        raise refused(f"{speaker} writes a {what} under the key {record.key}, and only the last of a key is kept")
    if free or rule.task is None or parties is None:
        return
    if not _takes_part(speaker, message, parties):
        raise refused(f"{speaker} sends a {what} of {getattr(message, 'task_id', '?')}, in which it has no part")


def _takes_part(speaker: Speaker, message: object, parties: Parties) -> bool:
    if speaker.role == "device":
        return speaker.name == parties.device
    if isinstance(message, TaskFailed) and message.attempt != parties.attempt:
        return True  # a late report of an earlier attempt: the core ignores it
    return parties.cloud if speaker.role == "cloud" else speaker.name == parties.edge


__all__ = ["BY_MESSAGE", "TABLE", "AuthorizationRule", "Parties", "check"]
