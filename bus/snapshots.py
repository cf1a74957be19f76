"""Where reading a region's decisions may begin: behind the newest snapshot that the log itself proves.

Whoever can write to `deepar.snapshots` could otherwise make a reader skip decisions that stand, or wait for ever for an epoch
that was never opened. So a snapshot is believed only when its decision stands at the place it names, with its hash.

That proves its coordinates (epoch, nonce, sequence, hash, offset) and not what else is in it. Planners also compare the state
with the hash; stages take it as it is.
"""

from __future__ import annotations

import structlog

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import ProtocolError
from bus.messages import Decision, Snapshot
from bus.port import Bus, Reader

SNAPSHOTS_READ = 3
"""So many of the newest snapshots are looked at; of a compacted topic the last record always remains."""
FETCH_S = 0.2

log = structlog.get_logger("snapshots")


async def newest(bus: Bus, region: int) -> list[Snapshot]:
    """The last few snapshots, the newest state first (a planner that was deposed may have written an old one last).

    What cannot be read is skipped here: the planner that leads dead-letters it, once.
    """
    where = (topics.SNAPSHOTS, region)
    end = (await bus.end_offsets(topics.SNAPSHOTS))[region]
    reader = await bus.reader([where], start={where: max(0, end - SNAPSHOTS_READ)})
    found: list[Snapshot] = []
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=FETCH_S):
                try:
                    found.append(messages.decode(topics.SNAPSHOTS, record.value))
                except ProtocolError as error:
                    log.debug("a broken snapshot is skipped", offset=record.offset, error=str(error))
    finally:
        await reader.close()
    return sorted(found, key=lambda snapshot: snapshot.seq, reverse=True)


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


async def open_decisions(bus: Bus, region: int) -> tuple[Snapshot | None, Reader]:
    """A reader of a region's decisions behind the newest snapshot that the log proves, or at the start where none is.

    Raises `BusError` where the bus cannot be reached.
    """
    where = (topics.DECISIONS, region)
    for snapshot in await newest(bus, region):
        reader = await bus.reader([where], start={where: snapshot.offset})
        try:
            if await proves(reader, snapshot):
                return snapshot, reader
        except BaseException:
            await reader.close()
            raise
        await reader.close()
        log.warning("a snapshot of what the log does not say is ignored", region=region, seq=snapshot.seq)
    return None, await bus.reader([where], start="start")


def log_behind(snapshot: Snapshot) -> DecisionLog:
    """The reading rule where a snapshot ends; what it says of the leader is taken where it is of the right kind."""
    log = DecisionLog(epoch=snapshot.epoch, nonce=snapshot.nonce, seq=snapshot.seq)
    leader = snapshot.state.get("leader")
    if isinstance(leader, dict):
        planner, lease_s, identity = (leader.get(name) for name in ("planner", "lease_s", "identity"))
        log.planner = planner if isinstance(planner, str) else ""
        log.lease_s = float(lease_s) if isinstance(lease_s, int | float) else 0.0
        log.identity = identity if isinstance(identity, str) else None
    return log
