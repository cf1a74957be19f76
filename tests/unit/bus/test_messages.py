"""Control messages: they survive the wire, and what is wrong is refused with its cause."""

from __future__ import annotations

import pytest

from bus import messages, topics
from bus.errors import ProtocolError
from bus.messages import (
    MAX_MESSAGE_BYTES,
    Decision,
    Learned,
    LearnedLink,
    LearnedNode,
    LearnedPath,
    LinkMeasurement,
    NodeHeartbeat,
    SeedInput,
    TaskCompleted,
    TaskSubmitted,
)
from bus.values import Kind, Parts


def task(**more: object) -> TaskSubmitted:
    return TaskSubmitted(task_id="t1", device="d1", model="lenet", samples=3, input=SeedInput(seed=1), **more)


def test_a_message_comes_back_as_it_was() -> None:
    for message in (task(), task(max_link1_bps=5, input_bytes=9, deadline_s=2.5)):
        assert messages.decode(topics.TASKS, messages.encode(message)) == message


LEARNED = Learned(
    task_id="t1",
    nodes=(
        LearnedNode(
            node="e1", model="lenet", samples=3, profile_s=0.3, busy_s=0.7, factor=2.0, overhead_s=0.03, kept=4
        ),
    ),
    paths=(
        LearnedPath(
            device="d1",
            edge="e1",
            kind=Kind.DEVICE_EDGE,
            samples=3,
            delay_s=0.5,
            gap_s=-0.01,
            error=-0.2,
            task_s=0.0,
            sample_s=-0.001,
            deviation=0.1,
            kept=1,
        ),
    ),
    links=(LearnedLink(link=1, device="d1", edge="e1", latency_s=0.02, bps=5_000),),
)


def test_measured_links_and_what_was_learned_come_back() -> None:
    measured = LinkMeasurement(link=2, edge="e1", latency_s=0.02, deviation_s=0.001, bps=7)
    heartbeat = NodeHeartbeat(node="e1", incarnation="i1", links=(measured,))
    completed = TaskCompleted(task_id="t1", attempt=1, node="d1", measured=Parts(), delay_s=0.5, cloud="c1")
    for message in (heartbeat, completed):
        assert messages.decode(topics.EVENTS, messages.encode(message)) == message
    decision = Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=1.0, inputs={}, changes=(LEARNED,), ledger_hash="0" * 32
    )
    assert messages.decode(topics.DECISIONS, messages.encode(decision)) == decision


def test_a_heartbeat_of_an_older_writer_has_no_links() -> None:
    payload = b'{"v":1,"type":"node_heartbeat","node":"e1","incarnation":"i1"}'
    assert messages.decode(topics.EVENTS, payload) == NodeHeartbeat(node="e1", incarnation="i1")


@pytest.mark.parametrize("wrong", [{"link": 3}, {"latency_s": -1.0}, {"latency_s": float("nan")}, {"bps": 0}])
def test_an_impossible_measurement_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LinkMeasurement.model_validate({"link": 1, "edge": "e1", "latency_s": 0.1} | wrong)


def test_unknown_keys_of_a_newer_writer_are_ignored() -> None:
    payload = messages.encode(task())[:-1] + b',"colour":"blue"}'
    assert messages.decode(topics.TASKS, payload) == task()


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        (None, "undecodable"),
        (b"", "undecodable"),
        (b"{", "undecodable"),
        (b"[]", "undecodable"),
        (b'{"type":"bomb"}', "undecodable"),
        (messages.encode(task()).replace(b'"samples":3', b'"samples":0'), "undecodable"),
        (messages.encode(task()).replace(b'"d1"', b'"../d1"'), "undecodable"),
        (messages.encode(task()).replace(b'"v":1', b'"v":2'), "unknown_version"),
        (b" " * (MAX_MESSAGE_BYTES + 1), "oversized"),
        (b'{"a":' * 5000, "undecodable"),
        (messages.encode(task())[:-1] + b',"new":' + b"[" * 450_000 + b"]" * 450_000 + b"}", "undecodable"),
        (messages.encode(task()).replace(b'"samples":3', b'"samples":' + b"9" * 900_000), "undecodable"),
        (messages.encode(task()).replace(b'"samples":3', b'"samples":1e999'), "undecodable"),
        (messages.encode(task()).replace(b'"d1"', b'"\\ud800"'), "undecodable"),
    ],
)
def test_what_is_wrong_is_refused_with_its_cause(payload: bytes | None, cause: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.decode(topics.TASKS, payload)
    assert caught.value.cause == cause


def test_every_control_topic_has_a_reader_for_its_messages() -> None:
    for name in topics.CONTROL_TOPICS:
        schema = messages.adapter(name).json_schema()
        for wanted in topics.row(name).messages:
            assert wanted in str(schema), f"{wanted} cannot be read from {name}"
