"""The screen of `deepar top`: text for the view of a region. Pure: the same view gives the same screen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bus.messages import TaskState
from bus.text.units import format_count, format_moment, format_seconds
from bus.values import DELAY_PARTS, Parts, Role
from deploy.monitor.phrases import STATION_NAMES, error_text, signed_share, some, used_text
from deploy.monitor.region_report import counts, delays
from deploy.monitor.region_view import LinkUse, NodeView, RegionView
from deploy.monitor.task_view import TaskView
from planner.learning.lessons import name_of, text_of

# Okabe and Ito's palette, which colour-blind people can distinguish; every part also has a letter.
STATION_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#999999")
STATION_STYLE = dict(zip(DELAY_PARTS, STATION_COLOURS, strict=True))
STATION_LETTER = dict(zip(DELAY_PARTS, "D1E2Cr", strict=True))
_STATE_STYLE = {
    TaskState.RUNNING: "bold",
    TaskState.COMPLETED: "",
    TaskState.FAILED: "bold #D55E00",
    TaskState.EXPIRED: "#D55E00",
    TaskState.REJECTED: "#D55E00",
}
BAR = 24
"""Maximum width of a task's bar in terminal cells."""
WIDE = 150
"""Minimum width for full names. A narrower screen cuts off the front of task names and shows tiers as letters (D+E+C)."""
STATE_FROM, PREDICTED_FROM = 100, 80
"""Minimum widths to show the state of a task, and its predicted delay."""
SHORT_NAME = 16
FIXED_ROWS = 17
"""Rows that the header, frames and headings need."""


