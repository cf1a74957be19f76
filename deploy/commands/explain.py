"""`deepar explain`: the reasons for the placement of a task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import ConfigError, ProtocolError
from bus.messages import Decision, decode
from bus.text.json_text import json_text
from bus.values import Placement
from deploy.console_output import completion
from deploy.console_output.explanation import show
from deploy.console_output.options import BootstrapFromEnv
from deploy.monitor.region_report import lesson_json
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
            "overhead": None if placed.overhead is None else placed.overhead.model_dump(),
        }
    ended = found.ended
    return {
        "task_id": found.task_id,
        "state": found.state,
        "decided": decided,
        "measured": None if ended is None or ended.measured is None else ended.measured.model_dump(),
        "measured_delay_s": None if ended is None else ended.delay_s,
        "error": found.error,
        "candidates": [
            {
                "placement": None if c.placement is None else _placement_json(c.placement),
                "edge": c.edge,
                "family": c.family,
                "start_in_s": c.start_in_s,
                "delay_s": c.delay_s,
                "latency_s": c.latency_s,
                "overhead_s": c.overhead_s,
                "margin_s": c.margin_s,
                "lacked": c.lacked,
                "chosen": c.chosen,
            }
            for c in found.candidates
        ],
        "waited_for": list(found.waited_for),
        "waits_for": list(found.waits_for),
        "waiting_since_s": found.waiting_since_s,
        "story": list(found.story),
        "learned": [lesson_json(lesson) for lesson in found.lessons],
    }


def _placement_json(placement: Placement) -> dict[str, Any]:
    return placement.model_dump(mode="json")
