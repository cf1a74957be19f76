"""`deepar explain`: the reasons for the placement of a task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import ConfigError, ProtocolError
from bus.messages import Decision, decode
from bus.text.json_text import json_text
from bus.text.units import format_moment, format_rate, format_seconds
from bus.values import Placement
from deploy.console_output import completion
from deploy.console_output.options import BootstrapFromEnv
from deploy.monitor.phrases import cut_column
from deploy.services import wiring
from deploy.services.process import run_on_uvloop
from planner.explain import Explanation
from planner.explain import explain as explain_task


def explain(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Id of the task.", autocompletion=completion.tasks)],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="Read decisions from a file: `deepar tail decisions --exit > FILE`."
        ),
    ] = None,
    region: Annotated[int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Region of the task.")] = 0,
    bootstrap_servers: BootstrapFromEnv = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Explain the placement of a task: all candidates, what each lacked, and what the start waited for.

    The decisions are read from Kafka or from a file. `deepar tail tasks --exit` lists the tasks.

    Example: `deepar explain t1 --from decisions.jsonl`
    """
    decisions = list(read_dump(source, region)) if source is not None else read_topic(bootstrap_servers, region)
    found = explain_task(decisions, task)
    if as_json:
        print(json_text(explanation_json(found)))
    else:
        show(found, Console(emoji=False))


def read_dump(path: Path, region: int) -> Iterator[Decision]:
    """The valid decisions in a dump: lines of `deepar tail decisions`, or bare records.

    Raises `ConfigError` if the file is not such a dump.
    """
    log = DecisionLog(joins=True)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--from {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--from {path}: not a text file") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            value = value.get("value", value)
            message = decode(topics.DECISIONS, json.dumps(value).encode())
        except (ValueError, AttributeError, ProtocolError) as error:
            raise ConfigError(f"{path}, line {number}: not a record of {topics.DECISIONS}: {error}") from None
        if message.region == region and isinstance(accepted := log.accept(message), Decision):
            yield accepted


def read_topic(bootstrap_servers: str | None, region: int) -> list[Decision]:
    """All valid decisions of a region on Kafka up to now."""

    async def read() -> list[Decision]:
        log = DecisionLog(joins=True)
        found: list[Decision] = []
        where = (topics.DECISIONS, region)
        async with wiring.kafka_bus(bootstrap_servers) as bus:
            await wiring.require_partition(bus, region)
            reader = await bus.reader([where], start="start")
            try:
                while await reader.lag():
                    read = [log.read(record) for record in await reader.fetch(timeout_s=0.5)]
                    found += [message for message in read if isinstance(message, Decision)]
            finally:
                await reader.close()
        return found

    return run_on_uvloop(read())


def explanation_json(found: Explanation) -> dict[str, Any]:
    """The JSON object described in docs/json.md, including the history of the task."""
    decided = None
    if found.decided is not None:
        placed = found.decided
        decided = {
            "at_s": found.decided_at_s,
            "attempt": placed.attempt,
            "policy": placed.policy,
            "objective": placed.objective.value,
            "start_in_s": placed.wait_s,
            "delay_s": placed.delay_s,
            "placement": _placement_json(placed.placement),
            "parts": placed.parts.model_dump(),
        }
    return {
        "task_id": found.task_id,
        "state": found.state,
        "decided": decided,
        "candidates": [
            {
                "placement": None if c.placement is None else _placement_json(c.placement),
                "edge": c.edge,
                "family": c.family,
                "start_in_s": c.start_in_s,
                "delay_s": c.delay_s,
                "lacked": c.lacked,
                "chosen": c.chosen,
            }
            for c in found.candidates
        ],
        "waited_for": list(found.waited_for),
        "waits_for": list(found.waits_for),
        "waiting_since_s": found.waiting_since_s,
        "story": list(found.story),
    }


def _placement_json(placement: Placement) -> dict[str, Any]:
    return placement.model_dump(mode="json")


LACKED_BESIDE_FROM = 120
"""Minimum terminal width to show what a candidate lacked in the table instead of below it."""


def _cut_names(where: Placement) -> str:
    return cut_column(where.kind, where.cut1_name, where.cut2_name)


def _any_of(names: Sequence[str]) -> str:
    return ", or ".join(names) or "a usable node"


def show(found: Explanation, console: Console) -> None:
    """Print the explanation on a terminal."""
    console.print(f"[bold]{found.task_id}[/] is {found.state}", highlight=False)
    for line in found.story:
        console.print(f"  {line}", highlight=False)
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
    table = Table(
        title=f"Candidates at {format_moment(found.decided_at_s or 0.0, 3)}, best start of each",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "edge", "cut after", "starts in", "takes", "done in", "granted"):
        table.add_column(heading, justify="right" if heading.endswith(("in", "takes")) else "left", no_wrap=True)
    beside = console.width >= LACKED_BESIDE_FROM
    if beside:
        table.add_column("lacked at once")
    notes = []
    for c in found.candidates:
        lacked = [c.lacked] if beside else []
        where = c.placement
        if where is None or c.start_in_s is None or c.delay_s is None:
            table.add_row("", c.edge or "", c.family, "never", "", "", "", *lacked)
            notes.append(f"{c.edge or ''} {c.family}: {c.lacked}")
            continue
        if c.lacked:
            notes.append(f"{c.edge or ''} {_cut_names(where)}: {c.lacked}")
        table.add_row(
            "=>" if c.chosen else "",
            c.edge or "",
            _cut_names(where),
            format_seconds(c.start_in_s),
            format_seconds(c.delay_s),
            format_seconds(c.start_in_s + c.delay_s),
            ", ".join(format_rate(bps) for bps in (where.link1_bps, where.link2_bps) if bps),
            *lacked,
        )
    console.print(table)
    if notes and not beside:
        console.print("What each lacked for an immediate start:", highlight=False)
        for note in notes:
            console.print(f"  {note.strip()}", highlight=False, markup=False)
    if found.waited_for:
        console.print(f"It waited for {', '.join(found.waited_for)}.", highlight=False)
