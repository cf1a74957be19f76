"""Authorization table: every message that names a node has a rule, and no sender may do more than its rule allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bus import messages, topics
from bus.errors import ProtocolError
from bus.identity import authorization
from bus.identity.authorization import Parties, check
from bus.identity.keys import SPEAKING_ROLES, Speaker
from bus.messages import (
    Message,
    NodeAnnounced,
    NodeHeartbeat,
    NodeLeft,
    SeedInput,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskSubmitted,
)
from bus.port import Record
from bus.values import Parts, Role

MESSAGES = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)]
NAMING_FIELDS = {"node", "device", "edge"}


def uncovered(table: dict[str, authorization.AuthorizationRule]) -> set[str]:
    """Messages of topics that several roles write, or that name a node, and have no row."""
    by_topic = {name for row in topics.TABLE if row.name in topics.SIGNED_TOPICS for name in row.messages}
    by_field = {kind.__name__ for kind in MESSAGES if NAMING_FIELDS & kind.model_fields.keys()}
    return (by_topic | by_field) - table.keys()


def test_every_message_that_claims_a_node_has_a_row() -> None:
    assert len(MESSAGES) > 12
    assert uncovered(authorization.BY_MESSAGE) == set()
    for rule in authorization.TABLE:
        kind = getattr(messages, rule.message)
        assert rule.node is None or rule.node in kind.model_fields
        assert (rule.task is not None) == ("task_id" in kind.model_fields and kind is not TaskSubmitted)
        topic = next(row for row in topics.TABLE if rule.message in row.messages)
        assert {*rule.itself, *rule.others} <= set(topic.writers)  # Kafka would refuse the rest anyway


@pytest.mark.parametrize("missing", authorization.BY_MESSAGE)
def test_a_message_without_a_row_is_found(missing: str) -> None:
    table = {name: rule for name, rule in authorization.BY_MESSAGE.items() if name != missing}
    assert uncovered(table) == {missing}


def test_what_only_the_planner_writes_makes_no_claims() -> None:
    assert topics.SIGNED_TOPICS == (topics.NODES, topics.TASKS, topics.EVENTS)


def test_no_role_that_writes_claims_can_read_them() -> None:
    """With the lists of `deepar acls`, no role can both read and write such a topic, so none can repeat a signed record."""
    for name in topics.SIGNED_TOPICS:
        row = topics.row(name)
        assert not set(row.writers) & set(row.readers), name


def _submitted(name: str, role: Role) -> Message:
    return TaskSubmitted(task_id="t", device=name, model="m", samples=1, input=SeedInput(seed=1))


def _completed(name: str, role: Role) -> Message:
    return TaskCompleted(task_id="t", attempt=2, node=name, measured=Parts(), delay_s=1)


SAYINGS: dict[str, tuple[str, Callable[[str, Role], Message]]] = {
    "announced": (topics.NODES, lambda name, role: NodeAnnounced(node=name, role=role, incarnation="i")),
    "left": (topics.NODES, lambda name, role: NodeLeft(node=name, incarnation="i")),
    "heartbeat": (topics.EVENTS, lambda name, role: NodeHeartbeat(node=name, incarnation="i")),
    "submitted": (topics.TASKS, _submitted),
    "cancelled": (topics.TASKS, lambda name, role: TaskCancelled(task_id="t")),
    "progress": (topics.EVENTS, lambda name, role: TaskProgress(task_id="t", attempt=2, node=name, done=1)),
    "completed": (topics.EVENTS, _completed),
    "failed": (topics.EVENTS, lambda name, role: TaskFailed(task_id="t", attempt=2, node=name, cause="x")),
    "failed late": (topics.EVENTS, lambda name, role: TaskFailed(task_id="t", attempt=1, node=name, cause="x")),
}
PARTIES = Parties(device="d1", attempt=2, edge="e1", cloud=True)
STAGES = {"device:d1", "device:d2", "edge:e1", "edge:e2", "cloud:c1"}
EVERYBODY = (*sorted(STAGES), "loadgen:lg")
MAY_OF_ITSELF = {
    "announced": STAGES,
    "left": STAGES,
    "heartbeat": STAGES,
    "submitted": {"device:d1", "device:d2", "loadgen:lg"},
    "cancelled": {"device:d1", "loadgen:lg"},
    "progress": {"device:d1"},
    "completed": {"device:d1"},
    "failed": {"device:d1", "edge:e1", "cloud:c1"},
    "failed late": {"device:d1", "edge:e1", "edge:e2", "cloud:c1"},
}
MAY_OF_ANOTHER = {"submitted": {"loadgen:lg"}, "cancelled": {"device:d1", "loadgen:lg"}}  # the second has no node in it


def refusal(who: str, saying: str, *, of: str | None = None, parties: Parties | None = PARTIES) -> str | None:
    """Why `who` may not say something of itself, or `of` another; None where it may."""
    speaker = Speaker.parse(who)
    topic, make = SAYINGS[saying]
    role = Role(speaker.role) if speaker.role in set(Role) else Role.DEVICE
    name = of or speaker.name
    message = make(name, role)
    record = Record(topic, 0, 0, 0, name if topic == topics.NODES else "t", messages.encode(message))
    try:
        check(speaker, record, message, parties)
    except ProtocolError as error:
        return f"{error.cause}: {error}"
    return None


@pytest.mark.parametrize("who", EVERYBODY)
@pytest.mark.parametrize("saying", SAYINGS)
def test_who_may_say_what(saying: str, who: str) -> None:
    assert (refusal(who, saying) is None) == (who in MAY_OF_ITSELF[saying])
    told = refusal(who, saying, of="d9")
    assert (told is None) == (who in MAY_OF_ANOTHER.get(saying, ()))
    if told is not None:
        assert told.startswith(f"wrong_identity: {who} ")  # it names who spoke,
        assert "d9" in told or "may send no" in told or saying == "cancelled"  # the error names the other node


def test_every_role_that_speaks_was_tried() -> None:
    assert {who.partition(":")[0] for who in EVERYBODY} == set(SPEAKING_ROLES)


def test_of_a_task_that_is_not_live_nothing_is_refused_but_nothing_is_anybodys_name() -> None:
    assert refusal("device:d2", "completed", parties=None) is None
    assert refusal("device:d2", "completed", of="d1", parties=None) == (
        "wrong_identity: device:d2 speaks as d1 in a task_completed"
    )


def test_the_edge_and_the_cloud_of_the_present_attempt_only() -> None:
    alone = Parties(device="d1", attempt=2, edge=None, cloud=False)
    assert refusal("edge:e1", "failed", parties=alone) is not None
    assert refusal("cloud:c1", "failed", parties=alone) is not None
    assert refusal("cloud:c7", "failed") is None  # cloud workers share the work


def test_a_node_announces_its_own_role_under_its_own_key() -> None:
    message = NodeAnnounced(node="d1", role=Role.EDGE, incarnation="i")
    record = Record(topics.NODES, 0, 0, 0, "d1", messages.encode(message))
    with pytest.raises(ProtocolError, match="device:d1 announces itself as edge"):
        check(Speaker("device", "d1"), record, message, None)
    message = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i")
    record = Record(topics.NODES, 0, 0, 0, "d2", messages.encode(message))
    with pytest.raises(ProtocolError, match="under the key d2"):
        check(Speaker("device", "d1"), record, message, None)
