"""Several planners for one region: they race, take over and stand by, in virtual time (G3, G4)."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any

import pytest

from bus import topics
from bus.decisions import DecisionLog, DecisionUnreadableError
from bus.errors import InvariantError
from bus.messages import Decision
from bus.values import Role
from deploy.services.wiring import make_work
from loadgen.sim.virtual_loop import run_virtual
from planner.service.service import Standing
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.sim.planners import Process, Story, Town, town
from tests.sim.world import profile

TASKS = 8
IDS = {f"t{number}" for number in range(TASKS)}
HORIZON_S = 3600.0


@pytest.mark.parametrize(("planners", "seed"), [(2, 1), (2, 2), (4, 3), (4, 4)])
def test_racing_planners_take_turns_and_every_epoch_has_one_owner(planners: int, seed: int) -> None:
    random = Random(seed)

    async def run() -> tuple[Story, Town]:
        async with town() as place:
            for number in range(planners):
                place.start(f"p{number}", lease_s=0.5, snapshot_every=7)
            submitting = asyncio.create_task(place.submit(range(TASKS), gap_s=2.0))
            for _ in range(15):
                leaders = [p for p in place.processes if p.service.standing is Standing.LEADING]
                for leader in leaders[:1]:
                    leader.bus.freeze()
                    await asyncio.sleep(random.uniform(0.1, 3.0))
                    leader.bus.thaw()
                await asyncio.sleep(random.uniform(0.0, 0.5))
            await submitting
            return await place.until_ended(TASKS), place

    story, _ = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    epochs = [opened.epoch for opened in story.opened]
    assert epochs == sorted(set(epochs))
    assert len(epochs) >= 5
    assert len({opened.planner for opened in story.opened}) >= 2
    assert "stale_epoch" in story.dropped


async def _takeover(end: str) -> tuple[Story, Process, Process, float]:
    async with town() as place:
        first = place.start("first")
        await place.submit(range(4))
        second = place.start("second")
        await asyncio.sleep(3.0)
        assert (first.service.standing, second.service.standing) == (Standing.LEADING, Standing.STANDING_BY)
        clock = asyncio.get_running_loop().time
        began_s = clock()
        match end:
            case "killed":
                await first.kill()
            case "frozen":
                first.bus.freeze()
            case _:
                await first.stop()
        while second.service.standing is not Standing.LEADING:
            await asyncio.sleep(0.01)
        took_s = clock() - began_s
        await place.submit(range(4, 8))
        if end == "frozen":
            first.bus.thaw()
            await asyncio.sleep(5.0)
            assert first.service.standing is Standing.STANDING_BY
        return await place.until_ended(TASKS), first, second, took_s


@pytest.mark.parametrize(("end", "least_s", "most_s"), [("killed", 0.8, 1.5), ("frozen", 0.8, 1.5), ("left", 0.0, 0.3)])
def test_the_second_planner_takes_over(end: str, least_s: float, most_s: float) -> None:
    story, _, second, took_s = run_virtual(_takeover(end), horizon_s=HORIZON_S)
    story.check(IDS)
    assert least_s <= took_s <= most_s
    assert [opened.planner for opened in story.opened] == ["first", "second"]
    assert second.service.core.state_hash == story.core.state_hash
    if end == "frozen":
        assert "stale_epoch" in story.dropped


def test_a_planner_that_is_told_to_takes_over_from_one_that_is_well_and_only_once() -> None:
    async def run() -> Story:
        async with town() as place:
            first = place.start("first")
            await place.submit(range(4))
            second = place.start("second", take_over=True)
            await asyncio.sleep(2.0)
            assert first.service.standing is Standing.STANDING_BY
            assert second.service.standing is Standing.LEADING
            await place.submit(range(4, 8))
            return await place.until_ended(TASKS)

    story = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert [opened.planner for opened in story.opened] == ["first", "second"]


async def _two_decide(log: DecisionLog) -> Story:
    """The first cannot read decisions any more, and goes on deciding next to the second."""
    async with town() as place:
        first = place.start("first")
        await place.submit(range(2))
        first.bus.sees.clear()
        place.start("second", take_over=True)
        await place.submit(range(2, TASKS))
        await place.until_ended(TASKS)
        first.bus.sees.set()
        await asyncio.sleep(2.0)
        assert first.service.standing is Standing.STANDING_BY
        return await place.story(log)


def test_what_a_planner_decides_that_does_not_know_of_its_end_is_not_obeyed() -> None:
    story = run_virtual(_two_decide(DecisionLog()), horizon_s=HORIZON_S)
    story.check(IDS)
    assert story.dropped.count("stale_epoch") > 8


class _Gullible(DecisionLog):
    """Ignores epochs, as a reader without the rule would."""

    def accept(self, message: Any) -> Any:
        if isinstance(message, Decision):
            self.seq = message.seq
            return message
        return super().accept(message)


def test_planted_a_reader_that_ignores_epochs_is_found_out() -> None:
    with pytest.raises((AssertionError, InvariantError)):
        run_virtual(_two_decide(_Gullible()), horizon_s=HORIZON_S)


def test_a_planner_that_stands_by_and_a_stage_end_where_they_cannot_read_a_decision() -> None:
    """They are of an older version: the one must not take over with a state of the past, the other must not seem ready."""

    async def run() -> None:
        async with town(played=False) as place:
            place.start("newer", lease_s=60.0)
            older = place.start("older", lease_s=60.0)
            settings = NodeSettings(name="d9", role=Role.DEVICE)
            node = Node(place.bus, settings, ModelledRunner([profile(Role.DEVICE)]))
            stage = asyncio.create_task(node.run(make_work(node)))
            while older.service.standing is not Standing.STANDING_BY or not node.status.joined:
                await asyncio.sleep(0.1)
            log = older.service.context.decision_log
            fields = {"v": 1, "type": "decision", "epoch": log.epoch, "nonce": log.nonce, "seq": log.seq + 1}
            fields["changes"] = [{"type": "teleported"}]
            await place.bus.send(topics.DECISIONS, json.dumps(fields).encode(), key="0", partition=0)
            for ending in (stage, older.task):
                await asyncio.wait([ending], timeout=60.0)
                error: BaseException | None = ending.exception()
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                assert isinstance(error, DecisionUnreadableError)
            place.processes.clear()

    run_virtual(run(), horizon_s=HORIZON_S)
