"""What a message claims, and who may claim it: one table beside that of the topics.

Kafka lets a role write to a topic; this table says for whom a member of that role may speak there. It is looked at where a
region demands proofs (`bus.identity.keys`), by the planner, before a message changes anything.
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
class Claim:
    """One row: which field of a message names a node, and who may name whom in it."""

    message: str  # class name in bus.messages
    node: str | None  # the field that names whom it speaks for; None: it speaks of a task only
    itself: tuple[str, ...]  # roles that may speak for the node of their own name
    others: tuple[str, ...] = ()  # roles that may speak for every node
    task: tuple[str, ...] | None = None  # roles whose node must take part in the task named; None: no task is touched


TABLE: Final = (
    Claim("NodeAnnounced", "node", itself=STAGES),  # and its role must be the announced one
    Claim("NodeLeft", "node", itself=STAGES),
    Claim("NodeHeartbeat", "node", itself=STAGES),
    Claim("TaskSubmitted", "device", itself=("device",), others=("loadgen",)),
    Claim("TaskCancelled", None, itself=("device",), others=("loadgen",), task=("device",)),
    Claim("TaskProgress", "node", itself=("device",), task=("device",)),
    Claim("TaskCompleted", "node", itself=("device",), task=("device",)),
    Claim("TaskFailed", "node", itself=STAGES, task=STAGES),
)

BY_MESSAGE: Final = {claim.message: claim for claim in TABLE}


@dataclass(frozen=True, slots=True)
class Parties:
    """Who takes part in a live task."""

    device: str
    attempt: int
    edge: str | None  # of the present attempt
    cloud: bool  # whether the cloud computes in it; its workers share the work, so each of them takes part


def check(speaker: Speaker, record: Record, message: object, parties: Parties | None) -> None:
    """Whether a proven speaker may say this. `parties`: of the task that the message names, None where it is not live.

    Raises `ProtocolError` (`wrong_identity`) saying who spoke as whom; KeyError for a message that is not in the table.
    """
    claim = BY_MESSAGE[type(message).__name__]
    what = str(getattr(message, "type"))  # noqa: B009  # every message has one
    free = speaker.role in claim.others
    if not free and speaker.role not in claim.itself:
        raise refused(f"{speaker} may send no {what}")
    node = getattr(message, claim.node) if claim.node is not None else speaker.name
    if not free and node != speaker.name:
        raise refused(f"{speaker} speaks as {node} in a {what}")
    if isinstance(message, NodeAnnounced) and message.role.value != speaker.role:
        raise refused(f"{speaker} announces itself as {message.role.value}")
    if topics.row(record.topic).compacted and record.key != node:
        raise refused(f"{speaker} writes a {what} under the key {record.key}, and only the last of a key is kept")
    if free or claim.task is None or parties is None:
        return
    if not _takes_part(speaker, message, parties):
        raise refused(f"{speaker} sends a {what} of {getattr(message, 'task_id', '?')}, in which it has no part")


def _takes_part(speaker: Speaker, message: object, parties: Parties) -> bool:
    if speaker.role == "device":
        return speaker.name == parties.device
    if isinstance(message, TaskFailed) and message.attempt != parties.attempt:
        return True  # late, of an attempt that is over: the core does not mind it
    return parties.cloud if speaker.role == "cloud" else speaker.name == parties.edge


__all__ = ["BY_MESSAGE", "TABLE", "Claim", "Parties", "check"]
