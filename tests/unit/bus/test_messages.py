"""Control messages: they survive the wire, and what is wrong is refused with its cause."""

from __future__ import annotations

import pytest

from bus import messages, topics
from bus.errors import ProtocolError
from bus.messages import MAX_MESSAGE_BYTES, SeedInput, TaskSubmitted


def task(**more: object) -> TaskSubmitted:
    return TaskSubmitted(task_id="t1", device="d1", model="lenet", samples=3, input=SeedInput(seed=1), **more)


def test_a_message_comes_back_as_it_was() -> None:
    for message in (task(), task(max_link1_bps=5, input_bytes=9, deadline_s=2.5)):
        assert messages.decode(topics.TASKS, messages.encode(message)) == message


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
