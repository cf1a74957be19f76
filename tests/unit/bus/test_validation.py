"""The text of a validation error: its location, if it has one, and the fault, without empty or repeated prefixes."""

from __future__ import annotations

import json
import re

import pytest

from bus import messages, topics
from bus.errors import ProtocolError

SEED = {"kind": "seed", "seed": 1}
TASK = {"type": "task_submitted", "task_id": "t1", "device": "d1", "model": "m", "samples": 1, "input": SEED}


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "the record is empty"),
        (b"{", "Invalid JSON"),
        (b"[]", "should be"),
        (json.dumps({**TASK, "samples": 0}).encode(), "samples: "),
        (json.dumps({**TASK, "device": "no name!"}).encode(), "device: "),
    ],
)
def test_a_fault_is_told_without_empty_or_doubled_prefixes(payload: bytes, told: str) -> None:
    for topic in (topics.TASKS, topics.EVENTS):
        with pytest.raises(ProtocolError) as raised:
            messages.decode(topic, payload)
        text = str(raised.value)
        assert not re.search(r": *:|^[: ]|\b(\S+): \1\b", text), text
        assert topic not in text, "where the record stood is told by whoever shows the fault"
        if topic == topics.TASKS:
            assert told in text
