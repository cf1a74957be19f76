"""Throughput: what a link carries while its sender has more to send than it may, compared with what the planner granted.

Senders report what the bus acknowledged between two acknowledgements, as long as frames waited without a pause: then the
link was the bottleneck, whether it is a played one or a real one behind the shaper. Windows of a quarter of a second are
judged. Two of the last three windows clearly below the granted rate set a limit, which the node reports; the planner then
grants less. A link that carries all that is granted under a limit may have recovered, which only a higher grant can show: the
limit is raised step by step, and after a failed step more rarely.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import NamedTuple

WINDOW_S = 0.25
"""Link time that one window needs; shorter ones measure the jitter of acknowledgements."""
WINDOW_FRAMES = 4
"""Acknowledgements that one window needs."""
LOW = 0.8
"""A window that carried a smaller share of what was granted is clearly below it: heads and timers cost some percent."""
FULL = 0.95
"""A window that carried at least this share carried all that was granted."""
JUDGED = 3
"""Windows that are judged together."""
RAISE = 1.5
"""Factor of one step of recovery. A failed step costs one or two tasks a third of their link time."""
HOLD_S = 5.0
"""Time from a limit to the first step, and from one successful step to the next."""
MAX_HOLD_S = 600.0
"""Limit of that time, which doubles after each failed step; also how long a limit holds without any measurement."""


class _Window(NamedTuple):
    """What was measured in one window."""

    share: float  # carried over granted
    bps: float  # carried by all tasks together
    granted_bps: float  # to those that had more to send


class LinkThroughput:
    """The throughput of one link, over all its tasks. All times are on one clock."""

    def __init__(self) -> None:
        self._until_s = float("-inf")  # end of the last counted interval
        self._busy_s = 0.0  # link time in the open window
        self._bits = 0.0
        self._granted_bits = 0.0
        self._frames = 0
        self._windows: deque[_Window] = deque(maxlen=JUDGED)
        self._limit_bps: float | None = None
        self._wanted_bps = 0.0  # what was granted when the limit was found
        self._hold_s = HOLD_S
        self._raise_s = float("-inf")  # no step before
        self._stepped = False  # the last change was a step of recovery

    def carried(self, begin_s: float, end_s: float, bits: float, granted_bps: int) -> None:
        """Count bits that one task's frames carried in an interval in which the task always had more to send."""
        self._busy_s += max(0.0, end_s - max(begin_s, self._until_s))
        self._until_s = max(self._until_s, end_s)
        self._bits += bits
        self._granted_bits += granted_bps * (end_s - begin_s)
        self._frames += 1
        if self._busy_s >= WINDOW_S and self._frames >= WINDOW_FRAMES:
            window = _Window(
                self._bits / self._granted_bits, self._bits / self._busy_s, self._granted_bits / self._busy_s
            )
            self._busy_s = self._bits = self._granted_bits = 0.0
            self._frames = 0
            self._windows.append(window)
            self._judge(window, end_s)

    def limit_bps(self, now: float) -> int | None:
        """What the link carries, to two digits; None if it carries what is granted, or nothing was measured for long."""
        if self._limit_bps is None or now - self._until_s > MAX_HOLD_S:
            return None
        return _two_digits(self._limit_bps)

    def _judge(self, window: _Window, now: float) -> None:
        low = [one for one in self._windows if one.share < LOW]
        if window.share < LOW and len(low) >= 2:
            self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s) if self._stepped else self._hold_s
            self._limit(median(one.bps for one in low), now)
            self._wanted_bps = max(self._wanted_bps, window.granted_bps)
            self._stepped = False
        elif self._limit_bps is not None and window.share >= FULL:
            if window.bps > self._limit_bps / LOW:
                self._limit(window.bps, now)  # a task with an older grant shows that the link carries more
            elif window.granted_bps >= LOW * self._limit_bps and now >= self._raise_s:
                self._hold_s = HOLD_S if self._stepped else self._hold_s
                self._limit(RAISE * self._limit_bps, now)
                self._stepped = True
            if self._limit_bps >= FULL * self._wanted_bps:
                self._limit_bps, self._wanted_bps = None, 0.0

    def _limit(self, bps: float, now: float) -> None:
        self._limit_bps = bps
        self._raise_s = now + self._hold_s
        self._windows.clear()


def _two_digits(bps: float) -> int:
    return max(1, int(float(f"{bps:.2g}")))
