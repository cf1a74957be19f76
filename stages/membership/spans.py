"""The trace spans of a node: one for each part of a task's delay that the node works on."""

from __future__ import annotations

from bus.frames import AttemptPlan
from bus.headers.tracing import TRACEPARENT, Attribute, Span, SpanSink, parent_of, part_span_id, traceparent
from bus.port import Headers
from bus.values import Role


class TaskSpans:
    """Records the spans of one node. Without a sink it records none."""

    def __init__(self, node: str, role: Role, sink: SpanSink | None) -> None:
        self._node, self._role, self._sink = node, role, sink

    def record(
        self,
        part: str,
        plan: AttemptPlan,
        begin_s: float | None,
        end_s: float,
        busy_s: float,
        parent_id: str | None = None,
    ) -> None:
        """Record the span of one part of a task's delay. No span is recorded where `begin_s` is None (no work)."""
        if self._sink is None or begin_s is None:
            return
        attributes: dict[str, Attribute] = {
            "deepar.attempt": plan.attempt,
            "deepar.model": plan.model,
            "deepar.kind": plan.placement.kind.value,
            "deepar.node": self._node,
            "deepar.role": self._role.value,
            "deepar.samples": plan.todo,
            "deepar.busy_s": busy_s,
        }
        parent_id = parent_id or parent_of(part, plan, self._node)
        self._sink(
            Span(plan.task_id, part, part_span_id(part, plan, self._node), parent_id, begin_s, end_s, attributes)
        )

    def header(self, part: str, plan: AttemptPlan) -> Headers:
        """Headers for a record that make the receiver's spans children of this part's span."""
        return ((TRACEPARENT, traceparent(plan.task_id, part_span_id(part, plan, self._node))),)
