"""Snapshot writer of one leader term: it writes the state in parts while the planner goes on deciding.

The writer copies the state together with a decision (`planner.core.snapshot`). Once that decision is read back from the
topic, it writes the parts and then the snapshot record that names them (`bus.snapshots` describes the layout). A missing
snapshot only makes a restart slower, so a failed write does not end the term.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from bus import messages, snapshots, topics
from bus.errors import BusError
from bus.messages import Decision, Message, Snapshot, SnapshotPart
from bus.port import Position
from bus.snapshots import key_of
from planner.core.snapshot import Image, spliced
from planner.service.region_context import RegionContext


class SnapshotWriter:
    """Handles one snapshot at a time: copy the state, wait until its decision is read back, write."""

    def __init__(self, context: RegionContext) -> None:
        self.context = context
        self._taken: tuple[Snapshot, Image] | None = None  # until the write has succeeded or failed
        self._confirmed: asyncio.Queue[int] = asyncio.Queue()  # offset of the decision of `_taken`
        self._newest: Snapshot | None = None  # the region's newest that the log confirms; looked up on first use
        self._written: set[str] = set()  # digests of own records not yet read back

    def copy_if_due(self, decision: Decision) -> None:
        """Copy the state if a snapshot is due. Called when a decision is about to be sent.

        A snapshot is due after `snapshot_every` decisions, or after as many decisions as there are live tasks if that is
        more. Snapshots therefore cost at most about as much as the decisions, whatever the size of the state.
        """
        context = self.context
        every = max(context.settings.snapshot_every, context.core.live_tasks)
        if self._taken is not None or decision.seq < context.snapshot_seq + every:
            return
        context.snapshot_seq = decision.seq
        image = context.core.image()
        leader = {
            "planner": context.settings.name,
            "lease_s": context.settings.lease_s,
            "identity": context.master_fingerprint,
        }
        snapshot = Snapshot(
            region=decision.region,
            epoch=decision.epoch,
            nonce=decision.nonce,
            seq=decision.seq,
            offset=0,  # set after the decision is read back
            now_s=decision.now_s,
            inputs=decision.inputs,
            ledger_hash=decision.ledger_hash,
            state=image.head | {"leader": leader},
        )
        self._taken = snapshot, image

    def decision_read_back(self, seq: int, offset: int) -> None:
        """Schedule the write if this decision, now read back at `offset`, has a snapshot."""
        if self._taken is not None and self._taken[0].seq == seq:
            self._confirmed.put_nowait(offset)

    def wrote(self, value: bytes) -> bool:
        """Whether this planner wrote the record. Forgets the record, so a second call returns False."""
        name = snapshots.digest(value)
        known = name in self._written
        self._written.discard(name)
        return known

    async def covers(self, offset: int) -> bool:
        """Whether the newest snapshot makes up for all decisions before `offset`. Raises `BusError`."""
        if self._newest is None:
            self._newest = await self._find_newest()
        return self._newest is not None and self._newest.offset >= offset

    async def run(self) -> None:
        """Write each snapshot whose decision was read back, until cancelled."""
        while True:
            offset = await self._confirmed.get()
            assert self._taken is not None
            snapshot, image = self._taken
            try:
                await self._write(snapshot.model_copy(update={"offset": offset}), image)
            except BusError as error:
                self.context.log.warning("snapshot not written", seq=snapshot.seq, error=str(error))
            self._taken = None

    async def _write(self, snapshot: Snapshot, image: Image) -> None:
        """Write the parts, tombstones for leftover parts of a larger snapshot, and the snapshot. Raises `BusError`."""
        before = self._newest if self._newest is not None else await self._find_newest()
        place = 0 if before is None else (before.place + 1) % snapshots.PLACES
        widths = [0] * snapshots.PLACES
        if before is not None:
            widths = [*before.widths, *widths][: snapshots.PLACES]
        self._written.clear()  # records not read back by now are checked like those of other writers
        pieces = image.pieces(self.context.settings.part_bytes)
        lists = next(pieces)
        first, names = 0, list[str]()
        for following in pieces:  # serialized lazily, one per write; the last piece goes into the snapshot itself
            part = SnapshotPart(region=snapshot.region, seq=snapshot.seq, part=len(names) + 1, state={})
            value = spliced(messages.encode(part), lists)
            position = await self._send(part, value, key_of(snapshot.region, place, part.part))
            first = first if names else position.offset
            names.append(snapshots.digest(value))
            lists = following
        for number in range(len(names) + 1, widths[place] + 1):
            await self._send(snapshot, None, key_of(snapshot.region, place, number))
        widths[place] = len(names)
        snapshot = snapshot.model_copy(
            update={"place": place, "widths": tuple(widths), "first": first, "parts": tuple(names)}
        )
        value = spliced(messages.encode(snapshot), lists)
        await self._send(snapshot, value, key_of(snapshot.region, place))
        self._newest = snapshot

    async def _find_newest(self) -> Snapshot | None:
        """Find the region's newest snapshot that the log confirms; the next write must not overwrite it."""
        context = self.context
        async with aclosing(snapshots.found(context.bus, context.settings.region)) as candidates:
            async for one in candidates:
                reader = await snapshots.reader_behind(context.bus, one.snapshot)
                if reader is not None:
                    await reader.close()
                    return one.snapshot
        return None

    async def _send(self, message: Message, value: bytes | None, key: str) -> Position:
        context = self.context
        if value is not None:
            self._written.add(snapshots.digest(value))
        headers = context.envelope.headers(message)
        return await context.bus.send(
            topics.SNAPSHOTS,
            value,
            key=key,
            partition=context.settings.region,
            headers=headers if value is not None else (),
        )


__all__ = ["SnapshotWriter"]
