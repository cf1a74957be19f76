"""Records of the control topics as lines that an operator reads at a glance: who got what, where, and who waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bus.messages import (
    Admitted,
    BandwidthGrant,
    Decision,
    Ended,
    EpochOpened,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    Overran,
    Placed,
    PlannerHeartbeat,
    PlannerLeft,
    Retried,
    Snapshot,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.units import format_rate, format_seconds
from bus.values import Parts, Placement

Line = tuple[str, str, str, str]
"""style, who, what, details"""

_STATE_STYLE = {
    TaskState.COMPLETED: "green",
    TaskState.REJECTED: "yellow",
    TaskState.FAILED: "red",
    TaskState.EXPIRED: "magenta",
}


def lines_of(message: Any) -> Iterator[Line]:
    """One line for each thing that a message says."""
    match message:
        case Decision():
            for change in message.changes:
                yield _change(change)
        case EpochOpened():
            yield "bold blue", message.planner, "leads", f"region {message.region} from epoch {message.epoch} on"
        case PlannerHeartbeat():
            yield "dim", "planner", "alive", f"epoch {message.epoch}"
        case PlannerLeft():
            yield "blue", "planner", "left", f"epoch {message.epoch} is free to be taken over"
        case TaskSubmitted():
            caps = ", ".join(
                f"link {n} up to {format_rate(cap)}"
                for n, cap in ((1, message.max_link1_bps), (2, message.max_link2_bps))
                if cap
            )
            yield "", message.task_id, "submitted", f"{_work(message)}{'; ' + caps if caps else ''}"
        case TaskCancelled():
            yield "yellow", message.task_id, "cancel asked", ""
        case NodeAnnounced():
            yield "cyan", message.node, "announced", _node(message)
        case NodeLeft():
            yield "yellow", message.node, "leaves", ""
        case NodeHeartbeat():
            yield "dim", message.node, "alive", ""
        case TaskProgress():
            yield "dim", message.task_id, "progress", f"{message.done} samples"
        case TaskCompleted():
            details = f"in {format_seconds(message.delay_s)}: {parts_text(message.measured)}"
            yield "green", message.task_id, "completed", details
        case TaskFailed():
            yield "red", message.task_id, "failed", f"at {message.node}: {message.cause} {message.detail}"
        case Snapshot():
            yield "dim", f"region {message.region}", "snapshot", f"at decision {message.seq}"
        case _:
            yield "", "?", type(message).__name__, ""


def _change(change: Any) -> Line:
    match change:
        case Admitted(task=task):
            return "", task.task_id, "admitted", _work(task)
        case Placed():
            waits = f", waits {format_seconds(change.wait_s)}" if change.wait_s > 0 else ""
            details = f"{placement_text(change.placement)}; {format_seconds(change.delay_s)} expected{waits}"
            return "bold", change.task_id, f"placed #{change.attempt}", details
        case BandwidthGrant():
            ends = f"device - {change.edge}" if change.link == 1 else f"{change.edge} - cloud"
            return "", change.task_id, "granted", f"{format_rate(change.bps)} on link {change.link} ({ends})"
        case Start():
            return "green", change.task_id, "starts", f"on {change.device}, attempt {change.attempt}"
        case Moved():
            return (
                "yellow",
                change.task_id,
                "moved",
                f"starts {format_seconds(abs(change.to_s - change.from_s))} "
                + ("later" if change.to_s > change.from_s else "earlier"),
            )
        case Overran():
            later = format_seconds(max(0.0, change.to_s - change.from_s))
            return "dim", change.task_id, "overran", f"its end is now expected {later} later"
        case Retried():
            return (
                "yellow",
                change.task_id,
                "planned again",
                f"attempt {change.attempt}: {change.cause} {change.detail}",
            )
        case Ended():
            took = f"in {format_seconds(change.delay_s)}" if change.delay_s is not None else ""
            details = " ".join(filter(None, (took, change.cause, change.detail)))
            return _STATE_STYLE[change.state], change.task_id, change.state.value, details
        case NodeJoined(node=node):
            return "cyan", node.node, "joined", _node(node)
        case NodeLost():
            return "red", change.node, "lost", change.cause
        case _:
            return "", "?", type(change).__name__, ""


def _work(task: TaskSubmitted) -> str:
    deadline = f", within {format_seconds(task.deadline_s)}" if task.deadline_s else ""
    return f"{task.samples} x {task.model} from {task.device}{deadline}"


def _node(node: NodeAnnounced) -> str:
    details = [node.role.value]
    if node.slots:
        details.append(f"{node.slots} slots")
    if node.link1_capacity_bps:
        details.append(f"link 1 {format_rate(node.link1_capacity_bps)}")
    if node.link2_capacity_bps:
        details.append(f"link 2 {format_rate(node.link2_capacity_bps)}")
    if node.reachable_edges is not None:
        details.append(f"reaches {', '.join(node.reachable_edges) or 'no edge'}")
    if node.models:
        details.append(f"runs {', '.join(f'{p.model} in {format_seconds(sum(p.layer_s))}' for p in node.models)}")
    return ", ".join(details)


def placement_text(placement: Placement) -> str:
    """`device+edge+cloud via e1, cut after maxpool_1 and maxpool_3`."""
    if placement.edge is None:
        return "device only"
    cuts = f"cut after {placement.cut1_name}"
    if placement.cut2 != placement.cut1:
        cuts += f" and {placement.cut2_name}"
    return f"{placement.kind.value} via {placement.edge}, {cuts}"


def parts_text(parts: Parts) -> str:
    """`device 40 ms, link 1 6 ms, ...`, parts that are zero left out."""
    named = {
        "device": parts.device_s,
        "link 1": parts.link1_s,
        "edge": parts.edge_s,
        "link 2": parts.link2_s,
        "cloud": parts.cloud_s,
        "result": parts.result_s,
    }
    return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in named.items() if seconds)
