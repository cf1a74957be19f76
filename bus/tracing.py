"""Traces that need no state: every id follows from the task's name, so whoever sees a task knows its trace and its parents.

One task is one trace. Its root is the span `task`, from the admission to the end; below it stand `submit`, a `decision` for
each attempt, and below that the parts of the delay in the order in which a sample meets them (`chain`), each the child of the
one before it. A planner that replays its log, a stage that restarts and a device that knows only its plan arrive at the same
ids. Records carry the W3C header `traceparent`, so foreign stages and tools can join in. Nothing here imports OpenTelemetry;
a `SpanSink` (`deploy/services/otel.py`) does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Final, Protocol

from bus.frames import Plan
from bus.port import Headers
from bus.values import DELAY_PARTS, Placement

TRACEPARENT: Final = "traceparent"
TASK, SUBMIT, DECISION = "task", "submit", "decision"

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")

Attribute = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of work on a task; moments are on the loop's clock of the process that measured it."""

    task_id: str
    name: str  # task, submit, decision, or one of `DELAY_PARTS`
    span_id: str  # 16 hexadecimal digits
    parent_id: str | None  # None: the root
    begin_s: float
    end_s: float
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    failed: str = ""  # why, where it did not succeed


class SpanSink(Protocol):
    """Told of every span when it is over. Must not wait."""

    def __call__(self, span: Span, /) -> None: ...


@lru_cache(maxsize=4096)
def trace_id(task_id: str) -> str:
    """The trace of a task: 32 hexadecimal digits."""
    return sha256(b"deepar trace 1\n" + task_id.encode()).hexdigest()[:32]


@lru_cache(maxsize=16384)
def span_id(task_id: str, name: str, attempt: int = 0, node: str = "") -> str:
    """The span `name` of a task: 16 hexadecimal digits. `task` and `submit` are once a task, the others once an attempt;
    parts also name the node that measured them, for another cloud stage may take over half-way.
    """
    return sha256(f"deepar span 1\n{task_id}\n{name}\n{attempt}\n{node}".encode()).hexdigest()[:16]


def traceparent(task_id: str, span: str) -> bytes:
    """The header's content: this task's trace, `span` (16 digits) as the parent of what comes of the record, sampled."""
    return f"00-{trace_id(task_id)}-{span}-01".encode()


def parent_in(headers: Headers, task_id: str) -> str | None:
    """The parent that a record of a task names; None where it names none, or one of another trace."""
    for name, content in headers:
        if name == TRACEPARENT:
            match = _TRACEPARENT.fullmatch(content)
            if match is not None and match[1].decode() == trace_id(task_id) and match[2] != b"0" * 16:
                return match[2].decode()
    return None


def chain(placement: Placement) -> tuple[str, ...]:
    """The parts that a placement has, in the order in which a sample meets them."""
    has = {
        "device": placement.cut1 > 0 or placement.edge is None,
        "link1": placement.uses_link1,
        "edge": placement.uses_slot and placement.edge is not None,
        "link2": placement.uses_cloud,
        "cloud": placement.uses_cloud,
        "result": placement.edge is not None,
    }
    return tuple(part for part in DELAY_PARTS if has[part])


def part_span_id(part: str, plan: Plan, node: str) -> str:
    """The span of a part of an attempt. `node` is who asks; it counts where the plan does not say who measures the part."""
    edge = plan.placement.edge or ""
    who = {"device": plan.device, "link1": plan.device, "edge": edge, "link2": edge}.get(part, node)
    return span_id(plan.task_id, part, plan.attempt, who)


def parent_of(part: str, plan: Plan, node: str) -> str:
    """The span that a part is the child of: that of the part before it, or the decision."""
    parts = chain(plan.placement)
    place = parts.index(part) if part in parts else 0
    return part_span_id(parts[place - 1], plan, node) if place else span_id(plan.task_id, DECISION, plan.attempt)
