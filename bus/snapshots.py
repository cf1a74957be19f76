"""Snapshot reader: finds the newest complete snapshot that the decision log confirms, and reads the decisions after it.

A snapshot is a `Snapshot` record, preceded by `SnapshotPart` records for the long lists of the state. It lists the digest of
each part, so a reader detects missing parts. `deepar.snapshots` is compacted: a region's snapshots use `PLACES` places in
turn, and each place has its own keys. A snapshot that a crashed planner left incomplete replaces the oldest one only.

A false snapshot could make a reader skip valid decisions, or wait for an epoch that was never opened. A snapshot is therefore
used only if the log holds its decision at the offset that it names, with its hash. This confirms the coordinates (epoch,
nonce, sequence number, hash, offset) but not the state. Planners also compare the state with the hash; stages do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import structlog

from bus import messages, topics
from bus.decisions import DecisionLog, DecisionsLostError
from bus.errors import ProtocolError
from bus.messages import Decision, Snapshot, SnapshotPart
from bus.port import Bus, Reader

STATE_VERSION: Final = 1
"""Version of the state in a snapshot. A program with another version reads the decisions from the start."""

PLACES: Final = 3
"""Number of places. Two suffice for one writer; a deposed planner that is still writing may overwrite a third."""
WINDOW: Final = 8
"""Number of records read first, from the end; each further step back reads twice as many."""
FETCH_S: Final = 0.2
FETCHED_AT_ONCE: Final = 8

log = structlog.get_logger("snapshots")


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A snapshot on the topic whose parts have not been read yet."""

    snapshot: Snapshot
    offset: int  # on deepar.snapshots


def key_of(region: int, place: int, part: int | None = None) -> str:
    """The key of a snapshot's record, or of one of its parts (from 1 on)."""
    return f"{region}/{place}" if part is None else f"{region}/{place}/{part}"


def digest(value: bytes) -> str:
    """The digest by which a snapshot refers to a part: 128 bits."""
    return blake2b(value, digest_size=16).hexdigest()


async def found(bus: Bus, region: int) -> AsyncGenerator[StoredSnapshot]:
    """Iterate over the snapshots of a region, from the end of the topic backwards.

    Within one window the newest state comes first, since a deposed planner may have written an old snapshot last. Records
    that cannot be decoded are skipped; the leading planner dead-letters them. Raises `BusError`.
    """
    end = (await bus.end_offsets(topics.SNAPSHOTS))[region]
    window = WINDOW
    while end > 0:
        begin = max(0, end - window)
        for one in await _between(bus, region, begin, end):
            yield one
        end, window = begin, 2 * window


async def _between(bus: Bus, region: int, begin: int, end: int) -> list[StoredSnapshot]:
    where = (topics.SNAPSHOTS, region)
    reader = await bus.reader([where], start={where: begin})
    there: list[StoredSnapshot] = []
    try:
        while reader.position(where) < end and await reader.lag():
            for record in await reader.fetch(max_records=FETCHED_AT_ONCE, timeout_s=FETCH_S):
                if record.offset >= end or record.value is None:
                    continue
                try:
                    message = messages.decode(topics.SNAPSHOTS, record.value)
                except ProtocolError as error:
                    log.debug("broken snapshot skipped", offset=record.offset, error=str(error))
                    continue
                if isinstance(message, Snapshot) and message.region == region:
                    there.append(StoredSnapshot(message, record.offset))
    finally:
        await reader.close()
    return sorted(there, key=lambda one: one.snapshot.seq, reverse=True)


async def proves(reader: Reader, snapshot: Snapshot) -> bool:
    """Whether the first record of `reader`, positioned at the snapshot's offset, is the decision that the snapshot names."""
    while True:
        for record in await reader.fetch(max_records=1, timeout_s=FETCH_S):
            try:
                decision = messages.decode(topics.DECISIONS, record.value)
            except ProtocolError:
                return False
            if not isinstance(decision, Decision) or record.offset != snapshot.offset:
                return False
            said = (decision.epoch, decision.nonce, decision.seq, decision.ledger_hash)
            return said == (snapshot.epoch, snapshot.nonce, snapshot.seq, snapshot.ledger_hash)
        if await reader.lag() == 0:
            return False


