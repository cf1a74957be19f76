"""Algorithm 1: the search for the place and the start of an arriving task.

The candidates are all pairs of edge and family, at every known start: now, and the predicted end of each running or scheduled
task. The algorithm takes the candidate with the least `w + delta_t`: its delay plus the time until its start. If the planner
knows how far predictions are off, delta_t grows by one deviation of the ends that the start waits for
(`planner.search.waiting`). In detail:

* A reservation must fit during its whole interval [start, start + w). Its grants are the least free bandwidth over that
  interval, but w depends on the grants. So the algorithm starts with the bandwidth that is free at the start, computes w,
  checks the interval, and repeats until nothing changes. Grants only fall and w only grows, so the loop ends.
* cut1 > 0 needs the device for the whole interval. Once the device is found busy, only cut1 = 0 is tried.
* If a task on an edge was moved to a later start `MOVES_BORNE` times, the edge offers no start before that task's start.
  That start is a candidate, too.
* A device with a limited own link has a timeline too: the grant on link 1 is the least free bandwidth on both timelines.
* Only ends *on the same edge or device* are candidate starts. Let s be an end elsewhere, and let s' < s be now or the last
  instant at which something was freed here. Between s' and s the free resources here only fall, so their minimum over
  [s', s + w) equals that over [s, s + w). Whatever fits at s fits at s' with the same grants and ends earlier, so s loses;
  the deviation of s' is not larger.

Lower bounds save time without changing the result: w at full caps is a lower bound for every start of a pair. Pairs and
starts come from a heap, ordered by this bound plus delta_t, until the bound exceeds the best value found.

Ties: the earlier start wins, then the family, the edge by name, cut1, and cut2.

A deadline is one more bound: the predicted end must not be after it. The deviation does not count there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from copy import copy
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from bus.errors import PolicyError
from bus.routes.interleave import interleaved_s
from bus.values import Objective
from planner.search.codec_search import PathSearch
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from planner.search.ledger.accounts import EdgeAccount
from planner.search.ledger.reservation import SHORTEST_S
from planner.search.ledger.timeline import Timeline
from planner.search.placements import Choice, Priced, Search, best_mix, best_way, mixed_choice, routes_of
from planner.search.request import EVERY_FAMILY, EdgeKind, EdgeOption, Request
from planner.search.waiting import Waits

_NEVER: Final = float("inf")
_MOST_TRIED: Final = 6


class _Candidate(NamedTuple):
    """A family on an edge at a start, on the heap of `Algorithm.best`.

    The first four fields order the heap. Edge and family are unique in it, so the later fields are never compared.
    """

    least: float  # lower bound of w + delta_t
    family: int
    name: str  # of the first edge
    start_s: float
    step: int  # the step of the edge's timeline that contains the start; -1: not looked up yet
    kind: EdgeKind
    full: Priced  # w and the cuts at full caps
    tried: list[tuple[int, int, float]]  # w, or the bound of it, at other grants
    accounts: tuple[EdgeAccount, ...]  # the edge; in the first round all edges of its kind


class Algorithm:
    """Algorithm 1 for one task and the ledger at `now`. Policies call `best` with restrictions, or `at`.

    Placements that are predicted to end after `deadline_s` are not candidates.
    """

    __slots__ = ("_mix", "_waits", "deadline_s", "now", "request")

    def __init__(self, request: Request, now: float, deadline_s: float = _NEVER) -> None:
        self.request = request
        self.now = now
        self.deadline_s = deadline_s  # ledger time
        deviations = request.deviations
        self._waits = Waits(deviations, request.device, now) if deviations else None
        self._mix: Search | None = None  # what finds several routes, if they are wanted

    def with_routes(self) -> Algorithm:
        """The same question for placements of several routes. Raises `PolicyError` unless the objective is pipelined."""
        if self.request.objective is not Objective.PIPELINED:
            raise PolicyError(f"several routes need objective {Objective.PIPELINED}, not {self.request.objective}")
        other = copy(self)
        other._mix = partial(best_mix, alone=self.request.alone)
        return other

    def _finder(self, search: PathSearch) -> Search:
        """What finds the best cuts, or the best mix, with a prepared search."""
        if self._mix is not None:
            return self._mix
        return CutSearch.best if search.__class__ is CutSearch else best_way

    def best(
        self,
        families: Collection[int] = EVERY_FAMILY,
        *,
        device_computes: bool = True,
        delayed: bool = True,
    ) -> Choice | None:
        """The best candidate of some families, or None if there is none.

        If `device_computes` is False, only cut1 = 0 is considered, and not `DEVICE`. If `delayed` is False, lines 6-8 of
        Algorithm 1 are skipped: edges are considered only for a start now, but `DEVICE` may still wait for the device. The
        tiers that the task allows restrict the candidates as well.
        """
        request, now, waits = self.request, self.now, self._waits
        if request.families is not EVERY_FAMILY:
            families = request.families.intersection(families)
            device_computes = device_computes and request.device_computes
        best: Choice | None = None
        most = self.deadline_s - now  # the largest predicted time until the end
        best_value = most if waits is None else _NEVER
        best_tie: tuple[float, int, str] = (_NEVER, 0, "")
        if DEVICE in families and device_computes:
            best = self.on_device()
            if best is not None:
                best_value = self.delta_s(None, best.start_s) + best.delay_s
                best_tie = (best.start_s, DEVICE, "")
        heap = self._bounds(families, device_computes, min(best_value, most))
        ends: list[float] = []
        device = request.device
        if device is not None and delayed and (device_computes or device.limited):
            ends = device.freed(now)
        while heap:
            value, family, name, start, i, kind, full, tried, accounts = heappop(heap)
            if value > best_value:
                break
            for account in accounts:
                name = account.name
                if value == best_value and (start, family, name) > best_tie:
                    break  # it can only tie, and it loses the tie; its later starts and the following edges lose as well
                timeline = account.timeline
                at = i if i >= 0 else bisect_right(timeline.times, now) - 1
                choice = None
                turn = account.turn_s() if account.first_served else now
                if start >= turn and (family == DEVICE_CLOUD or timeline.slots[at] > 0):
                    choice = self._at(account, kind, family, start, at, device_computes, best_value, full, tried)
                    if choice is not None:
                        delta = start - now if waits is None else waits.delta_s(account, start)
                        found = delta + choice.delay_s
                        if found < best_value or (start, family, name) < best_tie:
                            best, best_value, best_tie = choice, found, (start, family, name)
                        if choice.delay_s == full[0]:
                            continue  # it has its full caps, so no later start is better
                if not delayed:
                    continue
                if start < turn:
                    following, at = turn, bisect_right(timeline.times, turn) - 1
                else:
                    following, at = _next_start(timeline, family, at, min(best_value, most) - full[0] + now)
                if ends and start >= turn:
                    following_end = bisect_right(ends, start)
                    if following_end < len(ends) and ends[following_end] < following:
                        following = ends[following_end]
                        at = bisect_right(timeline.times, following) - 1
                if following == _NEVER or following - now + full[0] > most:
                    continue
                later_value = (following - now if waits is None else waits.delta_s(account, following)) + full[0]
                if later_value <= best_value:
                    later = _Candidate(later_value, family, name, following, at, kind, full, tried, (account,))
                    heappush(heap, later)
        return best

    def _bounds(self, families: Collection[int], device_computes: bool, worst: float) -> list[_Candidate]:
        """All pairs with start now, as a heap ordered by w at full caps, without impossible pairs and those above `worst`.

        Edges of one kind have the same bound and share one entry.
        """
        request, now = self.request, self.now
        samples, objective, input_bytes = request.samples, request.objective, request.input_bytes
        heap: list[_Candidate] = []
        for kind in request.kinds():
            search, b1, b2, overheads, computes, accounts = kind
            if b1 < 1:
                continue
            name, find = accounts[0].name, self._finder(search)
            for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
                if (
                    family not in families
                    or (family != DEVICE_EDGE and b2 < 1)
                    or (family != DEVICE_CLOUD and not computes)
                ):
                    continue
                found = find(
                    search,
                    family,
                    b1,
                    b2 if family != DEVICE_EDGE else 0,
                    samples,
                    objective,
                    input_bytes,
                    device_computes,
                    overheads,
                )
                if found is not None and found[0] <= worst and found[0] < _NEVER:
                    heap.append(_Candidate(found[0], family, name, now, -1, kind, found, [], accounts))
        heapify(heap)
        return heap

    def on_device(self) -> Choice | None:
        """The whole model on the device, at the first instant from which the device is free for the whole delay."""
        request, now = self.request, self.now
        delay = request.device_search.device_s(request.samples, request.objective, request.overheads)
        if delay is None or not request.alone or not delay < _NEVER:
            return None
        start, layers = now, request.device_row.layers
        if request.device is not None:
            start = request.device.first_free(now, max(delay, SHORTEST_S))
        if start - now + delay > self.deadline_s - now:
            return None
        return Choice(DEVICE, None, layers, layers, 0, 0, start, delay)

    def at(self, option: EdgeOption, family: int, start_s: float, *, device_computes: bool = True) -> Choice | None:
        """One pair at one start, with the largest grants that fit during the whole interval; None if it does not fit."""
        account, search, b1, b2, overheads = option
        request = self.request
        if start_s < account.turn_s() or family not in request.families:
            return None
        device_computes = device_computes and request.device_computes
        kind = EdgeKind(search, b1, b2, overheads, account.slots >= 1, (account,))
        i = bisect_right(account.timeline.times, start_s) - 1
        return self._at(account, kind, family, start_s, i, device_computes, _NEVER, None, [])

    def delta_s(self, account: EdgeAccount | None, start_s: float) -> float:
        """How much the wait until a start on an edge, or on the device alone (None), counts in a comparison."""
        return start_s - self.now if self._waits is None else self._waits.delta_s(account, start_s)

    def value_s(self, choice: Choice) -> float:
        """What a comparison of choices goes by: w + delta_t."""
        option = self.request.edge(choice.edge)
        return self.delta_s(None if option is None else option.account, choice.start_s) + choice.delay_s

    def exact(self, choice: Choice) -> Choice | None:
        """A choice of several routes with its exact delay, sample by sample. None: it is not free for that long."""
        request = self.request
        option = request.edge(choice.edge)
        if option is None:
            return choice
        routes = routes_of(request, choice)
        layers, samples = request.device_row.layers, request.samples
        fill_s = [
            sum(route.stations_s)
            + option.overheads.total_s(family_of(route.cut1, route.cut2, layers), samples, request.objective)
            for route in routes
        ]
        shares = [route.share for route in routes]
        delay_s = interleaved_s(fill_s, [route.stations_s for route in routes], shares, samples)
        found = choice._replace(delay_s=delay_s)
        if delay_s > choice.delay_s and not (self.late_s(found) <= 0.0 and self._free(found, option.account)):
            return None
        return found

    def _free(self, choice: Choice, account: EdgeAccount) -> bool:
        """Whether what a choice needs is free during all of it."""
        start, end, device = choice.start_s, choice.start_s + choice.delay_s, self.request.device
        return account.timeline.fits(start, end, int(choice.uses_slot), choice.link1_bps, choice.link2_bps) and (
            device is None or device.timeline.fits(start, end, int(choice.uses_device), choice.link1_bps, 0)
        )

    def late_s(self, choice: Choice) -> float:
        """The time by which a choice is predicted to end after the deadline; 0 or negative: it is in time."""
        return (choice.start_s - self.now + choice.delay_s) - (self.deadline_s - self.now)

    def _at(
        self,
        account: EdgeAccount,
        kind: EdgeKind,
        family: int,
        start: float,
        i: int,
        device_computes: bool,
        worst: float,
        full: Priced | None,
        tried: list[tuple[int, int, float]],
    ) -> Choice | None:
        """As `at`, but returns None as soon as w + delta_t exceeds `worst`.

        `i` is the step of the timeline that contains `start`, and `full` the result of the search at full caps. `tried` holds
        w at other grants; smaller grants cannot give a smaller w.
        """
        # Called for every candidate start of a decision: an options value would cost an allocation per call.
        search, max1, max2, overheads, _, _ = kind
        timeline = account.timeline
        slots, free1, free2 = timeline.slots, timeline.free1, timeline.free2
        if family != DEVICE_CLOUD and slots[i] < 1:
            return None
        b1 = free1[i]
        if b1 >= max1:
            b1 = max1
        elif b1 < 1:
            return None
        if family == DEVICE_EDGE:
            b2 = 0
            at_full = b1 == max1
        else:
            b2 = free2[i]
            if b2 >= max2:
                b2 = max2
                at_full = b1 == max1
            elif b2 < 1:
                return None
            else:
                at_full = False
        request = self.request
        device = request.device
        if device is not None and device_computes and not device.free(start, start):
            device_computes = at_full = False
        own = device.timeline if device is not None and device.limited else None
        own_seen = 0
        if own is not None:
            own_seen = bisect_right(own.times, start)
            least = own.free1[own_seen - 1]
            if least < b1:
                b1, at_full = least, False
                if b1 < 1:
                    return None
        ahead = start - self.now
        delta = ahead if self._waits is None else self._waits.delta_s(account, start)
        most = self.deadline_s - self.now
        seen = i + 1
        find = self._finder(search)
        mixes = find is not CutSearch.best
        while True:
            found: Priced | None
            if at_full and full is not None:
                found = full
            else:
                least_delay = min(worst - delta, most - ahead)
                for more1, more2, least_w in tried:
                    if b1 <= more1 and b2 <= more2 and least_w > least_delay:
                        return None
                found = find(
                    search,
                    family,
                    b1,
                    b2,
                    request.samples,
                    request.objective,
                    request.input_bytes,
                    device_computes,
                    overheads,
                )
                if found is None:
                    return None
                if device_computes and len(tried) < _MOST_TRIED:
                    tried.append((b1, b2, found[0]))
            delay, cut1, cut2 = found
            if mixes:
                delay = cut2.delay_s
            if delta + delay > worst or ahead + delay > most or not delay < _NEVER:
                return None
            end = start + (delay if delay > SHORTEST_S else SHORTEST_S)
            if cut1 and device is not None and not device.free(start, end):
                device_computes = at_full = False
                continue
            changed = False
            upto = bisect_left(timeline.times, end, seen)
            if upto > seen:
                if family != DEVICE_CLOUD and min(slots[seen:upto]) < 1:
                    return None
                least = min(free1[seen:upto])
                if least < b1:
                    b1, changed = least, True
                if family != DEVICE_EDGE:
                    least = min(free2[seen:upto])
                    if least < b2:
                        b2, changed = least, True
                        if b2 < 1:
                            return None
                seen = upto
            if own is not None:
                upto = bisect_left(own.times, end, own_seen)
                if upto > own_seen:
                    least = min(own.free1[own_seen:upto])
                    if least < b1:
                        b1, changed = least, True
                    own_seen = upto
            if not changed:
                break
            if b1 < 1:
                return None
            at_full = False
        if mixes:
            return mixed_choice(cut2, family, account.name, (b1, b2), start, search.costs.layers)
        return Choice(family, account.name, cut1, cut2, b1, b2, start, delay)


def _next_start(timeline: Timeline, family: int, i: int, latest: float) -> tuple[float, int]:
    """The next start to try, and its step: something is freed there, and every resource the family needs is partly free.

    Steps after `i` and until `latest` are considered; the start is infinite if there is none.
    """
    times, slots, free1, free2 = timeline.times, timeline.slots, timeline.free1, timeline.free2
    for k in range(i + 1, bisect_right(times, latest)):
        if (
            (slots[k] > 0 or family == DEVICE_CLOUD)
            and (slots[k] > slots[k - 1] or free1[k] > free1[k - 1] or free2[k] > free2[k - 1])
            and free1[k]
            and (free2[k] or family == DEVICE_EDGE)
        ):
            return times[k], k
    return _NEVER, 0
