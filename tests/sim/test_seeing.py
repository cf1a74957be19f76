"""What `top` and the page show of a real region in virtual time is what its topics say."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console

from bus import messages, topics
from bus.messages import Admitted, Decision, Ended, Placed, PlannerHeartbeat, Start, TaskCompleted, TaskState
from bus.port import Record
from bus.text.units import format_rate
from deploy.monitor.decision_lines import lines_of
from deploy.monitor.region_feed import follow, play_again, read_all
from deploy.monitor.region_report import report
from deploy.monitor.region_view import TOPICS, RegionView
from deploy.monitor.top import screen
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from tests.sim.world import World, WorldOptions, task, world

TASKS = 60


def sixty(region: World) -> Awaitable[object]:
    return region.replay([task(n, f"d{n % 3 + 1}", samples=6) for n in range(TASKS)], gap_s=0.02)


def held_by(core: PlannerCore) -> dict[str, tuple[int, int, int]]:
    """What the planner's own ledger says is in use now: edge -> (slots, link 1, link 2)."""
    held: dict[str, tuple[int, int, int]] = {}
    for name, edge in core.ledger.edges.items():
        running = [r for r in edge.reservations.values() if r.running]
        held[name] = (
            sum(r.slots for r in running),
            sum(r.link1_bps for r in running),
            sum(r.link2_bps for r in running),
        )
    return held


async def watched() -> tuple[World, RegionView, list[dict[str, Any]], list[Record]]:
    """A replay of sixty tasks, looked at as it goes, and every record of it."""
    async with world(WorldOptions(slots=2, link2_bps=10_000_000)) as region:
        view = RegionView()
        following = asyncio.create_task(follow(region.bus, view))
        replaying = asyncio.ensure_future(sixty(region))
        looks = []
        while not replaying.done():
            await asyncio.sleep(0.1)
            looks.append(report(view))
        await asyncio.sleep(1.0)
        following.cancel()
        return region, view, looks, await read_all(region.bus, 0)


def test_what_is_shown_of_sixty_tasks_is_what_the_topics_say() -> None:
    _, view, looks, records = run_virtual(watched())
    placed: dict[str, Placed] = {}
    admitted_s: dict[str, float] = {}
    started_s: dict[str, float] = {}
    ended: dict[str, tuple[float, Ended]] = {}
    reported: dict[str, TaskCompleted] = {}
    told = 0
    for record in records:
        assert record.topic in TOPICS
        message = messages.decode(record.topic, record.value)
        if isinstance(message, TaskCompleted):
            reported[message.task_id] = message
        if record.topic == topics.DECISIONS and not isinstance(message, PlannerHeartbeat):
            told += len(list(lines_of(message)))
        if not isinstance(message, Decision):
            continue
        for change in message.changes:
            match change:
                case Admitted(task=submitted):
                    admitted_s[submitted.task_id] = message.now_s
                case Placed():
                    placed[change.task_id] = change
                case Start():
                    started_s[change.task_id] = change.at_s
                case Ended():
                    ended[change.task_id] = (message.now_s, change)
                case _:
                    pass
    shown = {entry["task_id"]: entry for entry in report(view)["tasks"]}
    assert shown.keys() == ended.keys() == placed.keys() == reported.keys()
    assert len(shown) == TASKS
    for name, entry in shown.items():
        plan, (ended_s, end), measured = placed[name], ended[name], reported[name]
        assert entry["state"] == end.state == TaskState.COMPLETED
        assert (entry["kind"], entry["edge"]) == (plan.placement.kind, plan.placement.edge)
        assert (entry["link1_bps"], entry["link2_bps"]) == (plan.placement.link1_bps, plan.placement.link2_bps)
        assert entry["predicted"] == plan.parts.model_dump()
        assert entry["measured"] == measured.measured.model_dump()
        assert entry["delay_s"] == round(measured.delay_s, 6)
        assert entry["start_s"] == round(started_s[name], 6)
        assert entry["end_s"] == round(ended_s, 6)
        assert entry["wait_s"] == round(max(0.0, started_s[name] - admitted_s[name]), 6)
    assert report(view)["counts"]["COMPLETED"] == TASKS
    mean_s = sum(ended[name][0] - admitted_s[name] for name in ended) / TASKS
    assert abs(report(view)["delay_s"]["mean"] - mean_s) < 1e-6
    assert report(view)["last_line"] == told >= 3 * TASKS
    # the region was really seen at work, with tasks waiting for named things
    assert max(look["counts"]["RUNNING"] for look in looks) >= 3
    lacked = Counter(entry["for"].split(" of ")[0] for look in looks for entry in look["waiting"])
    assert lacked, "nobody ever waited"
    json.dumps(looks)


