"""The shaper: delays frames so that each task stays within its granted link rate.

A task sends over a link at its granted rate, which is fixed for the placement (the paper's b1 and b2). The shaper emulates
the link with a clock: `n` bytes that are ready at `ready_s` have crossed at

    free = max(free, ready) + 8 n / rate

and are passed to the bus at that time, so that the receiver sees them when they would arrive. These deadlines are absolute,
so late timers do not add up, and idle time earns no credit. A guard limits the burst after a late timer: in any sliding
second, at most one second's worth of the granted rate is sent, and at most one second's worth of the link's capacity.

A link whose bandwidth follows a trace has no fixed rate to book with: there, `stages.network.shares` says when bytes have
crossed, without a guard.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from functools import lru_cache

from bus.values import BITS_PER_BYTE
from stages.measuring.clock import exact_clock
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.shares import LinkShares, Share

GUARD_S = 1.0
"""Length of the sliding window in which the guard limits the rate."""

CLOCK_S = 0.000_5
"""Added to the guard's second: the time between reading the clock and passing bytes to the bus."""

FRAME_S = (0.0025, 0.020)
"""Range of link time per frame; short frames let tasks share a link evenly and stop quickly."""

MIN_FRAME_BYTES = 4096
"""Lower limit on slow links, where smaller frames would spend too much of the rate on frame heads."""

FRAME_COST_S = 0.000_010
"""The sender's fixed cost per frame."""

_CANDIDATES = 256
_NO_LIMIT_BPS = 1 << 60
_HEAD_VARIES_BYTES = 20


