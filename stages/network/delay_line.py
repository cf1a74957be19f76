"""A delay line: hands items on in the order in which they came, each when it is due.

Items in the line overlap, so a latency does not limit how much passes in a second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from stages.measuring.clock import exact_clock

T = TypeVar("T")


class DelayLine(Generic[T]):
    """A queue whose first item can be taken when it is due. One coroutine takes the items."""

    def __init__(self) -> None:
        self._items: deque[tuple[float, T]] = deque()
        self._filled = asyncio.Event()

    def put(self, item: T, due_s: float) -> None:
        """Add an item that is due at `due_s` on the loop's clock, and not before the items ahead of it are taken."""
        self._items.append((due_s, item))
        self._filled.set()

    async def first(self) -> T:
        """Wait until the first item is due and return it; `pop` removes it."""
        clock = exact_clock()
        while True:
            while not self._items:
                self._filled.clear()
                await self._filled.wait()
            due_s, item = self._items[0]
            if due_s <= (now := clock()):
                return item
            await asyncio.sleep(due_s - now)

    def pop(self) -> None:
        """Remove the first item."""
        self._items.popleft()

    def clear(self) -> None:
        """Remove all items."""
        self._items.clear()

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self._items)

    def __len__(self) -> int:
        return len(self._items)