def screen(view: RegionView, *, rows: int = 40, columns: int = 160, per_s: float | None = None) -> RenderableType:
    """One screen of about `rows` rows and `columns` columns. `per_s`: records read per second, if known."""
    edges_and_clouds = len(view.role(Role.EDGE)) + len(view.role(Role.CLOUD))
    learned_rows = min(len(view.lessons), max(2, (rows - FIXED_ROWS) // 4))
    room = max(6, rows - FIXED_ROWS - edges_and_clouds - learned_rows - 2 * bool(learned_rows))
    waiting_rows = min(len(_waiting(view)), max(2, room // 4))
    line_rows = max(2, room // 4)
    task_rows = max(2, room - waiting_rows - line_rows)
    return Group(
        _header(view, per_s),
        _panel("nodes", _nodes(view, columns)),
        _panel("waiting", _waits(view, waiting_rows, columns)),
        _panel(_legend(), _tasks(view, task_rows, columns)),
        *([_panel("learned", _lessons(view, learned_rows))] if learned_rows else []),
        _panel("decisions", _lines(view, line_rows, columns)),
    )


def _panel(title: str | Text, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim")


def _header(view: RegionView, per_s: float | None) -> Text:
    found, spent = counts(view), delays(view)
    planner_style = "" if view.standing == "led" and view.silent_s is None else "bold #D55E00"
    text = Text.assemble(
        ("deepar top", "bold"),
        "  ",
        (view.planner_text(), planner_style),
        f", decision {view.seq:,}, {format_moment(view.now_s, 1)}",
        f", {per_s:.0f} records/s" if per_s is not None else "",
        "\n",
    )
    parts = [f"{found[state.value]:,} {state.value.lower()}" for state in TaskState if found[state.value]]
    text.append("tasks   " + (", ".join(parts) or "none yet") + "\n")
    users = [f"{count:,} on {STATION_NAMES[name]}" for name, count in view.flow().items() if count]
    text.append(f"running {', '.join(users) or 'none'}\n")
    if spent["mean"] is not None:
        named = "  ".join(f"{name} {format_seconds(value)}" for name, value in spent.items() if value is not None)
        text.append(f"delay   {named}  (admission to end)")
    else:
        text.append("delay   no task has completed yet")
    return text.append("\nerror   " + error_text(view.errors))


def _nodes(view: RegionView, columns: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1) if columns >= PREDICTED_FROM else (0, 1, 0, 0), expand=False)
    wide = columns >= WIDE
    for name, least in (("node", 7), ("role", 6), ("slots", 6), ("link 1", 30), ("link 2", 30), ("tasks", 8)):
        if wide or name != "role":
            table.add_column(name, no_wrap=True, min_width=least if wide else None)
    cells = 10 if wide else 5 if columns >= PREDICTED_FROM else 0
    for node in (*view.role(Role.EDGE), *view.role(Role.CLOUD)):
        name, role = node.announced.node, node.announced.role
        style = "" if node.standing == "joined" else "dim"
        label = name if node.standing == "joined" else f"{name} ({node.standing})"
        row: tuple[RenderableType, ...]
        working = view.tasks_on(node)
        tasks = Text(some(working, 4) if wide else str(len(working) or ""))
        if role is Role.EDGE:
            used, slots = len(view.slot_holders(name)), node.announced.slots
            slot_text = Text(f"{_blocks(used, slots)} {used}/{slots}", style=STATION_STYLE["edge"])
            links = [_link(view.link(name, 1), "link1", cells), _link(view.link(name, 2), "link2", cells)]
            row = (slot_text, *links, tasks)
        else:
            row = ("", "", "", tasks)
        table.add_row(Text(label), *([role.value] if wide else []), *row, style=style)
    devices = [_device(view, node) for node in view.role(Role.DEVICE)]
    if wide:
        table.add_row("devices", "device", "", "", "", Text(some(devices, 8)))
        return table
    return Group(table, Text(f"{' ' * table.padding[3]}devices: {some(devices, 8) or 'none'}"))


def _device(view: RegionView, node: NodeView) -> str:
    """`d1`, `d2 (2 tasks)`, `d3 (lost)`."""
    tasks = len(view.tasks_on(node))
    notes: list[str] = [] if node.standing == "joined" else [node.standing]
    notes += [format_count(tasks, "task")] if tasks else []
    return node.announced.node + (f" ({', '.join(notes)})" if notes else "")


def _link(use: LinkUse, station: str, cells: int) -> Text:
    filled = min(cells, round(use.share * cells)) or int(use.granted_bps > 0)
    return Text.assemble(
        ("█" * filled + "░" * (cells - filled) + " " * bool(cells), STATION_STYLE[station]),
        used_text(use.granted_bps, use.capacity_bps),
    )


def _waiting(view: RegionView) -> list[TaskView]:
    return view.live(TaskState.WAITING, TaskState.SCHEDULED)


def _name(task_id: str, columns: int) -> str:
    """The name of a task; on a narrow screen only its end, which distinguishes the tasks of a run."""
    return task_id if columns >= WIDE or len(task_id) <= SHORT_NAME else f"…{task_id[1 - SHORT_NAME :]}"


def _waits(view: RegionView, rows: int, columns: int) -> RenderableType:
    waiting = _waiting(view)
    if not waiting:
        return Text("no task", style="dim")
    table = Table.grid(padding=(0, 2))
    shown = waiting if len(waiting) <= rows else waiting[: rows - 1]
    for task in shown:
        when = "" if task.start_s is None else f"starts at {format_moment(task.start_s)}"
        table.add_row(
            Text(_name(task.task_id, columns)),
            Text(when),
            Text(f"for {view.waits_for(task)}", no_wrap=True, overflow="ellipsis"),
        )
    if len(shown) < len(waiting):
        table.add_row(Text(f"and {len(waiting) - len(shown):,} more", style="dim"))
    return table


def _tasks(view: RegionView, rows: int, columns: int) -> RenderableType:
    """A table of the running tasks, followed by the most recently ended ones."""
    wide, with_state, with_predicted = columns >= WIDE, columns >= STATE_FROM, columns >= PREDICTED_FROM
    running = view.live(TaskState.RUNNING)
    ended = [task for task in reversed(view.tasks.values()) if task.state.ended]
    shown = [*running[:rows], *ended[: max(0, rows - len(running))]]
    if not shown:
        return Text("no task yet", style="dim")
    longest_s = max((max(_spans(task), default=0.0) for task in shown), default=0.0)
    table = Table(box=None, padding=(0, 1), expand=False)
    headings = ["task", *(["state"] if with_state else []), "where", "waited"]
    headings += [*(["predicted", ""] if with_predicted else []), "measured", "", *(["off by"] if with_state else [])]
    for name in headings:
        table.add_column(name, no_wrap=True)
    bars = 2 if with_predicted else 1
    taken = 4 + 2 * len(headings) + SHORT_NAME + 8 + 8 * (1 + bars) + 17 * with_state
    cells = BAR if wide else max(9, min(BAR, (columns - taken) // bars))
    for task in shown:
        where = "" if task.placement is None else task.placement.kind.value
        if not wide:
            where = "+".join(STATION_LETTER.get(tier, tier) for tier in where.split("+"))
        if task.placement is not None and task.placement.edge is not None:
            where += f" {task.placement.edge}"
        if task.placement is not None and task.placement.routes is not None:
            where += f", {format_count(len(task.placement.routes), 'route')}"
        state = Text(task.state.value.lower(), style=_STATE_STYLE.get(task.state, ""))
        predicted = (_bar(task.predicted, task.predicted_delay_s, longest_s, cells), _seconds(task.predicted_delay_s))
        table.add_row(
            Text(_name(task.task_id, columns)),
            *([state] if with_state else []),
            Text(where or task.cause),
            _seconds(None if task.wait_s is None else round(task.wait_s, 4)),
            *(predicted if with_predicted else ()),
            _bar(task.measured, task.delay_s, longest_s, cells),
            _seconds(task.delay_s),
            *([signed_share(task.error)] if with_state else []),
        )
    return table


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)


def _spans(task: TaskView) -> list[float]:
    return [span for span in (task.predicted_delay_s, task.delay_s) if span is not None]


def _bar(parts: Parts | None, delay_s: float | None, longest_s: float, most: int) -> Text:
    """A bar whose length is the delay (`most` cells for the longest delay), divided among the stations by busy time.

    Busy times overlap while samples stream, so a part shows a share of the delay and not a period.
    """
    text = Text()
    if parts is None or not delay_s or not parts.total_s or not longest_s:
        return text
    cells = max(1, round(most * delay_s / longest_s))
    passed_s, drawn = 0.0, 0
    for station in STATION_NAMES:
        passed_s += getattr(parts, f"{station}_s")
        until = round(cells * passed_s / parts.total_s)
        text.append(STATION_LETTER[station] * (until - drawn), style=_on(station))
        drawn = until
    return text


def _on(station: str) -> str:
    return f"{'white' if station == 'link2' else 'black'} on {STATION_STYLE[station]}"


def _legend() -> Text:
    text = Text("tasks: ")
    for station, letter in STATION_LETTER.items():
        text.append(f" {letter} ", style=_on(station))
        text.append(f" {STATION_NAMES[station]}  ")
    return text


def _lessons(view: RegionView, rows: int) -> RenderableType:
    """The latest estimates, newest first."""
    table = Table.grid(padding=(0, 2))
    count = len(view.lessons)
    shown = view.lessons.newest(rows if count <= rows else rows - 1)
    for lesson in shown:
        value = lesson.value
        table.add_row(*(Text(text, no_wrap=True, overflow="ellipsis") for text in (name_of(value), text_of(value))))
    if len(shown) < count:
        table.add_row(Text(f"and {count - len(shown):,} more", style="dim"))
    return table


def _lines(view: RegionView, rows: int, columns: int) -> RenderableType:
    if not view.lines:
        return Text("none yet", style="dim")
    table = Table.grid(padding=(0, 2))
    for line in list(view.lines)[-rows:]:
        texts = (_name(line.who, columns), line.what, line.details)
        table.add_row(
            Text(format_moment(line.at_s), style="dim"),
            *(Text(text, no_wrap=True, overflow="ellipsis") for text in texts),
        )
    return table


def _blocks(used: int, slots: int) -> str:
    return "■" * used + "□" * (slots - used) if slots <= 8 else ""