def test_slots_and_links_in_use_are_the_planners_ledgers() -> None:
    """Folded record by record beside the planner's own core, from the same topic."""

    async def folded() -> list[Record]:
        async with world(WorldOptions(slots=2, link2_bps=10_000_000)) as region:
            await sixty(region)
            return await read_all(region.bus, 0)

    core, view = PlannerCore(0), RegionView()
    most = {"slots": 0, "link1": 0, "link2": 0}
    for record in run_virtual(folded()):
        view.read(record)
        if record.topic != topics.DECISIONS:
            continue
        message = messages.decode(record.topic, record.value)
        if isinstance(message, Decision):
            core.fold(message)
            for edge, held in held_by(core).items():
                shown = (len(view.slot_holders(edge)), view.link(edge, 1).granted_bps, view.link(edge, 2).granted_bps)
                assert shown == held, f"after decision {message.seq}"
                most = {name: max(most[name], amount) for name, amount in zip(most, held, strict=True)}
    assert min(most.values()) > 0, most


def test_a_finished_run_played_again_shows_the_same_and_takes_its_time() -> None:
    async def again(speed: float) -> tuple[RegionView, RegionView, float, float]:
        async with world() as region:
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            await sixty(region)
            took_s = loop.time() - began_s
            live, replayed = RegionView(), RegionView()
            await follow(region.bus, live, until_end=True)
            began_s = loop.time()
            await play_again(region.bus, replayed, speed=speed)
            return live, replayed, took_s, loop.time() - began_s

    live, replayed, took_s, replay_s = run_virtual(again(2.0))
    assert report(live)["tasks"] == report(replayed)["tasks"]
    assert report(live)["nodes"] == report(replayed)["nodes"]
    assert replay_s > took_s / 2 * 0.9


def test_the_screen_names_every_running_task_and_counts_the_ended_ones() -> None:
    async def look(render: Callable[[RegionView], str]) -> tuple[RegionView, str, str]:
        async with world(WorldOptions(slots=2)) as region:
            replaying = asyncio.ensure_future(sixty(region))
            await asyncio.sleep(0.6)
            view = RegionView()
            await follow(region.bus, view, until_end=True)
            midway = render(view)
            running = [entry.task_id for entry in view.live(TaskState.RUNNING)]
            assert running
            assert all(f" {name} " in midway for name in running), midway
            for edge in ("e1", "e2"):
                row = next(line for line in midway.splitlines() if f" {edge} " in line and " edge " in line)
                assert f" {len(view.slot_holders(edge))}/2 " in row
                for link, capacity in ((view.link(edge, 1), "100 Mbps"), (view.link(edge, 2), "20 Mbps")):
                    granted_bps = link.granted_bps
                    assert f" {format_rate(granted_bps) if granted_bps else '0'} of {capacity} " in row
            await replaying
            await asyncio.sleep(1.0)
            view = RegionView()
            await follow(region.bus, view, until_end=True)
            return view, midway, render(view)

    def render(view: RegionView) -> str:
        console = Console(width=150)
        with console.capture() as capture:
            console.print(screen(view, rows=50))
        return capture.get()

    _, midway, last = run_virtual(look(render))
    assert f"{TASKS} completed" in last
    assert "running" in midway
