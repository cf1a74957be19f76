"""What a planner tells to who collects traces: a task's root, and each decision about it.

Told of what the log has proven, never of what is folded: a planner that replays history repeats no span.
"""

from __future__ import annotations

from collections.abc import Container

from bus.messages import Admitted, Decision, Ended, Placed, Retried, TaskState, TaskSubmitted
from bus.tracing import DECISION, TASK, Attribute, Span, SpanSink, span_id


class TaskTraces:
    """Remembers when live tasks were admitted, which is all that a root needs and its end does not say."""

    def __init__(self, planner: str, sink: SpanSink) -> None:
        self._planner = planner
        self._sink = sink
        self._admitted: dict[str, tuple[float, TaskSubmitted]] = {}  # ledger time
        self._why: dict[str, str] = {}  # of tasks to be planned again

    def keep(self, live: Container[str]) -> None:
        """The log is read anew, from a state with these tasks: forget the others, whose ends may not be read again."""
        self._admitted = {task_id: known for task_id, known in self._admitted.items() if task_id in live}
        self._why.clear()

    def fold(self, decision: Decision) -> None:
        """A decision of the past, or of another planner."""
        for change in decision.changes:
            if isinstance(change, Admitted):
                self._admitted[change.task.task_id] = (decision.now_s, change.task)
            elif isinstance(change, Ended):
                self._forget(change.task_id)

    def tell(self, decision: Decision, begin_s: float, end_s: float, ledger_s: float) -> None:
        """A decision of ours that counts now: begun at `begin_s`, read back at `end_s`, on the loop's clock. `ledger_s` is
        what has to be added to ledger time to have the loop's.
        """
        for change in decision.changes:
            match change:
                case Admitted():
                    self._admitted[change.task.task_id] = (decision.now_s, change.task)
                case Retried():
                    self._why[change.task_id] = change.cause
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
        if why := self._why.pop(task_id, ""):
            attributes["deepar.again_because"] = why
        own, parent = span_id(task_id, DECISION, placed.attempt), span_id(task_id, TASK)
        self._sink(Span(task_id, DECISION, own, parent, begin_s, end_s, attributes))

    def _ended(self, decision: Decision, ended: Ended, ledger_s: float) -> None:
        task_id = ended.task_id
        # Admitted before the snapshot that this planner began with: then only what the device measured is known.
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
        self._why.pop(task_id, None)


__all__ = ["TaskTraces"]
