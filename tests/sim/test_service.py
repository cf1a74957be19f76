"""The planner's service killed anywhere, frozen, raced and restarted, in virtual time (G1, G3, G4)."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import InvariantError
from bus.faults import Faults
from bus.memory import MemoryBroker
from bus.messages import Decision, Ended, NodeHeartbeat, NodeLost, Snapshot, TaskState
from loadgen.virtual_loop import run_virtual
from planner import leading
from planner.service import PlannerService, Standing
from tests.sim.planners import Process, Story, Town, town

TASKS = 8
IDS = {f"t{number}" for number in range(TASKS)}
HORIZON_S = 3600.0


async def _mortal(place: Town, fuses: list[int], **more: Any) -> list[Process]:
    """Planners one after the other, each killed at its step; the last one lives."""
    lived = []
    for number, fuse in enumerate(fuses):
        process = place.start(f"p{number}", fuse=fuse, **more)
        lived.append(process)
        died = asyncio.create_task(process.bus.died.wait())
        await asyncio.wait({died, process.task}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        await process.stop()
    lived.append(place.start("last", **more))
    return lived


async def _killed(fuses: list[int], timeout_s: float = 600.0, **more: Any) -> tuple[Story, Process, int]:
    async with town() as place:
        planners = asyncio.create_task(_mortal(place, fuses, **more))
        await place.submit(range(TASKS))
        lived = await planners
        await place.until_ended(TASKS, timeout_s)
        last = lived[-1]
        async with asyncio.timeout(60.0):
            while last.service.standing is not Standing.LEADING:
                await asyncio.sleep(0.1)
        story = await place.story()
        assert last.service.core.state_hash == story.core.state_hash
        last.service.core.validate()
        return story, last, lived[0].bus.steps


def _steps_of_a_life() -> int:
    """How many steps a planner takes for the whole of `TASKS` tasks."""

    async def run() -> int:
        async with town() as place:
            process = place.start()
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            return process.bus.steps

    return run_virtual(run(), horizon_s=HORIZON_S)


def test_killed_at_any_step_it_forgets_nothing_and_decides_nothing_twice() -> None:
    steps = _steps_of_a_life()
    assert steps > 80
    tried = 0
    for fuse in range(1, steps, 2 if steps < 250 else steps // 100):
        story, last, _ = run_virtual(_killed([fuse], snapshot_every=5), horizon_s=HORIZON_S)
        story.check(IDS)
        assert last.service.decisions <= len(story.decisions)
        tried += len(story.opened)
    assert tried > 60


@pytest.mark.parametrize("seed", range(8))
def test_killed_again_and_again(seed: int) -> None:
    random = Random(seed)
    fuses = [random.randrange(1, 100) for _ in range(12)]
    story, _, _ = run_virtual(_killed(fuses, snapshot_every=random.choice((1, 3, 1000))), horizon_s=HORIZON_S)
    story.check(IDS)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_among_real_stages(seed: int) -> None:
    random = Random(seed)

    async def run() -> tuple[Story, Town]:
        async with town(real=True) as place:
            fuses = [random.randrange(1, 90) for _ in range(8)]
            planners = asyncio.create_task(_mortal(place, fuses, snapshot_every=6))
            await place.submit(range(TASKS))
            await planners
            return await place.until_ended(TASKS), place

    story, place = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert {state for states in story.ends.values() for state in states} == {TaskState.COMPLETED}
    assert sorted(place.shown) == sorted((task_id, sample) for task_id in IDS for sample in range(10))


@pytest.mark.parametrize("seed", range(4))
def test_a_bus_that_loses_acknowledgements_and_records_and_doubles_them(seed: int) -> None:
    async def run() -> tuple[Story, str]:
        faults = Faults(random=Random(seed), lost_ack=0.05, lost_post=0.05, duplicate=0.05, late=0.2, late_s=0.3)
        broker = MemoryBroker()
        async with town(broker) as place:
            place.start("a", snapshot_every=4)
            broker.faults = faults
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            broker.faults = None
            await asyncio.sleep(5.0)
            return await place.story(), place.processes[0].service.core.state_hash

    story, ended_with = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert story.core.state_hash == ended_with
    assert len(story.opened) > 1  # it had to doubt itself


# --- several planners ------------------------------------------------------------------------------------------------


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


# --- snapshots -------------------------------------------------------------------------------------------------------


async def _with_snapshot(place: Town, count: int = TASKS) -> Story:
    first = place.start("first", snapshot_every=4)
    await place.submit(range(count))
    story = await place.until_ended(count)
    await asyncio.sleep(1.0)
    await first.kill()
    return story


def test_a_restart_reads_only_what_stands_behind_the_last_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[Story, Process, list[int]]:
        async with town() as place:
            before = await _with_snapshot(place)
            read: list[int] = []
            fold = place.core().fold
            assert fold is not None
            second = place.start("second")
            original = second.service._fold_in

            def counted(decision: Decision) -> None:
                read.append(decision.seq)
                original(decision)

            monkeypatch.setattr(second.service, "_fold_in", counted)
            while second.service.standing is not Standing.LEADING:
                await asyncio.sleep(0.1)
            return before, second, read

    story, second, read = run_virtual(run(), horizon_s=HORIZON_S)
    assert len(story.decisions) > 10
    assert len(read) < 4
    assert second.service.core.state_hash == story.core.state_hash


def test_a_standby_that_begins_at_a_snapshot_respects_the_lease_it_did_not_read() -> None:
    async def run() -> list[str]:
        async with town() as place:
            first = place.start("first", lease_s=8.0, snapshot_every=2)
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            second = place.start("second", lease_s=0.5)
            await asyncio.sleep(30.0)
            assert first.service.standing is Standing.LEADING
            assert second.service.standing is Standing.STANDING_BY
            assert second.service.decision_log.planner == "first"
            return [opened.planner for opened in (await place.story()).opened]

    assert run_virtual(run(), horizon_s=HORIZON_S) == ["first"]


async def _planted_snapshot(change: dict[str, Any]) -> tuple[Story, Process]:
    async with town() as place:
        before = await _with_snapshot(place)
        reader = await place.bus.reader([(topics.SNAPSHOTS, 0)], start="start")
        newest = messages.decode(topics.SNAPSHOTS, (await reader.fetch())[-1].value)
        await reader.close()
        assert isinstance(newest, Snapshot)
        await place.tell(topics.SNAPSHOTS, newest.model_copy(update=change), "0")
        second = place.start("second")
        await asyncio.sleep(10.0)
        assert second.service.standing is Standing.LEADING
        assert second.service.core.state_hash == before.core.state_hash
        await place.submit(range(100, 104))
        return await place.until_ended(TASKS + 4, 20.0), second


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 10_000},  # of a decision that was never written
        {"offset": 10_000, "seq": 10_000},
        {"nonce": "somebody-else", "seq": 10_000},
        {"ledger_hash": "0" * 32, "seq": 10_000},
        {"state": {"version": 99}, "seq": 10_000},  # of a newer program
        {"state": {}, "seq": 10_000},
    ],
)
def test_a_snapshot_that_the_log_does_not_prove_is_not_believed(change: dict[str, Any]) -> None:
    story, _ = run_virtual(_planted_snapshot(change), horizon_s=HORIZON_S)
    story.check(IDS | {f"t{number}" for number in range(100, 104)})


@pytest.mark.parametrize("topic", [topics.SNAPSHOTS, topics.DECISIONS])
def test_garbage_is_dead_lettered_once_however_often_planners_start(topic: str) -> None:
    async def letters(place: Town) -> list[str]:
        reader = await place.bus.reader([(topics.DEAD_LETTER, 0)], start="start")
        return [record.key or "" for record in await reader.fetch(timeout_s=0.0)]

    async def run() -> list[str]:
        async with town() as place:
            await place.bus.send(topic, b"\x80", key="x", partition=0)  # while nobody leads
            for number in range(3):
                planner = place.start(f"p{number}", snapshot_every=4)
                await place.submit(range(4 * number, 4 * number + 4))
                await place.until_ended(4 * number + 4)
                await place.bus.send(topic, b"{}", key="x", partition=0)
                await asyncio.sleep(1.0)
                await place.submit([100 + number])  # the next decision says that it was read
                await asyncio.sleep(2.0)
                await planner.kill()
            return await letters(place)

    found = run_virtual(run(), horizon_s=HORIZON_S)
    assert len(found) == 4
    assert len(set(found)) == 4


# --- leases of nodes -------------------------------------------------------------------------------------------------


def test_a_planner_that_was_frozen_declares_nobody_lost_whose_heartbeats_lie_unread() -> None:
    async def run(beat: bool) -> list[str]:
        async with town() as place:
            await place.announce(lease_s=4.0)
            process = place.start("only")
            await asyncio.sleep(1.0)
            process.bus.freeze()

            async def hearts() -> None:
                while True:
                    for node in ("c1", "e1", "e2", "d1", "d2", "d3"):
                        await place.tell(topics.EVENTS, NodeHeartbeat(node=node, incarnation=f"{node}-1"), node)
                    await asyncio.sleep(1.0)

            beating = asyncio.create_task(hearts()) if beat else None
            await asyncio.sleep(30.0)
            process.bus.thaw()
            await asyncio.sleep(8.0)
            if beating is not None:
                beating.cancel()
            lost = [c.node for d in (await place.story()).decisions for c in d.changes if isinstance(c, NodeLost)]
            return sorted(lost)

    assert run_virtual(run(True), horizon_s=HORIZON_S) == []
    assert run_virtual(run(False), horizon_s=HORIZON_S) == ["c1", "d1", "d2", "d3", "e1", "e2"]


def test_inputs_that_change_nothing_are_recorded_as_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "CHECKPOINT_EVERY", 50)

    async def run() -> Story:
        async with town() as place:
            place.start("only")
            await asyncio.sleep(1.0)
            for _ in range(240):
                await place.tell(topics.EVENTS, NodeHeartbeat(node="e1", incarnation="e1-1"), "e1")
            await asyncio.sleep(1.0)
            return await place.story()

    story = run_virtual(run(), horizon_s=HORIZON_S)
    empty = [decision for decision in story.decisions if not decision.changes]
    assert len(empty) == 4
    assert story.decisions[-1].inputs[topics.EVENTS] >= 190


# --- planted faults: the checks above can fail -----------------------------------------------------------------------


class _Gullible(DecisionLog):
    """Ignores epochs, as a reader without the rule would."""

    def accept(self, message: Any) -> Any:
        if isinstance(message, Decision):
            self.seq = message.seq
            return message
        return super().accept(message)


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


def test_planted_a_reader_that_ignores_epochs_is_found_out() -> None:
    with pytest.raises((AssertionError, InvariantError)):
        run_virtual(_two_decide(_Gullible()), horizon_s=HORIZON_S)


def test_planted_a_planner_that_commits_before_it_decides_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = leading.Lead._decided

    async def too_early(self: Any, changes: Any, now_s: float) -> None:
        if any(isinstance(change, Ended) for change in changes):
            self.service.inputs[topics.TASKS] += 1  # as if the next task were done with
        await decided(self, changes, now_s)

    monkeypatch.setattr(leading.Lead, "_decided", too_early)
    found = 0
    for fuse in range(60, 120, 10):
        try:
            story, _, _ = run_virtual(_killed([fuse], 20.0), horizon_s=HORIZON_S)
            story.check(IDS)
        except (AssertionError, InvariantError, TimeoutError):
            found += 1
    assert found


def test_planted_a_planner_that_believes_any_snapshot_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def believes(self: Any, reader: Any, snapshot: Snapshot) -> bool:
        await reader.fetch(max_records=1)
        return True

    monkeypatch.setattr(PlannerService, "_proves", believes)
    with pytest.raises((AssertionError, InvariantError, TimeoutError)):
        run_virtual(_planted_snapshot({"seq": 10_000, "nonce": "never-written"}), horizon_s=HORIZON_S)
