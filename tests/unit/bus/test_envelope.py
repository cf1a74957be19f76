"""The headers of control messages."""

from __future__ import annotations

import pytest

from bus.headers.envelope import Envelope
from bus.headers.tracing import DECISION, TRACEPARENT, span_id, traceparent
from bus.messages import Change, Decision, Learned, Overran, Start


def trace_of(*changes: Change) -> bytes | None:
    decision = Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=0.0, inputs={}, changes=tuple(changes), ledger_hash="h"
    )
    return dict(Envelope("/deepar/0/planner/p", "life").headers(decision)).get(TRACEPARENT)


HEARTBEAT = Learned()


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_decision_about_one_task_is_in_its_trace_also_beside_what_a_heartbeat_taught(attempt: int) -> None:
    overran = Overran(task_id="t", attempt=attempt, from_s=1.0, to_s=2.0)
    expected = traceparent("t", span_id("t", DECISION, attempt))
    assert trace_of(overran) == expected
    assert trace_of(HEARTBEAT, overran) == expected


def test_a_decision_about_several_tasks_or_none_has_no_trace() -> None:
    starts = [Start(task_id=name, attempt=1, device="d", at_s=0.0) for name in ("a", "b")]
    assert trace_of(*starts) is None
    assert trace_of(HEARTBEAT) is None
