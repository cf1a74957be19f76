"""Reading begins behind a snapshot only where the decisions prove it."""

from __future__ import annotations

from typing import Any

import pytest

from bus import messages, snapshots, topics
from bus.memory.bus import MemoryBus
from bus.messages import Decision, EpochOpened, Snapshot, SnapshotPart
from loadgen.sim.virtual_loop import run_virtual


def decision(seq: int) -> Decision:
    return Decision(region=0, epoch=1, nonce="n", seq=seq, now_s=0, inputs={}, changes=(), ledger_hash=f"h{seq}")


def snapshot(seq: int, **more: Any) -> Snapshot:
    told = {"epoch": 1, "nonce": "n", "offset": seq, "ledger_hash": f"h{seq}"} | more
    return Snapshot(region=0, seq=seq, now_s=0, inputs={}, state={}, **told)


async def begin(*written: bytes | None) -> tuple[int | None, int]:
    """Sequence of the snapshot that is believed, and the offset of the first decision read."""
    async with MemoryBus() as bus:
        await bus.create_topics(topics.specs([]))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=1)
        for message in (opened, *(decision(seq) for seq in range(1, 6))):
            await bus.send(topics.DECISIONS, messages.encode(message), key="0", partition=0)
        for value in written:
            await bus.send(topics.SNAPSHOTS, value, key="0", partition=0)
        found, reader = await snapshots.open_decisions(bus, 0)
        return (found.seq if found else None), reader.position((topics.DECISIONS, 0))


def test_the_newest_one_that_is_proven_is_taken() -> None:
    written = [messages.encode(snapshot(2)), messages.encode(snapshot(4))]
    assert run_virtual(begin(*written)) == (4, 5)


@pytest.mark.parametrize(
    "forged",
    [
        {"seq": 900, "offset": 900},
        {"region": 7},
        {"offset": -1},
        {"nonce": "x"},
        {"epoch": 9},
        {"ledger_hash": "x"},
        {"offset": 0},
    ],
)
def test_a_forged_one_is_passed_over(forged: dict[str, Any]) -> None:
    newest = messages.encode(snapshot(5).model_copy(update=forged))
    assert run_virtual(begin(messages.encode(snapshot(3)), newest)) == (3, 4)
    assert run_virtual(begin(newest)) == (None, 0)


@pytest.mark.parametrize("garbage", [b"\x80", b"{}", None])
def test_garbage_is_passed_over(garbage: bytes | None) -> None:
    assert run_virtual(begin(messages.encode(snapshot(3)), garbage)) == (3, 4)


def part(number: int, seq: int = 4) -> bytes:
    return messages.encode(SnapshotPart(region=0, seq=seq, part=number, state={"tasks": [number, number + 0.5]}))


NAMES = tuple(snapshots.digest(part(number)) for number in (1, 2))


async def read_whole(*written: bytes | None, **more: Any) -> Any:
    """The lists of the snapshot that is believed."""
    async with MemoryBus() as bus:
        await bus.create_topics(topics.specs([]))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=1)
        for message in (opened, *(decision(seq) for seq in range(1, 6))):
            await bus.send(topics.DECISIONS, messages.encode(message), key="0", partition=0)
        head = snapshot(4, **more).model_copy(update={"state": {"version": 1, "tasks": ["last"], "ended": [1]}})
        for value in (*written, messages.encode(head)):
            await bus.send(topics.SNAPSHOTS, value, key="0", partition=0)
        found, _ = await snapshots.open_decisions(bus, 0)
        return None if found is None else found.state


WHOLE = {"version": 1, "tasks": [1, 1.5, 2, 2.5, "last"], "ended": [1]}


@pytest.mark.parametrize(
    "written",
    [
        [part(1), part(2)],
        [part(1), part(2, 3), None, b"\x80", part(1), part(2)],  # with others' records in between, and one twice
        [part(2), part(1)],  # their order is that of their names
        [b"{}", *[part(9)] * 40, part(1), part(2)],
    ],
)
def test_the_lists_of_the_parts_go_before_those_of_the_snapshot(written: list[bytes | None]) -> None:
    assert run_virtual(read_whole(*written, parts=NAMES)) == WHOLE


@pytest.mark.parametrize(
    ("written", "more"),
    [
        ([part(1)], {}),
        ([part(1), part(2, 3)], {}),  # of another snapshot
        ([part(1), part(2)[:-1]], {}),
        ([part(1), part(2)], {"first": 1}),  # it says that its parts begin later
        ([b"{}", part(2)], {"parts": (snapshots.digest(b"{}"), NAMES[1])}),  # what is named is no part
        ([part(1), part(2)], {"parts": (NAMES[0], NAMES[0], "x")}),
    ],
)
def test_a_snapshot_that_is_not_whole_is_passed_over(written: list[bytes | None], more: dict[str, Any]) -> None:
    assert run_virtual(read_whole(*written, **({"parts": NAMES} | more))) is None


def test_one_that_stands_far_back_behind_what_was_written_half_is_found() -> None:
    unfinished = [part(number, 5) for number in range(1, 60)]
    assert run_virtual(begin(messages.encode(snapshot(3)), *unfinished)) == (3, 4)
