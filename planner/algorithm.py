"""Algorithm 1: where, and when, should a task start?

For an arriving task every pair of (edge, family) is a candidate, at every known start: now, and the predicted end of each
task that runs or is scheduled. A start is worth `w + delta_t`; the least is taken. Made precise:

* A reservation must fit during its whole interval [start, start + w). Its grants are the least free bandwidth over the
  interval, and w depends on the grants; so begin with what is free at the start, compute w, look at the interval, and repeat
  until nothing changes. Grants only fall, so w only grows and it ends.
* cut1 > 0 needs the device for the whole interval; while it is taken, only cut1 = 0 is tried. That, too, only goes one way.
* Only ends *on the same edge or device* are candidate starts. Let s be an end elsewhere, and s' < s the last instant before
  it at which something was freed here, or now. Between s' and s what is free here only falls, so it is least over [s', s + w)
  where it is least over [s, s + w); whatever fits at s fits at s' with no smaller grant, and is done earlier. So s loses.

Bounds, which change the time this takes but not its result: w at full caps bounds every start of a pair from below. Pairs and
starts are taken from a heap by that bound plus delta_t, until it exceeds the best found.

Ties: the earlier start, then the family, then the edge by name, then cut1, then cut2.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Final

from bus.values import Objective
from planner.cost import PlatformRow
from planner.ledger import SHORTEST_S, DeviceAccount, EdgeAccount
from planner.search import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, CutSearch

EVERY_FAMILY: Final = frozenset({DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE})
_SLACK: Final = 1.0 + 1e-12  # a bound may be off by rounding; a candidate that could tie is not cut off


@dataclass(frozen=True, slots=True)
class EdgeOption:
    """An edge that a task may use: its account, and the prepared search through it."""

    account: EdgeAccount
    search: CutSearch
    max_link1_bps: int  # min of the task's B1, the device's own limit and the edge's capacity
    max_link2_bps: int  # min of the task's B2 and the edge's capacity


@dataclass(frozen=True, slots=True)
class Request:
    """A task as Algorithm 1 sees it. `edges` are E_i, those of them that are there, in order of name."""

    task_id: str
    samples: int
    input_bytes: int | None  # G(0) where it is not the model's
    device_row: PlatformRow
    device_search: CutSearch  # without edge and cloud: w_0
    device: DeviceAccount | None  # its reservations; None: nobody computes there
    edges: tuple[EdgeOption, ...]
    objective: Objective


@dataclass(frozen=True, slots=True)
class Choice:
    """A start that fits: what to reserve, from when, and how long it will take."""

    family: int
    edge: str | None
    cut1: int
    cut2: int
    link1_bps: int
    link2_bps: int
    start_s: float  # ledger time
    delay_s: float  # w


Key = tuple[float, float, int, str, int, int]
"""What is minimised: w + delta_t, then the tie-breaks."""


class Algorithm:
    """Algorithm 1 over one task and the ledger as it stands at `now`. Policies restrict it, or call `at` themselves."""

    __slots__ = ("now", "request")

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.now = now

    def best(
        self,
        families: Iterable[int] = EVERY_FAMILY,
        *,
        device_computes: bool = True,
        delayed: bool = True,
    ) -> Choice | None:
        """The best candidate of some families, or None when there is none.

        Without `device_computes` only cut1 = 0 is considered (and not `DEVICE`). Without `delayed` the edges are
        considered now or not at all, as in lines 6-8 left out; the device alone still waits for itself.
        """
        request, now = self.request, self.now
        families = frozenset(families)
        objective, samples, input_bytes = request.objective, request.samples, request.input_bytes
        device = request.device
        best: Choice | None = None
        best_value = float("inf")
        best_key: Key | None = None
        if DEVICE in families and device_computes:
            best = self.on_device()
            if best is not None:
                best_key = self.key(best)
                best_value = best_key[0]
        # a lower bound for every pair, the same work done once for edges of a kind
        bounds: dict[tuple[CutSearch, int, int, int], float | None] = {}
        heap: list[tuple[float, int, str, float, int, EdgeOption, float]] = []
        for option in request.edges:
            b1, b2 = option.max_link1_bps, option.max_link2_bps
            if b1 < 1:
                continue
            search = option.search
            for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
                if family not in families or (family != DEVICE_EDGE and b2 < 1):
                    continue
                if family != DEVICE_CLOUD and option.account.slots < 1:
                    continue
                probe = (search, family, b1, b2 if family != DEVICE_EDGE else 0)
                if probe in bounds:
                    least = bounds[probe]
                else:
                    found = search.best(family, b1, b2, samples, objective, input_bytes, device_computes)
                    least = bounds[probe] = None if found is None else found[0]
                if least is not None and least <= best_value * _SLACK:
                    heap.append((least, family, option.account.name, now, 0, option, least))
        heapify(heap)
        ends: list[float] = []
        if device is not None and device_computes and delayed:
            ends = sorted({r.end_s for r in device.reservations.values() if r.end_s > now})
        while heap:
            bound, family, name, start, next_end, option, least = heap[0]
            if bound > best_value * _SLACK:
                break
            choice = self._at(option, family, start, device_computes, best_value)
            if choice is not None:
                key = self.key(choice)
                if best_key is None or key < best_key:
                    best, best_key, best_value = choice, key, key[0]
            if delayed:
                following = _next_start(option, family, start)
                while next_end < len(ends) and ends[next_end] <= start:
                    next_end += 1
                if next_end < len(ends) and ends[next_end] < following:
                    following = ends[next_end]
                value = following - now + least
                if value <= best_value * _SLACK and following != float("inf"):
                    heapreplace(heap, (value, family, name, following, next_end, option, least))
                    continue
            heappop(heap)
        return best

    def on_device(self) -> Choice | None:
        """Everything on the device, as soon as it is free for so long."""
        request, now = self.request, self.now
        delay = request.device_search.device_s(request.samples, request.objective)
        if delay is None:
            return None
        start, layers = now, request.device_row.layers
        if request.device is not None:
            for r in sorted(request.device.reservations.values(), key=lambda r: (r.start_s, r.seq)):
                if r.start_s >= start + max(delay, SHORTEST_S):
                    break
                if r.end_s > start:
                    start = r.end_s
        return Choice(DEVICE, None, layers, layers, 0, 0, start, delay)

    def at(self, option: EdgeOption, family: int, start_s: float, *, device_computes: bool = True) -> Choice | None:
        """One pair at one start, with the largest grants that fit during the whole interval; None if it cannot be."""
        return self._at(option, family, start_s, device_computes, float("inf"))

    def key(self, choice: Choice) -> Key:
        """What is minimised."""
        return (
            choice.start_s - self.now + choice.delay_s,
            choice.start_s,
            choice.family,
            choice.edge or "",
            choice.cut1,
            choice.cut2,
        )

    def _at(
        self, option: EdgeOption, family: int, start: float, device_computes: bool, give_up: float
    ) -> Choice | None:
        """`at`, abandoned as soon as its value exceeds `give_up`."""
        request = self.request
        account = option.account
        timeline = account.timeline
        times, slots = timeline.times, timeline.slots
        wants_slot, wants_link2 = family != DEVICE_CLOUD, family != DEVICE_EDGE
        i = bisect_right(times, start) - 1
        if wants_slot and slots[i] < 1:
            return None
        b1 = timeline.free1[i]
        if b1 > option.max_link1_bps:
            b1 = option.max_link1_bps
        b2 = 0
        if wants_link2:
            b2 = timeline.free2[i]
            if b2 > option.max_link2_bps:
                b2 = option.max_link2_bps
            if b2 < 1:
                return None
        if b1 < 1:
            return None
        device = request.device
        if device is not None and device_computes:
            device_computes = device.free(start, start)
        give_up = give_up * _SLACK - (start - self.now)
        seen = i + 1
        search: Callable[..., tuple[float, int, int] | None] = option.search.best
        while True:
            found = search(family, b1, b2, request.samples, request.objective, request.input_bytes, device_computes)
            if found is None or found[0] > give_up:
                return None
            delay, cut1, cut2 = found
            end = start + (delay if delay > SHORTEST_S else SHORTEST_S)
            if cut1 and device is not None and not device.free(start, end):
                device_computes = False
                continue
            upto = bisect_left(times, end, seen)
            if upto == seen:
                break
            if wants_slot and min(slots[seen:upto]) < 1:
                return None
            changed = False
            least = min(timeline.free1[seen:upto])
            if least < b1:
                b1, changed = least, True
            if wants_link2:
                least = min(timeline.free2[seen:upto])
                if least < b2:
                    b2, changed = least, True
                    if b2 < 1:
                        return None
            if b1 < 1:
                return None
            seen = upto
            if not changed:
                break
        return Choice(family, account.name, cut1, cut2, b1, b2, start, delay)


def _next_start(option: EdgeOption, family: int, start: float) -> float:
    """The next instant on this edge at which something is freed and nothing this family needs is wholly taken."""
    timeline = option.account.timeline
    times, slots, free1, free2 = timeline.times, timeline.slots, timeline.free1, timeline.free2
    wants_slot, wants_link2 = family != DEVICE_CLOUD, family != DEVICE_EDGE
    for i in range(bisect_right(times, start), len(times)):
        if (
            (slots[i] > slots[i - 1] or free1[i] > free1[i - 1] or free2[i] > free2[i - 1])
            and (slots[i] or not wants_slot)
            and free1[i]
            and (free2[i] or not wants_link2)
        ):
            return times[i]
    return float("inf")
