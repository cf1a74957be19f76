"""A region's view as plain numbers, for the web page and `deepar top --json`.

Times in seconds of the region's clock, rates in bits/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bus.messages import TaskState
from bus.values import Role, Route
from deploy.monitor.region_view import LinkUse, NodeView, RegionView
from deploy.monitor.task_view import TaskView
from planner.learning.lessons import AnyLesson, name_of

WAITING_SHOWN = 50
LESSONS_SHOWN = 50


def report(view: RegionView, *, since: int = 0, lines_since: int = 0, max_lines: int = 80) -> dict[str, Any]:
    """The state of the region, with only the tasks and lines that are newer than view version `since` and line `lines_since`.

    Pass the returned `version` and `last_line` as these arguments to get the next changes.
    """
    lines = [line for line in view.lines if line.number > lines_since]
    waiting = view.live(TaskState.WAITING, TaskState.SCHEDULED)
    return {
        "region": view.region,
        "version": view.version,
        "now_s": round(view.now_s, 3),
        "records": view.records,
        "unreadable": view.unreadable,
        "planner": {
            "name": view.log.planner,
            "standing": view.standing,
            "silent_s": view.silent_s,
            "epoch": view.log.epoch,
            "decisions": view.seq,
            "dropped": view.log.dropped,
        },
        "counts": counts(view),
        "flow": view.flow(),
        "delay_s": delays(view),
        "prediction_error": {"median": _rounded(view.errors.median), "tasks": len(view.errors)},
        "nodes": [_node(view, node) for role in (Role.DEVICE, Role.EDGE, Role.CLOUD) for node in view.role(role)],
        "tasks": [task_report(task) for task in changed_tasks(view, since)],
        "waiting": [
            {"task_id": task.task_id, "for": view.waits_for(task), "start_s": _rounded(task.start_s)}
            for task in waiting[:WAITING_SHOWN]
        ],
        "waiting_more": max(0, len(waiting) - WAITING_SHOWN),
        # None: as in the report before
        "learned": learned(view) if view.lessons_version > since or not since else None,
        "learned_more": max(0, len(view.lessons) - LESSONS_SHOWN),
        "lines": [
            {"number": n.number, "at_s": round(n.at_s, 3), "who": n.who, "what": n.what, "details": n.details}
            for n in lines[-max_lines:]
        ],
        "last_line": view.lines[-1].number if view.lines else 0,
    }


def changed_tasks(view: RegionView, since: int) -> list[TaskView]:
    """The tasks that changed after a version, in the order of their changes."""
    found = []
    for task in reversed(view.tasks.values()):
        if task.version <= since:
            break
        found.append(task)
    return found[::-1]


def counts(view: RegionView) -> dict[str, int]:
    """Number of tasks in each state; ended states count all tasks read so far."""
    live = dict.fromkeys((state for state in TaskState if not state.ended), 0)
    for task in view.live():
        live[task.state] += 1
    return {state.value: view.ended[state] if state.ended else live[state] for state in TaskState}


def delays(view: RegionView) -> dict[str, float | None]:
    """Delay from admission to end: mean over all completed tasks, percentiles (nearest rank) over the recent ones."""
    completed = view.ended[TaskState.COMPLETED]
    recent = sorted(view.recent_delays_s)
    return {
        "mean": _rounded(view.delay_sum_s / completed if completed else None),
        **{f"p{percent}": _rounded(_percentile(recent, percent)) for percent in (50, 90, 99)},
    }


def learned(view: RegionView) -> list[dict[str, Any]]:
    """What the planner learned last: the estimates, with the tasks that taught them."""
    return [lesson_json(lesson) for lesson in view.lessons.newest(LESSONS_SHOWN)]


def lesson_json(lesson: AnyLesson) -> dict[str, Any]:
    """An estimate with its last observation, and the tasks that taught it."""
    return {"what": name_of(lesson.value), **lesson.value.model_dump(mode="json"), "tasks": list(lesson.tasks)}


def task_report(task: TaskView) -> dict[str, Any]:
    """Fields of one task; `predicted` and `measured` are busy times by station."""
    placement = task.placement
    return {
        "task_id": task.task_id,
        "device": task.device,
        "model": task.model,
        "samples": task.samples,
        "state": task.state.value,
        "attempt": task.attempt,
        "done": task.done,
        "kind": placement.kind.value if placement else None,
        "edge": placement.edge if placement else None,
        "cut1": placement.cut1_name if placement else None,
        "cut2": placement.cut2_name if placement else None,
        "routes": [_route(route) for route in placement.routes] if placement and placement.routes else None,
        "link1_bps": placement.link1_bps if placement else 0,
        "link2_bps": placement.link2_bps if placement else 0,
        "admitted_s": round(task.admitted_s, 3),
        "start_s": _rounded(task.start_s),
        "end_s": _rounded(task.end_s),
        "wait_s": _rounded(task.wait_s),
        "predicted_delay_s": _rounded(task.predicted_delay_s),
        "delay_s": _rounded(task.delay_s),
        "error": _rounded(task.error),
        "predicted_rest_s": _rounded(task.predicted_rest_s),
        "measured_rest_s": _rounded(task.measured_rest_s),
        "predicted": task.predicted.model_dump() if task.predicted else None,
        "measured": task.measured.model_dump() if task.measured else None,
        "session": task.session.model_dump() if task.session else None,
        "cause": task.cause,
    }


def _route(route: Route) -> dict[str, Any]:
    return route.model_dump(mode="json", exclude={"stations_s"})


def _node(view: RegionView, node: NodeView) -> dict[str, Any]:
    announced = node.announced
    entry: dict[str, Any] = {
        "name": announced.node,
        "role": announced.role.value,
        "standing": node.standing,
        "heard_ms": node.heard_ms,
        "tasks": view.tasks_on(node),
        "models": [profile.model for profile in announced.models],
    }
    if announced.role is Role.EDGE:
        entry |= {
            "slots": announced.slots,
            "slot_holders": view.slot_holders(announced.node),
            "link1": _link(view.link(announced.node, 1)),
            "link2": _link(view.link(announced.node, 2)),
        }
    return entry


def _link(use: LinkUse) -> dict[str, Any]:
    return {"capacity_bps": use.capacity_bps, "granted_bps": use.granted_bps, "grants": use.granted}


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
