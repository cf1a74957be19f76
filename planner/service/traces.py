"""Task traces: one root span per ended task and one span per placement.

Only decisions that this planner wrote and read back produce spans. Replayed decisions are only remembered, so a restart
emits no span twice.
"""

from __future__ import annotations

from collections.abc import Container

from bus.messages import Admitted, Decision, Ended, Placed, Retried, TaskState, TaskSubmitted
from bus.tracing import DECISION, TASK, Attribute, Span, SpanSink, span_id


class TaskTraces:
    """Spans of one planner. Remembers the admission of each live task, which its `Ended` change does not contain."""

    def __init__(self, planner: str, sink: SpanSink) -> None:
        self._planner = planner
        self._sink = sink
        self._admitted: dict[str, tuple[float, TaskSubmitted]] = {}  # task id -> ledger time, submission
        self._retry_causes: dict[str, str] = {}  # task id -> cause of its latest retry, until it is placed

    def retain(self, live: Container[str]) -> None:
        """Forget all tasks except these. Called after the state was rebuilt, which may skip the ends of other tasks."""
        self._admitted = {task_id: known for task_id, known in self._admitted.items() if task_id in live}
        self._retry_causes.clear()

    def fold(self, decision: Decision) -> None:
        """Remember the tasks of a replayed decision without emitting spans."""
        for change in decision.changes:
            if isinstance(change, Admitted):
                self._admitted[change.task.task_id] = (decision.now_s, change.task)
            elif isinstance(change, Ended):
                self._forget(change.task_id)

    def record(self, decision: Decision, begin_s: float, end_s: float, ledger_s: float) -> None:
        """Emit the spans of a decision of this planner.

        The step began at `begin_s` and the decision was read back at `end_s`, both on the event loop's clock; `ledger_s` is
        the offset that converts ledger time to that clock.
        """
        for change in decision.changes:
            match change:
                case Admitted():
                    self._admitted[change.task.task_id] = (decision.now_s, change.task)
                case Retried():
                    self._retry_causes[change.task_id] = change.cause
                case Placed():
                    self._placed(decision, change, begin_s, end_s)
                case Ended():
                    self._ended(decision, change, ledger_s)
                case _:
                    pass

    def _placed(self, decision: Decision, placed: Placed, begin_s: float, end_s: float) -> None:
        task_id, placement = placed.task_id, placed.placement
        attributes: dict[str, Attribute] = {
            "deepar.node": self._planner,
            "deepar.role": "planner",
            "deepar.seq": decision.seq,
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
        if cause := self._retry_causes.pop(task_id, ""):
            attributes["deepar.again_because"] = cause
        own, parent = span_id(task_id, DECISION, placed.attempt), span_id(task_id, TASK)
        self._sink(Span(task_id, DECISION, own, parent, begin_s, end_s, attributes))

    def _ended(self, decision: Decision, ended: Ended, ledger_s: float) -> None:
        task_id = ended.task_id
        # If the admission lies before the restored snapshot, the delay measured by the device gives the start.
        began_s, task = self._admitted.get(task_id, (decision.now_s - (ended.delay_s or 0.0), None))
        attributes: dict[str, Attribute] = {
            "deepar.node": self._planner,
            "deepar.role": "planner",
            "deepar.attempt": ended.attempt,
            "deepar.state": ended.state.value,
        }
        if task is not None:
            attributes |= {
                "deepar.model": task.model,
                "deepar.device": task.device,
                "deepar.samples": task.samples,
            }
        failed = (
            "" if ended.state is TaskState.COMPLETED else f"{ended.state.value}: {ended.cause} {ended.detail}".strip()
        )
        self._sink(
            Span(
                task_id,
                TASK,
                span_id(task_id, TASK),
                None,
                began_s + ledger_s,
                decision.now_s + ledger_s,
                attributes,
                failed,
            )
        )
        self._forget(task_id)

    def _forget(self, task_id: str) -> None:
        self._admitted.pop(task_id, None)
        self._retry_causes.pop(task_id, None)


__all__ = ["TaskTraces"]
