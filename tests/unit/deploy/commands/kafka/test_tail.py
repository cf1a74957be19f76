"""`deepar tail` counts what it shows: heartbeats that it hides take no place among the last records."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bus import messages, topics
from bus.memory.bus import MemoryBus
from bus.messages import EpochOpened, Message, NodeHeartbeat, PlannerHeartbeat, TaskProgress
from deploy.commands.kafka.tail import Table, _tail
from tests.unit.deploy.monitor.test_decision_lines import admitted, decision

SHOWN = 12


async def filled(bus: MemoryBus, topic: str, heartbeats: int) -> None:
    """Records that are shown, each with heartbeats behind it, most behind the last."""
    await bus.create_topics(topics.specs([]))
    quiet: Message
    if topic == topics.DECISIONS:
        quiet = PlannerHeartbeat(region=0, epoch=1, nonce="n")
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p1", lease_s=5.0)
        shown: list[Message] = [opened, *(decision(admitted(f"t{n}"), seq=n) for n in range(1, SHOWN))]
    else:
        quiet = NodeHeartbeat(node="e1", incarnation="i")
        shown = [TaskProgress(task_id=f"t{n}", attempt=1, node="d1", done=n) for n in range(SHOWN)]
    for number, message in enumerate(shown):
        await bus.send(topic, messages.encode(message), key="0", partition=0)
        for _ in range(heartbeats if number == SHOWN - 1 else number % 3):
            await bus.send(topic, messages.encode(quiet), key="0", partition=0)


@pytest.mark.parametrize("topic", [topics.DECISIONS, topics.EVENTS])
@pytest.mark.parametrize("heartbeats", [0, 3, 700])
@pytest.mark.parametrize("last", [1, 5, SHOWN, 40])
async def test_the_last_records_are_the_last_that_are_shown(topic: str, heartbeats: int, last: int) -> None:
    written = io.StringIO()
    table = Table(topic, heartbeats=False, console=Console(file=written, width=200, no_color=True))
    bus = MemoryBus()
    async with bus:
        await filled(bus, topic, heartbeats)
        await _tail(bus, topic, f"-{last}", None, True, 0, table)
    rows = [line.split()[2] for line in written.getvalue().splitlines() if line[:2].isdigit()]
    wanted = ["p1" if n == 0 and topic == topics.DECISIONS else f"t{n}" for n in range(SHOWN)][-last:]
    assert rows == wanted


async def test_a_count_is_of_what_is_shown_and_heartbeats_count_where_they_are_asked_for() -> None:
    for heartbeats, rows in ((False, ["t0", "t1", "t2"]), (True, ["t0", "t1", "e1"])):
        written = io.StringIO()
        table = Table(topics.EVENTS, heartbeats=heartbeats, console=Console(file=written, width=200, no_color=True))
        bus = MemoryBus()
        async with bus:
            await filled(bus, topics.EVENTS, 3)
            await _tail(bus, topics.EVENTS, "start", 3, False, 0, table)
        assert [line.split()[2] for line in written.getvalue().splitlines() if line[:2].isdigit()] == rows