@lru_cache(maxsize=1024)  # the search takes a quarter of a millisecond, and tasks of a model repeat its arguments
def frame_bytes(rate_bps: int, sample_bytes: int, max_bytes: int, *, head_bytes: int = 160) -> int:
    """How much data a frame should carry, for samples of `sample_bytes` on a link of `rate_bps`.

    The result is a whole number of samples, or the n-th part of a sample. `head_bytes` is the approximate size of a frame
    without its data. A shaped link loses rate to frame heads, and to the end of each second where no whole frame fits. Among
    the sizes that take between 2.5 and 20 ms of link time, the one with the smallest loss is chosen.
    """
    second_bytes = rate_bps * GUARD_S / BITS_PER_BYTE
    most = max(min(MIN_FRAME_BYTES, max_bytes), min(max_bytes, int(second_bytes * FRAME_S[1])))
    least = min(most // 2, max(MIN_FRAME_BYTES, int(second_bytes * FRAME_S[0])))  # leaves several sizes to choose from
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

    # Head sizes vary by some bytes; judge each size by its worst case.
    heads = (head_bytes - _HEAD_VARIES_BYTES, head_bytes + _HEAD_VARIES_BYTES)
    return min(sizes, key=lambda size: (max(lost(size, head) for head in heads), -size))


class _Guard:
    """Limits what is sent in any sliding second to one second's worth of `rate_bps`."""

    def __init__(self, rate_bps: int) -> None:
        self.rate_bps = rate_bps
        self._sent: deque[tuple[float, int]] = deque()
        self._bytes = 0

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """The earliest time, not before `when_s`, at which `size_bytes` may be sent."""
        budget = max(self.rate_bps * GUARD_S / BITS_PER_BYTE, size_bytes) + 1e-6
        within = self._bytes
        for sent_s, sent_bytes in self._sent:
            if within + size_bytes <= budget:
                break
            when_s = max(when_s, sent_s + GUARD_S + CLOCK_S)
            within -= sent_bytes
        return when_s

    def record_sent(self, size_bytes: int, when_s: float) -> None:
        """Record that `size_bytes` are sent now, at `when_s`; drop entries that are older than the window."""
        while self._sent and self._sent[0][0] + GUARD_S + CLOCK_S <= when_s:
            self._bytes -= self._sent.popleft()[1]
        self._sent.append((when_s, size_bytes))
        self._bytes += size_bytes


class Link:
    """One link of a node, shared by its tasks: device-edge or edge-cloud. `capacity_bps` 0 means unlimited.

    What was sent arrives after the latency of the played network. `cross` does not wait for that: the sender does.
    """

    def __init__(self, capacity_bps: int = 0, network: PlayedNetwork = NO_NETWORK) -> None:
        self.capacity_bps = capacity_bps
        self.network = network
        self.sent_bytes = 0
        self.shares: LinkShares | None = None  # where a trace sets the bandwidth
        self._begin_s = 0.0
        if network.trace is not None:
            clock = exact_clock()
            self._begin_s = clock()
            self.shares = LinkShares(network.trace, clock)
        self._guard = _Guard(capacity_bps) if capacity_bps and network.trace is None else None

    def latency_s(self, now_s: float) -> float:
        """The one-way latency now, by the loop's clock; a trace begins when the link is made."""
        return self.network.latency_at(now_s - self._begin_s)

    def grant(self, rate_bps: int) -> Grant:
        """A share of `rate_bps` for one task. Raises ValueError unless positive."""
        return Grant(self, rate_bps)

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """The earliest time, not before `when_s`, at which the link's capacity allows `size_bytes`."""
        return self._guard.earliest(size_bytes, when_s) if self._guard else when_s

    def record_sent(self, size_bytes: int, when_s: float) -> None:
        """Record that `size_bytes` were sent at `when_s`."""
        self.sent_bytes += size_bytes
        if self._guard:
            self._guard.record_sent(size_bytes, when_s)


class Grant:
    """One task's share of one link, for one attempt."""

    def __init__(self, link: Link, rate_bps: int) -> None:
        if rate_bps <= 0:
            raise ValueError(f"a grant needs a positive rate, not {rate_bps} bit/s")
        self.link = link
        self.rate_bps = rate_bps
        self.sent_bytes = 0
        self.guarded = False  # whether the guard delayed the last frame
        self._free_s = float("-inf")
        self._guard = _Guard(rate_bps if link.shares is None else _NO_LIMIT_BPS)
        self._share = Share(rate_bps)

    def book(self, size_bytes: int, ready_s: float) -> float:
        """Queue bytes that are ready at `ready_s`; return the time when they will have crossed the link."""
        self._free_s = max(self._free_s, ready_s) + size_bytes * BITS_PER_BYTE / self.rate_bps
        return self._free_s

    async def carried(self, shares: LinkShares, size_bytes: int, ready_s: float) -> float:
        """As `book`, on a link with a trace: wait until the bytes have crossed."""
        return await shares.carry(self._share, size_bytes * BITS_PER_BYTE, ready_s)

    def rest(self) -> None:
        """Give this share of a link with a trace to the other tasks until the next bytes are to be sent."""
        if self.link.shares is not None:
            self.link.shares.rest(self._share)

    def earliest(self, size_bytes: int, when_s: float) -> float:
        """The earliest time, not before `when_s`, that the guards of the grant and of its link allow."""
        return self.link.earliest(size_bytes, self._guard.earliest(size_bytes, when_s))

    def record_sent(self, size_bytes: int, when_s: float) -> None:
        """Record that `size_bytes` were sent at `when_s`."""
        self.sent_bytes += size_bytes
        self._guard.record_sent(size_bytes, when_s)
        self.link.record_sent(size_bytes, when_s)


async def cross(grants: tuple[Grant, ...], size_bytes: int, ready_s: float) -> float:
    """Wait until `size_bytes` have crossed every link of `grants` in order; return that time.

    The links form a pipeline: while one frame crosses the second link, the next crosses the first, because each frame is
    booked from when its bytes were ready, not from the time of the call. A task makes one call at a time.
    """
    clock = exact_clock()
    crossed_s = ready_s
    for grant in grants:
        if (shares := grant.link.shares) is None:
            crossed_s = grant.book(size_bytes, crossed_s)
        else:
            crossed_s = await grant.carried(shares, size_bytes, crossed_s)
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
        grant.record_sent(size_bytes, now)
    return now
