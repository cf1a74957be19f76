"""Tables of `deepar explain`: the candidates, what was predicted and measured, and what had been learned."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bus.messages import Ended, Placed
from bus.text.units import format_count, format_moment, format_rate, format_seconds
from bus.values import Placement
from deploy.monitor.phrases import (
    STATION_NAMES,
    coded_names,
    cut_names,
    cuts_text,
    route_text,
    signed_share,
    taught_by,
    tiers_text,
)
from planner.explain import Candidate, Explanation
from planner.learning.lessons import name_of, text_of
from planner.search.cost import parts_s

LACKED_BESIDE_FROM = 140
"""Minimum terminal width to show what a candidate lacked in the table instead of below it."""

END_FROM = 100
"""Minimum terminal width to show when a candidate would be done, and to tell latency from other overheads."""


def show(found: Explanation, console: Console) -> None:
    """Print the explanation on a terminal."""
    console.print(f"[bold]{found.task_id}[/] is {found.state}", highlight=False)
    for line in found.story:
        console.print(f"  {line}", highlight=False, markup=False)
    if found.waiting_since_s is not None and found.waiting_s is not None:
        console.print(
            f"It waits for {_any_of(found.waits_for)}, since {format_moment(found.waiting_since_s, 3)} "
            f"({format_seconds(found.waiting_s)} before the last record).",
            highlight=False,
        )
    if found.decided is None:
        waited = f" It waited for {_any_of(found.waits_for)}." if found.waits_for and found.waiting_s is None else ""
        console.print(f"It was never placed.{waited}", highlight=False)
        return
    beside = console.width >= LACKED_BESIDE_FROM
    console.print(_candidate_table(found, console.width))
    notes = [f"{_where(c)}: {_notes(c)}" for c in found.candidates if _notes(c)]
    if notes and not beside:
        console.print("What each lacked for an immediate start:", highlight=False)
        for note in notes:
            console.print(f"  {note.strip()}", highlight=False, markup=False)
    for line in _batches(found.decided):
        console.print(line, highlight=False)
    if found.waited_for:
        console.print(f"It waited for {', '.join(found.waited_for)}.", highlight=False)
    if found.ended is not None and found.ended.measured is not None:
        console.print(_measured_table(found, found.decided, found.ended))
    if found.lessons:
        console.print(_learned_table(found))


def _batches(placed: Placed) -> list[str]:
    """The predicted batches of a placement, a line for each tier that computes in batches."""
    lines = []
    for tier, where, load in (
        ("edge", placed.placement.edge, placed.placement.edge_batch),
        ("cloud", "the cloud", placed.placement.cloud_batch),
    ):
        if load is None:
            continue
        share_s = getattr(placed.parts, f"{tier}_s") / placed.samples
        with_others = f"with {format_count(load.tasks - 1, 'other task')}" if load.tasks > 1 else "with no other task"
        lines.append(
            f"Predicted for {where}, {with_others}: {load.batch:.3g} samples in a batch, each with a share of "
            f"{format_seconds(share_s)}; a sample of this task every {format_seconds(load.apart * share_s)}."
        )
    return lines


def _any_of(names: Sequence[str]) -> str:
    return ", or ".join(names) or "a usable node"


def _where(candidate: Candidate) -> str:
    """`device+e1, cut after conv`: the tiers of a candidate and its cuts."""
    where = candidate.placement
    if where is None:
        return tiers_text(candidate.family, candidate.edge)
    return f"{tiers_text(where.kind.value, where.edge)}, {cuts_text(where)}"


def _cuts(where: Placement) -> str:
    """The layers after which a candidate is cut, or its routes."""
    if where.routes is not None and len(where.routes) > 1:
        return ", ".join(map(route_text, where.routes))
    if where.routes is not None:
        return ", ".join(coded_names(where, where.routes[0]))
    return ", ".join(cut_names(where.kind, where.cut1_name, where.cut2_name)) or "uncut"


def _notes(candidate: Candidate) -> str:
    """What a candidate lacked, and by how much its wait counts as longer."""
    margin = ""
    if candidate.margin_s > 0:
        margin = f"its wait counts {format_seconds(candidate.margin_s)} longer, because predicted ends are uncertain"
    return "; ".join(filter(None, (candidate.lacked, margin)))


def _candidate_table(found: Explanation, columns: int) -> Table:
    table = Table(
        title=f"Candidates at {format_moment(found.decided_at_s or 0.0, 3)}, best start of each",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    with_rest = any(c.latency_s or c.overhead_s for c in found.candidates)
    with_end, beside = columns >= END_FROM, columns >= LACKED_BESIDE_FROM
    table.add_column("", no_wrap=True)
    table.add_column("on", no_wrap=True)
    table.add_column("cut after", overflow="fold")
    rest = [] if not with_rest else ["latency", "overhead"] if with_end else ["overheads"]
    numbers = ["starts in", "takes", *rest, *(["done in"] if with_end else [])]
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("granted", overflow="fold")
    if beside:
        table.add_column("lacked at once")
    for c in found.candidates:
        where = c.placement
        lacked = [_notes(c)] if beside else []
        if where is None or c.start_in_s is None or c.delay_s is None:
            table.add_row("", tiers_text(c.family, c.edge), "", "never", *[""] * len(numbers), *lacked)
            continue
        rest_s = (c.latency_s, c.overhead_s) if with_end else (c.latency_s + c.overhead_s,)
        table.add_row(
            "=>" if c.chosen else "",
            tiers_text(where.kind.value, where.edge),
            _cuts(where),
            format_seconds(c.start_in_s),
            format_seconds(c.delay_s),
            *(format_seconds(s) if s else "" for s in rest_s if with_rest),
            *([format_seconds(c.start_in_s + c.delay_s)] if with_end else []),
            ", ".join(format_rate(bps) for bps in (where.link1_bps, where.link2_bps) if bps),
            *lacked,
        )
    return table


def _measured_table(found: Explanation, placed: Placed, ended: Ended) -> Table:
    """Each part of the delay, predicted and measured."""
    assert ended.measured is not None
    table = Table(title="Predicted and measured", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("part")
    for heading in ("predicted", "measured", "off by", ""):
        table.add_column(heading, justify="right")
    rows = [
        (name, getattr(placed.parts, f"{station}_s"), getattr(ended.measured, f"{station}_s"))
        for station, name in STATION_NAMES.items()
    ]
    if ended.delay_s is not None:
        planned_s = 0.0 if placed.overhead is None else placed.overhead.latency_s + placed.overhead.task_s
        busy_s = parts_s(ended.measured, placed)
        rows.append(("latency and overheads", planned_s, ended.delay_s - busy_s))
    for name, predicted_s, measured_s in rows:
        if predicted_s or measured_s:
            table.add_row(name, *_compared(predicted_s, measured_s))
    if ended.delay_s is not None:
        table.add_row("delay", *_compared(placed.delay_s, ended.delay_s), signed_share(found.error), style="bold")
    return table


def _compared(predicted_s: float, measured_s: float) -> tuple[str, str, str]:
    """Two times, and by how much the second differs."""
    more_s = measured_s - predicted_s
    return format_seconds(predicted_s), format_seconds(measured_s), ("+" if more_s > 0 else "") + format_seconds(more_s)


def _learned_table(found: Explanation) -> Table:
    """The estimates behind the predictions, and where they come from."""
    table = Table(title="Learned before it was placed", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("of", "estimate", "from"):
        table.add_column(heading, overflow="fold")
    for lesson in found.lessons:
        table.add_row(
            Text(name_of(lesson.value)),
            Text(text_of(lesson.value)),
            Text(taught_by(lesson.tasks)),
        )
    return table
