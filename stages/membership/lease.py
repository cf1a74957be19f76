"""The lease of a node, as the node itself counts it."""

from __future__ import annotations

import asyncio


class Lease:
    """Says whether a node may send: for half a lease after it sent the last message that the bus acknowledged."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._start_s = float("-inf")  # send time of the last acknowledged heartbeat or announcement
        self._renewed = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether the planner cannot have declared this node lost yet.

        Computed at each call, so that it is correct after the process was suspended.
        """
        return asyncio.get_running_loop().time() - self._start_s <= self.lease_s / 2

    async def gate(self) -> None:
        """Wait while this node may have been declared lost."""
        while not self.alive:
            self._renewed.clear()
            await self._renewed.wait()

    def renew(self, sent_s: float) -> None:
        """Renew the lease; it counts from `sent_s`, the time when the acknowledged message was sent."""
        self._start_s = max(self._start_s, sent_s)
        self._renewed.set()
