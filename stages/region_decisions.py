"""A node's view of the region's decisions: reading them, the fences that follow from them, and the required identity."""

from __future__ import annotations

import asyncio
from typing import Any

from bus import snapshots, topics
from bus.decisions import DecisionLog, DecisionsLostError
from bus.errors import ConfigError
from bus.identity.signed_bus import satisfy_region
from bus.messages import Decision, EpochOpened, Message
from bus.port import Bus, Reader, Record
from stages.components import StageComponents
from stages.membership.settings import NodeSettings

LOST_RETRY_S = 2.0
"""Retry interval while a node waits for a snapshot that covers deleted decisions."""
WAIT_LOG_S = 60.0
"""Interval at which a waiting node logs that it still waits."""


class RegionDecisions:
    """The decisions of one region, as one node reads them: `catch_up` first, then `fetch` and `read`."""

    def __init__(self, bus: Bus, settings: NodeSettings, components: StageComponents, log: Any) -> None:
        self._bus, self._settings, self._components, self._log = bus, settings, components, log
        self.fences = components.fences(settings.remembered_ends)
        self._decisions = DecisionLog()
        self._reader: Reader | None = None  # opened by `catch_up`

    async def catch_up(self) -> None:
        """Read the decisions to their end. Where no snapshot covers deleted ones, wait until the planner writes one.

        Raises `ConfigError` where the region requires another identity than this node has.
        """
        await self.close()
        logged_s = float("-inf")
        while True:
            try:
                self._reader = await self._read_to_end()
                return
            except DecisionsLostError as error:
                now_s = asyncio.get_running_loop().time()
                if now_s - logged_s >= WAIT_LOG_S:
                    logged_s = now_s
                    self._log.error(
                        "not ready: waiting for a snapshot",
                        error=str(error),
                        remedy="the planner writes one with its next decisions (--snapshot-every); see deepar doctor",
                    )
            await asyncio.sleep(LOST_RETRY_S)

    async def fetch(self) -> list[Record]:
        """The next records of the topic; waits for them."""
        assert self._reader is not None, "catch_up opens the reader"
        return await self._reader.fetch()

    def read(self, record: Record) -> tuple[Decision, set[str]] | None:
        """The decision in a record, and the tasks of which it fenced an attempt; None for any other record.

        Raises `ConfigError` where a new planner requires another identity, `DecisionsLostError` where decisions were missed.
        """
        message = self._decisions.read(record)
        if isinstance(message, EpochOpened):
            self._check_identity()
        if not isinstance(message, Decision):
            return None
        return message, self.fences.apply(message)

    async def close(self) -> None:
        """Close the reader, if one is open."""
        if self._reader is not None:
            await self._reader.close()

    async def _read_to_end(self) -> Reader:
        """Read from the newest snapshot that the decisions confirm, else from the start.

        Raises `DecisionsLostError` where deleted decisions are not covered by a snapshot.
        """
        components, settings = self._components, self._settings
        fences, log = components.fences(settings.remembered_ends), components.decision_log(next_offset=0)
        begin, reader = await components.open_decisions(self._bus, settings.region)
        if begin is not None:
            try:
                fences.restore(begin.state)
                log = snapshots.log_behind(begin, components.decision_log)
            except (LookupError, TypeError, ValueError) as error:
                # Another version wrote it: read all decisions instead.
                self._log.warning("unusable snapshot skipped", seq=begin.seq, error=str(error))
                fences = components.fences(settings.remembered_ends)
                await reader.seek((topics.DECISIONS, settings.region), 0)
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.2):
                    message = log.read(record)
                    if isinstance(message, Decision):
                        fences.apply(message)
            self.fences, self._decisions = fences, log
            await self._wait_for_identity_rule(reader)
        except BaseException:
            await reader.close()
            raise
        return reader

    async def _wait_for_identity_rule(self, reader: Reader) -> None:
        """Check this node's identity; where it does not fit the last planner in the topic, wait for the current planner.

        A planner with another master key may have replaced the last one. Raises `ConfigError` where the current planner, too,
        requires another identity.
        """
        try:
            self._check_identity()
            return
        except ConfigError as error:
            self._log.warning(
                "identity not accepted by the last planner; waiting for the current one", error=str(error)
            )
        found = False
        while not found:
            for record in await reader.fetch(timeout_s=0.2):
                message = self._decisions.read(record)
                if isinstance(message, Decision):
                    self.fences.apply(message)
                found = found or isinstance(message, Message)
        self._check_identity()

    def _check_identity(self) -> None:
        """Check the identity. Raises `ConfigError` where the region requires proofs that this bus does not create."""
        settings = self._settings
        satisfy_region(self._bus, self._decisions.demanded, f"{settings.role.value} {settings.name}")
