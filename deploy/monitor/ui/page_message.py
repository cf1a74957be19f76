"""The message to the browser: the report of a region, with the display text of every number.

The page formats no number itself, so `deepar ui`, `deepar top` and `deepar tail` show the same text for the same value.
"""

from __future__ import annotations

from typing import Any

from bus.messages import TaskState
from bus.text.units import format_count, format_moment, format_rate, format_seconds, format_share
from bus.values import Role
from deploy.monitor.phrases import STATION_NAMES, place_text, signed_share, taught_by, used_text
from deploy.monitor.region_report import LESSONS_SHOWN, report
from deploy.monitor.region_view import RegionView
from deploy.monitor.task_view import TaskView
from planner.learning.lessons import AnyLesson, name_of, text_of


def page_message(view: RegionView, *, since: int = 0, lines_since: int = 0) -> dict[str, Any]:
    """A report (see `deploy.monitor.region_report.report`) with an entry `texts` wherever the page shows numbers."""
    message = report(view, since=since, lines_since=lines_since)
    message["texts"] = _header(view, message)
    for node in message["nodes"]:
        node["texts"] = _node(node)
    for task in message["tasks"]:
        task["texts"] = _task(view.tasks[task["task_id"]])
    for task in message["waiting"]:
        starts = "" if task["start_s"] is None else f", starts at {format_moment(task['start_s'])}"
        task["text"] = f"for {task['for']}{starts}"
    if message["learned"] is not None:
        message["learned"] = [_lesson(lesson) for lesson in view.lessons.newest(LESSONS_SHOWN)]
    for line in message["lines"]:
        line["at"] = format_moment(line["at_s"])
    return message


def _header(view: RegionView, message: dict[str, Any]) -> dict[str, Any]:
    numbers = [("time", format_moment(message["now_s"], 1)), ("decisions", f"{message['planner']['decisions']:,}")]
    numbers += [(TaskState(name).value.lower(), f"{count:,}") for name, count in message["counts"].items() if count]
    numbers += [
        (f"{name} delay", format_seconds(delay_s))
        for name, delay_s in message["delay_s"].items()
        if delay_s is not None
    ]
    if view.errors.median is not None:
        numbers.append(("prediction error", format_share(view.errors.median)))
    waiting = len(message["waiting"]) + message["waiting_more"]
    lessons = len(view.lessons)
    return {
        "planner": view.planner_text(),
        "learned": f"the last {LESSONS_SHOWN} of {lessons:,}" if lessons > LESSONS_SHOWN else "",
        "numbers": numbers,
        "waiting": f"{format_count(waiting, 'task')}, and what each waits for" if waiting else "no task",
        "devices": format_count(len(view.role(Role.DEVICE)), "device"),
    }


def _node(node: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {"tasks": format_count(len(node["tasks"]), "task")}
    if "slots" in node:
        texts["slots"] = f"{len(node['slot_holders']):,} of {format_count(node['slots'], 'slot')}"
        for name in ("link1", "link2"):
            link = node[name]
            texts[name] = used_text(link["granted_bps"], link["capacity_bps"])
            texts[f"{name}_grants"] = {task: format_rate(bps) for task, bps in link["grants"].items()}
    return texts


def _lesson(lesson: AnyLesson) -> dict[str, str]:
    """One estimate: what it is about, its values, and what taught it."""
    return {"what": name_of(lesson.value), "text": text_of(lesson.value), "source": f"from {taught_by(lesson.tasks)}"}


def _task(task: TaskView) -> dict[str, Any]:
    where = place_text(task.placement) if task.placement else task.cause or "not placed"
    work = f"{format_count(task.samples, 'sample')} of {task.model} from {task.device}"
    return {
        "end": task.state.value.lower() if task.delay_s is None else format_seconds(task.delay_s),
        "error": signed_share(task.error),
        "title": f"{work}: {where}",
        "predicted": _busy(task, "predicted"),
        "measured": _busy(task, "measured"),
    }


def _busy(task: TaskView, which: str) -> dict[str, str]:
    """Text for the busy time of each station and for the delay; "-" if unknown."""
    parts, rest_s, delay_s = (
        (task.predicted, task.predicted_rest_s or 0.0, task.predicted_delay_s)
        if which == "predicted"
        else (task.measured, task.measured_rest_s, task.delay_s)
    )
    texts = {name: "-" if parts is None else format_seconds(getattr(parts, f"{name}_s")) for name in STATION_NAMES}
    rest = "-" if parts is None or rest_s is None else format_seconds(rest_s)
    return {**texts, "rest": rest, "delay": "-" if delay_s is None else format_seconds(delay_s)}
