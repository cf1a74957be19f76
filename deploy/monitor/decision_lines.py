"""Text lines for records of the control topics: placements, grants, and waiting tasks.

A task's placement, its grants and its start share one line: `d1 -117 Mbps-> e1 -20 Mbps-> (cloud)`. The arrow shows the
bandwidth; a node in parentheses only relays. `deploy.monitor.holdings` derives what a task waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    CircuitChanged,
    Decision,
    DecisionPart,
    Ended,
    EpochOpened,
    Learned,
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
    Rerouted,
    Retried,
    Snapshot,
    SnapshotPart,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.region_tasks import KnownTask, RegionTasks
from bus.text.units import format_count, format_rate, format_seconds
from bus.values import Parts, Role
from deploy.monitor.holdings import awaited
from deploy.monitor.phrases import STATION_NAMES, cuts_text
from planner.learning import lessons

Line = tuple[str, str, str, str]
"""style, who, what, details"""

LEGEND = (
    "A -rate-> B: reserved bandwidth; (A): only passes on; [green]green[/] works or has worked, [yellow]yellow[/] waits or "
    "is planned again, [red]red[/] failed or lost, [cyan]cyan[/] nodes, [blue]blue[/] planners"
)

_STATE_STYLE = {
    TaskState.COMPLETED: "green",
    TaskState.REJECTED: "yellow",
    TaskState.FAILED: "red",
    TaskState.EXPIRED: "magenta",
}


OnChange = Callable[[Change, KnownTask | None], None]
"""Receives each change of a decision and the task that it led to."""


def lines_of(message: Any, region: RegionTasks | None = None, on_change: OnChange | None = None) -> Iterator[Line]:
    """The lines of one message. A decision is folded into `region`, so the iterator must be consumed completely.

    `on_change` is called for each change of a decision, after it was folded.
    """
    match message:
        case Decision():
            yield from _decision(message, RegionTasks() if region is None else region, on_change)
        case DecisionPart():
            yield "dim", "planner", "part", f"{message.part} of decision {message.seq}, which follows"
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
            yield "cyan", message.node, "will drain" if message.draining else "announced", _node(message)
        case NodeLeft():
            yield "yellow", message.node, "leaves", ""
        case NodeHeartbeat():
            yield "dim", message.node, "alive", ""
        case TaskProgress():
            yield "dim", message.task_id, "progress", f"{format_count(message.done, 'sample')} done"
        case TaskCompleted():
            details = f"in {format_seconds(message.delay_s)}: {_parts_text(message.measured)}"
            yield "green", message.task_id, "completed", details
        case TaskFailed():
            yield "red", message.task_id, "failed", f"at {message.node}, {_why(message.cause, message.detail)}"
        case SnapshotPart():
            yield (
                "dim",
                f"region {message.region}",
                "snapshot",
                f"part {message.part} of that at decision {message.seq}",
            )
        case Snapshot():
            yield "dim", f"region {message.region}", "snapshot", f"at decision {message.seq}"
        case _:
            yield "", "?", type(message).__name__, ""


def _decision(decision: Decision, region: RegionTasks, on_change: OnChange | None) -> Iterator[Line]:
    """One line for a placement with its grants and its start; it includes an admission in the same decision."""
    placed = {change.task_id for change in decision.changes if isinstance(change, Placed)}
    at_once = {
        (change.task_id, change.attempt)
        for change in decision.changes
        if isinstance(change, Start) and change.task_id in placed
    }
    admitted = {change.task.task_id for change in decision.changes if isinstance(change, Admitted)}
    for change, known in region.apply(decision):
        if on_change is not None:
            on_change(change, known)
        placement = None if known is None else known.placed
        match change:
            case Admitted(task=task):
                if task.task_id not in placed:
                    yield "", task.task_id, "admitted", _work(task)
            case Placed():
                yield _placed(change, region, (change.task_id, change.attempt) in at_once, change.task_id in admitted)
            case BandwidthGrant():
                if placement is None:  # the placement was not read, so no other line shows the grant
                    ends = f"device - {change.edge}" if change.link == 1 else f"{change.edge} - cloud"
                    yield "", change.task_id, "granted", f"{format_rate(change.bps)} on link {change.link} ({ends})"
            case Start():
                if (change.task_id, change.attempt) not in at_once:
                    details = path_text(placement) if placement else f"on {change.device}"
                    yield "green", change.task_id, "starts", details
            case Moved():
                yield from _moved(change, region, decision.now_s)
            case Overran():
                late = format_seconds(max(0.0, decision.now_s - change.from_s))
                left = format_seconds(max(0.0, change.to_s - decision.now_s))
                yield "yellow", change.task_id, "overran", f"by {late} so far; given {left} more"
            case Rerouted():
                yield "green", change.task_id, "rerouted", _rerouted(change, placement)
            case Retried():
                details = f"planned again after {_why(change.cause, change.detail)}"
                yield "yellow", change.task_id, f"attempt {change.attempt}", details
            case Ended():
                yield _ended(change)
            case NodeJoined(node=node):
                yield "cyan", node.node, "drains" if node.draining else "joined", _node(node)
            case NodeLost():
                yield "red", change.node, "lost", change.cause
            case CircuitChanged():
                yield _circuit(change, decision.now_s)
            case Learned():
                yield from (("", who, "learned", text) for who, text in lessons.lines(change))
            case _:
                yield "", "?", type(change).__name__, ""


def _moved(change: Moved, region: RegionTasks, now_s: float) -> Iterator[Line]:
    """One line for a moved queue: its first task and the number of the others."""
    for task_id, start_s in zip(change.task_ids[:1], change.starts_s, strict=False):
        details = ["moved"]
        first = region.tasks[task_id]
        if first.moved_from_s is not None:
            by_s = start_s - first.moved_from_s
            details = [f"{'later' if by_s > 0 else 'earlier'} by {format_seconds(abs(by_s))}"]
            if after := awaited(region, first):
                details.append(f"after {after}")
        if more := len(change.task_ids) - 1:
            details.append(f"and {more} more {'tasks' if more > 1 else 'task'} moved with it")
        yield "yellow", task_id, f"waits {format_seconds(max(0.0, start_s - now_s))}", ", ".join(details)


def _rerouted(change: Rerouted, placed: Placed | None) -> str:
    """Where the rest of a task goes on; the device alone knows how many samples are really left."""
    left = f"{format_seconds(change.delay_s)} more expected"
    if placed is None:  # the placement was not read
        return f"to {change.placement.kind}, {left}"
    return f"{path_text(placed):<46}  {cuts_text(change.placement):<24}  {left}"


def _circuit(change: CircuitChanged, now_s: float) -> Line:
    if not change.failures:
        return "green", change.node, "works", "an attempt succeeded there again"
    times = f"{change.failures} {'attempts' if change.failures > 1 else 'attempt'} in a row failed there"
    if change.until_s is None:
        return "yellow", change.node, "failed", times
    return "red", change.node, "avoided", f"for {format_seconds(max(0.0, change.until_s - now_s))}: {times}"


def _placed(change: Placed, region: RegionTasks, at_once: bool, new: bool) -> Line:
    again = "" if change.attempt == 1 else f", attempt {change.attempt}"
    details = f"{path_text(change):<46}  {cuts_text(change.placement):<24}  {format_seconds(change.delay_s)} expected"
    if change.session is not None:
        details += f" for a sample, {change.session.rate_hz:g} a second"
    if new:
        details += f", {change.model}" if change.session is not None else f", {change.samples} x {change.model}"
    if at_once:
        return "bold green", change.task_id, "starts", details + again
    if not change.wait_s:
        return "bold", change.task_id, f"placed #{change.attempt}", details
    after = awaited(region, region.tasks[change.task_id])
    waits = f"waits {format_seconds(change.wait_s)}"
    return "bold yellow", change.task_id, waits, f"{details}{again}{after and ', after ' + after}"


def _ended(change: Ended) -> Line:
    took = f"in {format_seconds(change.delay_s)}" if change.delay_s is not None else ""
    freed = []
    if change.released_slots:
        freed.append("a slot")
    freed += [format_rate(bps) for bps in (change.released_link1_bps, change.released_link2_bps) if bps]
    frees = f"(frees {', '.join(freed)} of {change.edge})" if freed and change.edge else ""
    details = " ".join(filter(None, (took, _why(change.cause, change.detail), frees)))
    return _STATE_STYLE[change.state], change.task_id, change.state.value, details


def _why(cause: str, detail: str) -> str:
    """`node_lost: e1 was silent`: the cause and, if known, its detail."""
    return ": ".join(filter(None, (cause, detail)))


def _work(task: TaskSubmitted) -> str:
    deadline = f", within {format_seconds(task.deadline_s)}" if task.deadline_s else ""
    if task.session is not None:
        return f"session of {task.model} from {task.device}, {task.session.rate_hz:g} samples a second{deadline}"
    return f"{task.samples} x {task.model} from {task.device}{deadline}"


def _node(node: NodeAnnounced) -> str:
    details = [node.role.value]
    if node.slots:
        details.append(format_count(node.slots, "slot"))
    if node.link1_capacity_bps:
        most = "at most " if node.role is Role.DEVICE else ""
        details.append(f"link 1 {most}{format_rate(node.link1_capacity_bps)}")
    if node.link2_capacity_bps:
        details.append(f"link 2 {format_rate(node.link2_capacity_bps)}")
    if node.reachable_edges is not None:
        details.append(f"reaches {', '.join(node.reachable_edges) or 'no edge'}")
    if node.models:
        details.append(f"runs {', '.join(f'{p.model} in {format_seconds(sum(p.layer_s))}' for p in node.models)}")
    return ", ".join(details)


def path_text(placed: Placed) -> str:
    """`d1 -117 Mbps-> (e1) -20 Mbps-> cloud`: the nodes and rates of a placement; a node in parentheses only relays."""
    placement = placed.placement
    tiers = placement.kind.value.split("+")
    text = placed.device if "device" in tiers else f"({placed.device})"
    if placement.edge is not None:
        text += f" -{format_rate(placement.link1_bps)}-> "
        text += placement.edge if "edge" in tiers else f"({placement.edge})"
    if placement.uses_cloud:
        text += f" -{format_rate(placement.link2_bps)}-> cloud"
    return text


def _parts_text(parts: Parts) -> str:
    """`device 40 ms, link 1 6 ms, ...` without the parts that are zero."""
    named = {name: getattr(parts, f"{station}_s") for station, name in STATION_NAMES.items()}
    return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in named.items() if seconds)
