"""How tasks share a link whose bandwidth follows a trace.

Where the link carries as much as all active tasks were granted, each sends at its granted rate. Where it carries less, each
gets a share in proportion to its grant. So at any moment a task sends at

    granted rate * min(1, bandwidth of the link / sum of the grants of the active tasks)

The factor is the same for all tasks. Its integral over time is the *progress* of the link, in seconds of grant: `n` bits of a
task that was granted `g` bit/s cross while the progress grows by n / g. So one number describes the link, whatever the tasks
send, and the sum of all bits is exactly the integral of the trace while the link is short of bandwidth.

A task is active from its first frame until it rests. Between two frames that were ready it stays active, so that the time
which the sender needs to make the next frame is neither lost to the task nor given to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

from stages.network.trace import Trace

CATCH_UP_S = 1.0
"""How far a frame that the sender offers late may reach back, after a timer or a process that was late."""

_EXACT_S = 1e-9
"""Tolerance of progress; rounding errors of the clock are smaller."""

_ROWS_AHEAD = 10_000
"""How many rows of a trace one prediction looks at; after those it is made again."""


class _Cursor:
    """A position in a repeated trace that only moves forward; `begin_s` is when the trace began on the clock."""

    __slots__ = ("_index", "_rows", "_trace", "until_s")

    def __init__(self, trace: Trace, begin_s: float) -> None:
        self._trace = trace
        self._rows = trace.rows
        self._index = 0
        self.until_s = begin_s + trace.rows[0].duration_s  # the end of the row

    @property
    def bps(self) -> float:
        """The bandwidth until `until_s`."""
        return self._rows[self._index].bps

    def next_row(self) -> None:
        """Move to the next row, or to the first one after the last."""
        self._index = (self._index + 1) % len(self._rows)
        self.until_s += self._rows[self._index].duration_s

    def copy(self) -> _Cursor:
        """A cursor at the same position."""
        copied = _Cursor.__new__(_Cursor)
        copied._trace, copied._rows, copied._index, copied.until_s = self._trace, self._rows, self._index, self.until_s
        return copied


class Share:
    """One task's share of the link."""

    __slots__ = ("end", "rate_bps")

    def __init__(self, rate_bps: int) -> None:
        self.rate_bps = rate_bps  # granted
        self.end = -math.inf  # the progress at which its last frame has crossed


class LinkShares:
    """The shares of one link. `clock` is the clock of the event loop, with its zero."""

    def __init__(self, trace: Trace, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._now_s = clock()  # of `_progress`
        self._cursor = _Cursor(trace, self._now_s)
        self._progress = 0.0
        self._active: set[Share] = set()
        self._active_bps = 0
        self._faster = asyncio.Event()  # pulsed when a task rests, so that waiting frames cross earlier

    async def carry(self, share: Share, bits: float, ready_s: float) -> float:
        """Wait until `bits` that were ready at `ready_s` have crossed the link; return that time.

        A task makes one call at a time.
        """
        now_s = self._clock()
        if ready_s > now_s:
            await asyncio.sleep(ready_s - now_s)
        now_s = self._advance()
        if share not in self._active:
            self._active.add(share)
            self._active_bps += share.rate_bps
        late_s = min(CATCH_UP_S, max(0.0, now_s - ready_s))
        share.end = max(share.end, self._progress - late_s * self._factor(self._cursor.bps)) + bits / share.rate_bps
        while share.end - self._progress > _EXACT_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_until(share.end)):
                    await self._faster.wait()
            now_s = self._advance()
        return now_s

    def rest(self, share: Share) -> None:
        """The task has nothing to send, or ends: the other tasks get its share."""
        if share in self._active:
            self._advance()
            self._active.remove(share)
            self._active_bps -= share.rate_bps
            self._faster.set()
            self._faster.clear()

    def _factor(self, bps: float) -> float:
        """The part of its grant that each task gets."""
        return 1.0 if bps >= self._active_bps else bps / self._active_bps

    def _advance(self) -> float:
        """Bring the progress up to now; return the time."""
        to_s, cursor = self._clock(), self._cursor
        while cursor.until_s <= to_s:
            self._progress += (cursor.until_s - self._now_s) * self._factor(cursor.bps)
            self._now_s = cursor.until_s
            cursor.next_row()
        self._progress += (to_s - self._now_s) * self._factor(cursor.bps)
        self._now_s = to_s
        return to_s

    def _seconds_until(self, progress: float) -> float:
        """How long until this progress is reached, if the tasks stay as they are."""
        left, from_s, cursor = progress - self._progress, self._now_s, self._cursor.copy()
        for _ in range(_ROWS_AHEAD):
            factor = self._factor(cursor.bps)
            gained = (cursor.until_s - from_s) * factor
            if gained >= left:
                return from_s - self._now_s + left / factor
            left -= gained
            from_s = cursor.until_s
            cursor.next_row()
        return from_s - self._now_s
