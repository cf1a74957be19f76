"""Stateless tracing: trace and span ids are derived from the task's name.

One task is one trace. The root span `task` lasts from admission to the end. Its children are `submit` and one `decision` per
attempt. The parts of the delay follow the decision in the order in which a sample passes them (`chain`), each the child of
the part before. Planners that replay their log, restarted stages and devices compute the same ids. Records carry the W3C
header `traceparent` for foreign stages and tools. Only the `SpanSink` in `deploy/services/telemetry/otel.py` imports
OpenTelemetry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Final, Protocol

from bus.frames import AttemptPlan
from bus.port import Headers
from bus.values import DELAY_PARTS, Placement

TRACEPARENT: Final = "traceparent"
TASK, SUBMIT, DECISION = "task", "submit", "decision"

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")

Attribute = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """A span of work on a task; times are on the event loop's clock of the process that measured it."""

    task_id: str
    name: str  # task, submit, decision, or one of `DELAY_PARTS`
    span_id: str  # 16 hexadecimal digits
    parent_id: str | None  # None: the root
    begin_s: float
    end_s: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    failed: str = ""  # reason of the failure; empty on success


class SpanSink(Protocol):
    """Receives every completed span. Must not block."""

    def __call__(self, span: Span, /) -> None: ...


@lru_cache(maxsize=4096)
def trace_id(task_id: str) -> str:
    """The trace id of a task: 32 hexadecimal digits."""
    return sha256(b"deepar trace 1\n" + task_id.encode()).hexdigest()[:32]


@lru_cache(maxsize=16384)
def span_id(task_id: str, name: str, attempt: int = 0, node: str = "") -> str:
    """The id of the span `name` of a task: 16 hexadecimal digits.

    `task` and `submit` exist once per task, other spans once per attempt. The ids of parts include the node that measured
    them, since another cloud stage may take over.
    """
    return sha256(f"deepar span 1\n{task_id}\n{name}\n{attempt}\n{node}".encode()).hexdigest()[:16]


def traceparent(task_id: str, span: str) -> bytes:
    """The content of the header: the task's trace id, `span` as the parent id, and the flag for sampled."""
    return f"00-{trace_id(task_id)}-{span}-01".encode()


def parent_in(headers: Headers, task_id: str) -> str | None:
    """The parent span id in a record's headers; None if it is missing or belongs to another trace."""
    for name, content in headers:
        if name == TRACEPARENT:
            match = _TRACEPARENT.fullmatch(content)
            if match is not None and match[1].decode() == trace_id(task_id) and match[2] != b"0" * 16:
                return match[2].decode()
    return None


def chain(placement: Placement) -> tuple[str, ...]:
    """The parts of a placement, in the order in which a sample passes them."""
    has = {
        "device": placement.uses_device or placement.edge is None,
        "link1": placement.uses_link1,
        "edge": placement.uses_slot and placement.edge is not None,
        "link2": placement.uses_cloud,
        "cloud": placement.uses_cloud,
        "result": placement.edge is not None,
    }
    return tuple(part for part in DELAY_PARTS if has[part])


def part_span_id(part: str, plan: AttemptPlan, node: str) -> str:
    """The span id of a part of an attempt. `node` is used if the plan does not determine which node measures the part."""
    edge = plan.placement.edge or ""
    who = {"device": plan.device, "link1": plan.device, "edge": edge, "link2": edge}.get(part, node)
    return span_id(plan.task_id, part, plan.attempt, who)


def parent_of(part: str, plan: AttemptPlan, node: str) -> str:
    """The parent span id of a part: the part before it, or the decision."""
    parts = chain(plan.placement)
    place = parts.index(part) if part in parts else 0
    return part_span_id(parts[place - 1], plan, node) if place else span_id(plan.task_id, DECISION, plan.attempt)
