"""Task traces: one root span per ended task and one span per placement.

Only decisions that this planner wrote and read back produce spans. Replayed decisions are only remembered, so a restart
emits no span twice.
"""

from __future__ import annotations

from collections.abc import Container

from bus.headers.tracing import DECISION, TASK, Attribute, Span, SpanSink, span_id
from bus.messages import Decision, Ended, Placed, TaskState
from bus.region_tasks import KnownTask, RegionTasks


class TaskTraces:
    """Spans of one planner. Follows the live tasks, because an `Ended` change does not contain the admission."""

    def __init__(self, planner: str, sink: SpanSink) -> None:
        self._planner = planner
        self._sink = sink
        self._region = RegionTasks(follow_moves=False)

    def retain(self, live: Container[str]) -> None:
        """Forget all tasks except these. Called after the state was rebuilt, which may skip the ends of other tasks."""
        self._region.retain(live)

    def fold(self, decision: Decision) -> None:
        """Follow a replayed decision without emitting spans."""
        for _ in self._region.apply(decision):
            pass

    def record(self, decision: Decision, begin_s: float, end_s: float, ledger_s: float) -> None:
        """Emit the spans of a decision of this planner.

        The step began at `begin_s` and the decision was read back at `end_s`, both on the event loop's clock; `ledger_s` is
        the offset that converts ledger time to that clock.
        """
        for change, task in self._region.apply(decision):
            if isinstance(change, Placed) and task is not None:
                self._sink(self._placement_span(decision.seq, change, task.cause, begin_s, end_s))
            elif isinstance(change, Ended) and task is not None:
                self._sink(self._task_span(decision.now_s, change, task, ledger_s))

    def _placement_span(self, seq: int, placed: Placed, retry_cause: str, begin_s: float, end_s: float) -> Span:
        task_id, placement = placed.task_id, placed.placement
        attributes: dict[str, Attribute] = {
            "deepar.node": self._planner,
            "deepar.role": "planner",
            "deepar.seq": seq,
            "deepar.attempt": placed.attempt,
            "deepar.policy": placed.policy,
            "deepar.kind": placement.kind.value,
            "deepar.cut1": placement.cut1_name,
            "deepar.cut2": placement.cut2_name,
            "deepar.wait_s": placed.wait_s,
            "deepar.predicted_s": placed.delay_s,
        }
        if placement.edge is not None:
            attributes |= {
                "deepar.edge": placement.edge,
                "deepar.link1_bps": placement.link1_bps,
                "deepar.link2_bps": placement.link2_bps,
            }
        if retry_cause:
            attributes["deepar.again_because"] = retry_cause
        own, parent = span_id(task_id, DECISION, placed.attempt), span_id(task_id, TASK)
        return Span(task_id, DECISION, own, parent, begin_s, end_s, attributes)

    def _task_span(self, now_s: float, ended: Ended, task: KnownTask, ledger_s: float) -> Span:
        task_id = ended.task_id
        # If the admission lies before the restored snapshot, the delay measured by the device gives the start.
        began_s = now_s - (ended.delay_s or 0.0) if task.admitted_s is None else task.admitted_s
        attributes: dict[str, Attribute] = {
            "deepar.node": self._planner,
            "deepar.role": "planner",
            "deepar.attempt": ended.attempt,
            "deepar.state": ended.state.value,
        }
        if (submitted := task.submitted) is not None:
            attributes |= {
                "deepar.model": submitted.model,
                "deepar.device": submitted.device,
                "deepar.samples": submitted.samples,
            }
        failed = (
            "" if ended.state is TaskState.COMPLETED else f"{ended.state.value}: {ended.cause} {ended.detail}".strip()
        )
        own = span_id(task_id, TASK)
        return Span(task_id, TASK, own, None, began_s + ledger_s, now_s + ledger_s, attributes, failed)


__all__ = ["TaskTraces"]
