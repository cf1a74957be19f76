"""Writes the snapshots of one spell of leading: each after its decision was read back, bit by bit, while deciding goes on.

An image of the state is taken with the decision (`planner.core.snapshot`). When that stands in the log, the image is
written as
parts and, behind them, the snapshot that names them; `bus.snapshots` tells what readers believe and how places take turns.
Without a snapshot a restart reads further back, so nothing that goes wrong here is a reason to stop leading.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Final

from bus import messages, snapshots, topics
from bus.errors import BusError
from bus.messages import Decision, Message, Snapshot, SnapshotPart
from bus.port import Position
from bus.snapshots import key_of
from planner.core.snapshot import Image, spliced
from planner.service.region_context import SnapshotContext

PART_BYTES: Final = 250_000
"""Some two hundred tasks, which take two milliseconds to write out."""


class SnapshotWriter:
    """One snapshot at a time: taken with a decision, proven, written."""

    def __init__(self, context: SnapshotContext) -> None:
        self.context = context
        self._taken: tuple[Snapshot, Image] | None = None  # until it is written, or could not be
        self._proven: asyncio.Queue[int] = asyncio.Queue()  # the offset of its decision
        self._newest: Snapshot | None = None  # of the region, as far as the log proves it; looked up when it is needed
        self._written: set[str] = set()  # digests of what was written here and not yet read back

    def decided(self, decision: Decision) -> None:
        """A decision is about to be written: take an image of the state after it, where one is due.

        One is due after `snapshot_every` decisions, or as many as tasks are live where these are more: so it costs at most
        about what the decisions themselves cost, whatever the size of the state.
        """
        context = self.context
        every = max(context.snapshot_every, context.core.live_tasks)
        if self._taken is not None or decision.seq < context.snapshot_seq + every:
            return
        context.snapshot_seq = decision.seq
        image = Image(context.core)
        leader = {"planner": context.name, "lease_s": context.lease_s, "identity": context.demanded}
        snapshot = Snapshot(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            offset=0,  # known once it is read back
            now_s=decision.now_s,
            inputs=decision.inputs,
            ledger_hash=decision.ledger_hash,
            state=image.head | {"leader": leader},
        )
        self._taken = snapshot, image

    def proven(self, seq: int, offset: int) -> None:
        """A decision was read back."""
        if self._taken is not None and self._taken[0].seq == seq:
            self._proven.put_nowait(offset)

    def wrote(self, payload: bytes) -> bool:
        """Whether a record is of this planner's own snapshots; asked once of each."""
        name = snapshots.digest(payload)
        known = name in self._written
        self._written.discard(name)
        return known

    async def covers(self, offset: int) -> bool:
        """Whether a planner that finds the log begin at this offset could go on by the newest snapshot. Raises `BusError`."""
        if self._newest is None:
            self._newest = await self._look()
        return self._newest is not None and self._newest.offset >= offset

    async def run(self) -> None:
        """Write what is proven, until cancelled."""
        while True:
            offset = await self._proven.get()
            assert self._taken is not None
            snapshot, image = self._taken
            try:
                await self._write(snapshot.model_copy(update={"offset": offset}), image)
            except BusError as error:
                self.context.log.warning("snapshot not written", seq=snapshot.seq, error=str(error))
            self._taken = None

    async def _write(self, snapshot: Snapshot, image: Image) -> None:
        """The parts, what a larger one has left behind them, and the snapshot itself. Raises `BusError`."""
        before = self._newest if self._newest is not None else await self._look()
        place = 0 if before is None else (before.place + 1) % snapshots.PLACES
        widths = [0] * snapshots.PLACES
        if before is not None:
            widths = [*before.widths, *widths][: snapshots.PLACES]
        self._written.clear()  # what was not read back by now may as well be looked at
        pieces = image.pieces(self.context.part_bytes)
        lists = next(pieces)
        first, names = 0, list[str]()
        for following in pieces:  # each is made JSON of when the one before is written; the last goes with the snapshot
            part = SnapshotPart(region=snapshot.region, seq=snapshot.seq, part=len(names) + 1, state={})
            payload = spliced(messages.encode(part), lists)
            position = await self._send(part, payload, key_of(snapshot.region, place, part.part))
            first = first if names else position.offset
            names.append(snapshots.digest(payload))
            lists = following
        for number in range(len(names) + 1, widths[place] + 1):
            await self._send(snapshot, None, key_of(snapshot.region, place, number))
        widths[place] = len(names)
        snapshot = snapshot.model_copy(
            update={"place": place, "widths": tuple(widths), "first": first, "parts": tuple(names)}
        )
        payload = spliced(messages.encode(snapshot), lists)
        await self._send(snapshot, payload, key_of(snapshot.region, place))
        self._newest = snapshot

    async def _look(self) -> Snapshot | None:
        """The newest snapshot of the region that the log proves: its place is not taken."""
        context = self.context
        async with aclosing(snapshots.found(context.bus, context.region)) as candidates:
            async for one in candidates:
                reader = await snapshots.reader_behind(context.bus, one.snapshot)
                if reader is not None:
                    await reader.close()
                    return one.snapshot
        return None

    async def _send(self, message: Message, payload: bytes | None, key: str) -> Position:
        context = self.context
        if payload is not None:
            self._written.add(snapshots.digest(payload))
        headers = context.envelope.headers(message)
        return await context.bus.send(
            topics.SNAPSHOTS, payload, key=key, partition=context.region, headers=headers if payload is not None else ()
        )


__all__ = ["PART_BYTES", "SnapshotWriter"]
