"""The shaper: delays frames so that each task stays within its granted link rate.

A task sends over a link at the rate it was granted, fixed for its life (the paper's b1 and b2). A link here is a clock: `n`
bytes that are ready at `ready_s` have crossed at

    free = max(free, ready) + 8 n / rate

and are handed to the bus at that moment, so that the receiver sees them when they would have arrived. Deadlines are
absolute, on the loop's clock: a timer that fires late makes the next wait shorter, and errors do not add up; idle time
earns no credit. What lateness could pile up is held down by a guard: in no sliding second does more than a second's worth
of the rate leave (nor of the whole link's capacity, whatever was granted).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from bus.values import BITS_PER_BYTE

GUARD_S = 1.0
"""The length of the sliding window in which a rate is never exceeded."""

CLOCK_S = 0.000_5
"""Between the look at the clock and the hand-over to the bus: the guard keeps this much more than a second."""

FRAME_S = (0.0025, 0.020)
"""Range of link time per frame; short frames let tasks share a link evenly and stop quickly."""

MIN_FRAME_BYTES = 4096
"""On slow links a frame may take longer: below this, frame heads eat the goodput."""

FRAME_COST_S = 0.000_010
"""Sender's fixed cost per frame, which favours large frames."""

_CANDIDATES = 256
_HEAD_VARIES_BYTES = 20


def frame_bytes(rate_bps: int, sample_bytes: int, max_bytes: int, *, head_bytes: int = 160) -> int:
    """How much data a frame should carry, for samples of `sample_bytes` on a link of `rate_bps`: a whole number of samples,
    or a sample's n-th part. `head_bytes` is about what a frame is longer than its data.

    Two things are lost on a link that is held to its rate in every second: the heads of frames, and what is left over of a
    second when no whole frame fits any more. Of the sizes that take between 2.5 and 20 ms the one that loses least is taken.
    """
    second_bytes = rate_bps * GUARD_S / BITS_PER_BYTE
    most = max(min(MIN_FRAME_BYTES, max_bytes), min(max_bytes, int(second_bytes * FRAME_S[1])))
    least = min(most // 2, max(MIN_FRAME_BYTES, int(second_bytes * FRAME_S[0])))  # something to choose from, always
    sample_bytes = max(1, sample_bytes)
    parts = math.ceil(sample_bytes / most)
    counts = range(parts, 1 + min(max(parts, sample_bytes // least), parts + _CANDIDATES))
    sizes = [math.ceil(sample_bytes / n) for n in counts]
    samples = most // sample_bytes
    sizes += [sample_bytes * n for n in range(max(2, least // sample_bytes, samples - _CANDIDATES), 1 + samples)]

    def lost(size: int, head: int) -> float:
        a_second = second_bytes / (size + head)
        left_over = 1.0 - int(a_second) / a_second if a_second >= 1.0 else 0.0
        return head / (size + head) + left_over + FRAME_COST_S * a_second / GUARD_S

    # Heads differ by some bytes (numbers grow), and one frame less a second must not hang on that.
    heads = (head_bytes - _HEAD_VARIES_BYTES, head_bytes + _HEAD_VARIES_BYTES)
    return min(sizes, key=lambda size: (max(lost(size, head) for head in heads), -size))


class _Guard:
    """At most `rate_bps` in any sliding second, judged at the moment of leaving."""

    def __init__(self, rate_bps: int) -> None:
        self.rate_bps = rate_bps
        self._sent: deque[tuple[float, int]] = deque()
        self._bytes = 0

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """The first instant, not before `when_s`, at which `size_bytes` may leave."""
        budget = max(self.rate_bps * GUARD_S / BITS_PER_BYTE, size_bytes) + 1e-6
        within = self._bytes
        for sent_s, sent_bytes in self._sent:
            if within + size_bytes <= budget:
                break
            when_s = max(when_s, sent_s + GUARD_S + CLOCK_S)
            within -= sent_bytes
        return when_s

    def note(self, size_bytes: int, when_s: float) -> None:
        """`size_bytes` leave at `when_s`, which is now: what left a second ago and more is forgotten."""
        while self._sent and self._sent[0][0] + GUARD_S + CLOCK_S <= when_s:
            self._bytes -= self._sent.popleft()[1]
        self._sent.append((when_s, size_bytes))
        self._bytes += size_bytes


class Link:
    """One link of a node, shared by its tasks: device-edge or edge-cloud. `capacity_bps` 0 means unlimited."""

    def __init__(self, capacity_bps: int = 0) -> None:
        self.capacity_bps = capacity_bps
        self.sent_bytes = 0
        self._guard = _Guard(capacity_bps) if capacity_bps else None

    def grant(self, rate_bps: int) -> Grant:
        """A share of `rate_bps` for one task. Raises ValueError unless positive."""
        return Grant(self, rate_bps)

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """When the link as a whole lets `size_bytes` pass."""
        return self._guard.earliest(size_bytes, when_s) if self._guard else when_s

    def note(self, size_bytes: int, when_s: float) -> None:
        """`size_bytes` left at `when_s`."""
        self.sent_bytes += size_bytes
        if self._guard:
            self._guard.note(size_bytes, when_s)


class Grant:
    """One task's share of one link, from its start to its end."""

    def __init__(self, link: Link, rate_bps: int) -> None:
        if rate_bps <= 0:
            raise ValueError(f"a grant of {rate_bps} bit/s lets nothing through")
        self.link = link
        self.rate_bps = rate_bps
        self.sent_bytes = 0
        self.guarded = False  # whether what left last had to wait for the guard, not only for its turn
        self._free_s = float("-inf")
        self._guard = _Guard(rate_bps)

    def book(self, size_bytes: int, ready_s: float) -> float:
        """Put bytes that are ready at `ready_s` on the link; returns when they will have crossed."""
        self._free_s = max(self._free_s, ready_s) + size_bytes * BITS_PER_BYTE / self.rate_bps
        return self._free_s

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """When the guards of the grant and of its link let `size_bytes` go."""
        return self.link.earliest(size_bytes, self._guard.earliest(size_bytes, when_s))

    def note(self, size_bytes: int, when_s: float) -> None:
        """`size_bytes` left at `when_s`."""
        self.sent_bytes += size_bytes
        self._guard.note(size_bytes, when_s)
        self.link.note(size_bytes, when_s)


async def cross(grants: tuple[Grant, ...], size_bytes: int, ready_s: float) -> float:
    """Wait until `size_bytes` have crossed every link of `grants`, one after the other; returns that moment.

    The links are stations of a pipeline: while one transfer crosses the second, the next crosses the first, because each
    is booked from when its bytes were ready, not from when the caller came round to it. One caller at a time a task.
    """
    clock = _exact_clock()
    crossed_s = ready_s
    for grant in grants:
        crossed_s = grant.book(size_bytes, crossed_s)
        grant.guarded = grant.earliest(size_bytes, crossed_s) > crossed_s
    while True:
        now = clock()
        go_s = max(crossed_s, now)
        for grant in grants:
            go_s = grant.earliest(size_bytes, go_s)
        if go_s <= now:
            break
        await asyncio.sleep(go_s - now)
    for grant in grants:
        grant.note(size_bytes, now)
    return now


def _exact_clock() -> Callable[[], float]:
    """The loop's clock. uvloop's stands still for as long as a turn of the loop takes, and counts whole milliseconds: the
    system's, which it follows, tells when bytes really leave.
    """
    loop = asyncio.get_running_loop()
    return time.monotonic if type(loop).__module__ == "uvloop" else loop.time