async def reader_behind(bus: Bus, snapshot: Snapshot) -> Reader | None:
    """A reader of the decisions after a snapshot, or None if the log does not confirm it. Raises `BusError`."""
    where = (topics.DECISIONS, snapshot.region)
    reader = await bus.reader([where], start={where: snapshot.offset})
    try:
        if await proves(reader, snapshot):
            return reader
    except BaseException:
        await reader.close()
        raise
    await reader.close()
    log.warning(
        "snapshot ignored: the decision log does not confirm it",
        region=snapshot.region,
        seq=snapshot.seq,
        harm="none: reading starts at an older snapshot, or at the start of the log",
    )
    return None


async def whole(bus: Bus, one: StoredSnapshot) -> Snapshot | None:
    """The snapshot with its complete state, or None if a part is missing. Raises `BusError`."""
    snapshot = one.snapshot
    if not snapshot.parts:
        return snapshot
    where = (topics.SNAPSHOTS, snapshot.region)
    wanted = {name: number for number, name in enumerate(snapshot.parts)}
    parts: dict[int, dict[str, list[Any]]] = {}
    reader = await bus.reader([where], start={where: snapshot.first})
    try:
        while len(parts) < len(wanted) and reader.position(where) < one.offset and await reader.lag():
            for record in await reader.fetch(max_records=FETCHED_AT_ONCE, timeout_s=FETCH_S):
                number = None if record.value is None else wanted.get(digest(record.value))
                if number is not None and number not in parts and (lists := _lists(record.value)) is not None:
                    parts[number] = lists
                    await asyncio.sleep(0)  # decoding one takes milliseconds
    finally:
        await reader.close()
    if len(parts) < len(wanted):
        log.warning("incomplete snapshot skipped", region=snapshot.region, seq=snapshot.seq, parts=len(snapshot.parts))
        return None
    state: dict[str, Any] = {}
    for lists in (*(parts[number] for number in sorted(parts)), snapshot.state):
        for name, value in lists.items():
            if isinstance(value, list) and isinstance(state.get(name), list):
                state[name].extend(value)
            else:
                state[name] = value
    return snapshot.model_copy(update={"state": state})


def _lists(value: bytes | None) -> dict[str, list[Any]] | None:
    try:
        message = messages.decode(topics.SNAPSHOTS, value)
    except ProtocolError:
        return None
    return message.state if isinstance(message, SnapshotPart) else None


async def open_decisions(bus: Bus, region: int) -> tuple[Snapshot | None, Reader]:
    """The newest complete and confirmed snapshot of a region, and a reader of the decisions after it.

    Without such a snapshot the reader starts at the beginning. Raises `BusError`, and `DecisionsLostError` if there is no
    usable snapshot and the first decisions were deleted.
    """
    async with aclosing(found(bus, region)) as candidates:
        async for one in candidates:
            reader = await reader_behind(bus, one.snapshot)
            if reader is None:
                continue
            try:
                snapshot = await whole(bus, one)
            except BaseException:
                await reader.close()
                raise
            if snapshot is not None:
                return snapshot, reader
            await reader.close()
    return None, await reader_at_start(bus, region)


async def reader_at_start(bus: Bus, region: int) -> Reader:
    """A reader of all decisions. Raises `DecisionsLostError` if the first ones were deleted."""
    where = (topics.DECISIONS, region)
    reader = await bus.reader([where], start="start")
    if (begin := reader.position(where)) > 0:
        await reader.close()
        raise DecisionsLostError(region, 0, begin)
    return reader


def log_behind(snapshot: Snapshot, make_log: Callable[..., DecisionLog] = DecisionLog) -> DecisionLog:
    """The reading rule in the state after a snapshot. Invalid leader fields of the snapshot are ignored.

    `make_log` has the parameters of `DecisionLog`.
    """
    log = make_log(epoch=snapshot.epoch, nonce=snapshot.nonce, seq=snapshot.seq, next_offset=snapshot.offset + 1)
    leader = snapshot.state.get("leader")
    if isinstance(leader, dict):
        planner, lease_s, identity = (leader.get(name) for name in ("planner", "lease_s", "identity"))
        log.planner = planner if isinstance(planner, str) else ""
        log.lease_s = float(lease_s) if isinstance(lease_s, int | float) else 0.0
        log.identity = identity if isinstance(identity, str) else None
    return log
