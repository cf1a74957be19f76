"""Where reading a region's decisions may begin: behind the newest snapshot that is whole and that the log itself proves.

A snapshot is a `Snapshot`, which says all but the long lists of the state, and as many `SnapshotPart`s before it as the lists
need. It names the digest of each part, so that it is whole or is none, whatever else stands in between. `deepar.snapshots` is
compacted: a region's snapshots take `PLACES` places in turn, and the keys of a place are those of its snapshot and its parts.
So one that is written half, by a planner that dies, takes the place of the oldest, and the last two stay as they are.

Whoever can write to the topic could otherwise make a reader skip decisions that stand, or wait for ever for an epoch that was
never opened. So a snapshot is believed only when its decision stands at the place it names, with its hash. That proves its
coordinates (epoch, nonce, sequence, hash, offset) and not what else is in it. Planners also compare the state with the hash;
stages take it as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
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
"""Of what a snapshot's state holds. Whoever knows another reads the decisions from their start."""

PLACES: Final = 3
"""Two would do for one writer; a planner that was deposed and does not know it yet may spoil one more."""
WINDOW: Final = 8
"""So many of the last records are looked at first, then twice as many before them, and so on."""
FETCH_S: Final = 0.2
FETCHED_AT_ONCE: Final = 8

log = structlog.get_logger("snapshots")


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A snapshot as it stands on the topic, its parts not read yet."""

    snapshot: Snapshot
    offset: int  # on deepar.snapshots


def key_of(region: int, place: int, part: int | None = None) -> str:
    """The key of a snapshot's record, or of one of its parts (from 1 on)."""
    return f"{region}/{place}" if part is None else f"{region}/{place}/{part}"


def digest(payload: bytes) -> str:
    """What a snapshot names a part by: 128 bits."""
    return blake2b(payload, digest_size=16).hexdigest()


async def found(bus: Bus, region: int) -> AsyncGenerator[StoredSnapshot]:
    """The snapshots of a region, from the last records backwards; of those that stand near each other the newest state
    first (a planner that was deposed may have written an old one last).

    What cannot be read is skipped here: the planner that leads dead-letters it, once. Raises `BusError`.
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
    """Whether the first record of `reader`, which stands at the snapshot's offset, is the decision it was taken after."""
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
    """A reader of the decisions behind a snapshot, or None where the log does not prove it. Raises `BusError`."""
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
        harm="none: reading begins at an older snapshot, or at the start of the log",
    )
    return None


async def whole(bus: Bus, one: StoredSnapshot) -> Snapshot | None:
    """The snapshot with its whole state, or None where a part is not there (any more). Raises `BusError`."""
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
                    await asyncio.sleep(0)  # reading one takes some milliseconds
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


def _lists(payload: bytes | None) -> dict[str, list[Any]] | None:
    try:
        message = messages.decode(topics.SNAPSHOTS, payload)
    except ProtocolError:
        return None
    return message.state if isinstance(message, SnapshotPart) else None


async def open_decisions(bus: Bus, region: int) -> tuple[Snapshot | None, Reader]:
    """A reader of a region's decisions behind the newest snapshot that is whole and that the log proves, or at the start
    where none is.

    Raises `BusError` where the bus cannot be reached, and `DecisionsLostError` where there is none and the start is gone.
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
    """A reader of all decisions. Raises `DecisionsLostError` where the first of them are gone."""
    where = (topics.DECISIONS, region)
    reader = await bus.reader([where], start="start")
    if (begin := reader.position(where)) > 0:
        await reader.close()
        raise DecisionsLostError(region, 0, begin)
    return reader


def log_behind(snapshot: Snapshot) -> DecisionLog:
    """The reading rule where a snapshot ends; what it says of the leader is taken where it is of the right kind."""
    log = DecisionLog(epoch=snapshot.epoch, nonce=snapshot.nonce, seq=snapshot.seq, next_offset=snapshot.offset + 1)
    leader = snapshot.state.get("leader")
    if isinstance(leader, dict):
        planner, lease_s, identity = (leader.get(name) for name in ("planner", "lease_s", "identity"))
        log.planner = planner if isinstance(planner, str) else ""
        log.lease_s = float(lease_s) if isinstance(lease_s, int | float) else 0.0
        log.identity = identity if isinstance(identity, str) else None
    return log
