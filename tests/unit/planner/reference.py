"""Algorithm 1 written down as it reads, to compare the planner with: slow, and meant to be obvious.

Every known end is a candidate start, every j in 0..3m is tried at each, the cuts are found by trying all pairs, and what is
free is counted from the reservations anew each time. It reads reservations only, never a timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from planner.search.codec_search import PathSearch
from planner.search.cost import Overheads
from planner.search.cut_search import CutSearch, Found, exhaustive
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import MOVES_BORNE, SHORTEST_S, Reservation
from planner.search.placements import Choice
from planner.search.request import EVERY_FAMILY, EdgeOption, Request

Search = Callable[[PathSearch, int, int, int, Request, bool, Overheads], Found | None]


def every_pair(
    search: PathSearch, family: int, b1: int, b2: int, request: Request, device_free: bool, overheads: Overheads
) -> Found | None:
    """The paper's exhaustive search."""
    layers = search.costs.layers
    forbidden = request.device_row.forbidden
    allowed = [position for position in range(layers + 1) if position not in forbidden]
    if (family in (DEVICE_EDGE, ALL_THREE) and search.costs.edge is None) or (
        family in (DEVICE_CLOUD, ALL_THREE) and search.costs.cloud is None
    ):
        return None
    if family == DEVICE and not device_free:
        return None
    return exhaustive(
        search.costs,
        family,
        b1 or 1,
        b2 or 1,
        request.samples,
        request.objective,
        request.input_bytes,
        allowed if device_free else [0],
        allowed,
        overheads,
    )


def fast_pair(
    search: PathSearch, family: int, b1: int, b2: int, request: Request, device_free: bool, overheads: Overheads
) -> Found | None:
    """The planner's search, to see what the rest of the algorithm is worth."""
    assert isinstance(search, CutSearch)
    return search.best(family, b1, b2, request.samples, request.objective, request.input_bytes, device_free, overheads)


def place(
    request: Request,
    ledger: Ledger,
    now: float,
    *,
    device: str,
    families: Collection[int] = EVERY_FAMILY,
    device_computes: bool = True,
    delayed: bool = True,
    search: Search = every_pair,
    deadline_s: float = float("inf"),
) -> Choice | None:
    """Lines 4-18 of Algorithm 1, with reservations that fit their whole interval, and end by the deadline."""
    reservations = list(ledger.reservations.values())
    turns = {name: _turn(reservations, name) for name in ledger.edges}
    known = sorted({now, *(r.end_s for r in reservations if r.end_s > now), *(t for t in turns.values() if t > now)})
    best: tuple[float, float, int, str, int, int] | None = None
    opt: Choice | None = None
    for start in known:
        delta_t = start - now
        if best is not None and delta_t >= best[0]:
            break
        for family, option in _candidates(request, families):
            if not delayed and family != DEVICE and start > now:
                continue
            if family == DEVICE and not (device_computes and request.alone):
                continue
            if option is not None and start < turns[option.account.name]:
                continue
            own = (device, ledger.own_links.get(device))
            choice = _arrange(request, reservations, own, family, option, start, device_computes, search)
            if choice is None or delta_t + choice.delay_s > deadline_s - now:
                continue
            counted = delta_t + _deviation_s(request, reservations, device, option, start, now)
            key = (counted + choice.delay_s, start, family, choice.edge or "", choice.cut1, choice.cut2)
            if best is None or key < best:
                best, opt = key, choice
    return opt


def _deviation_s(
    request: Request,
    reservations: list[Reservation],
    device: str,
    option: EdgeOption | None,
    start: float,
    now: float,
) -> float:
    """One deviation of the ends that a start waits for: those on the edge, and those of the device's own tasks."""
    found = 0.0
    here = [] if option is None else [r for r in reservations if r.edge == option.account.name]
    own = [r for r in reservations if r.device == device]
    for name, held in (("" if option is None else option.account.name, here), (device, own)):
        ended = [r for r in held if now < r.end_s <= start]
        if ended:
            begun_s = min(now, *(r.start_s for r in ended))
            found = max(found, request.deviations.get(name, 0.0) * (start - begun_s))
    return found


def _candidates(request: Request, families: Collection[int]) -> Iterable[tuple[int, EdgeOption | None]]:
    if DEVICE in families:
        yield DEVICE, None
    for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
        if family in families:
            for option in request.edges:
                yield family, option


def _arrange(
    request: Request,
    reservations: list[Reservation],
    own: tuple[str, int | None],
    family: int,
    option: EdgeOption | None,
    start: float,
    device_computes: bool,
    search: Search,
) -> Choice | None:
    """One j at one start: the largest grants that fit during the whole interval, found by repetition."""
    device, own_bps = own
    if option is None:
        found = search(request.device_search, DEVICE, 0, 0, request, True, request.overheads)
        if found is None or not _device_free(reservations, device, start, start + max(found[0], SHORTEST_S)):
            return None
        return Choice(DEVICE, None, found[1], found[2], 0, 0, start, found[0])
    b1 = b2 = 0
    end = start
    device_free = device_computes and _device_free(reservations, device, start, start)
    while True:
        slots, free1, free2 = _least_free(reservations, option, start, end)
        if family != DEVICE_CLOUD and slots < 1:
            return None
        new1 = min(option.max_link1_bps, free1)
        if own_bps is not None:
            new1 = min(new1, own_bps - _most_sent(reservations, device, start, end))
        new2 = 0 if family == DEVICE_EDGE else min(option.max_link2_bps, free2)
        if new1 < 1 or (family != DEVICE_EDGE and new2 < 1):
            return None
        b1, b2 = new1, new2
        found = search(option.search, family, b1, b2, request, device_free, option.overheads)
        if found is None:
            return None
        delay, cut1, cut2 = found
        new_end = start + max(delay, SHORTEST_S)
        if cut1 > 0 and not _device_free(reservations, device, start, new_end):
            device_free = False
            continue
        if new_end <= end:
            return Choice(family, option.account.name, cut1, cut2, b1, b2, start, delay)
        end = new_end


def _device_free(reservations: list[Reservation], device: str, start: float, end: float) -> bool:
    return not any(r.computes and r.sender == device and r.start_s < end and r.end_s > start for r in reservations)


def _turn(reservations: list[Reservation], edge: str) -> float:
    """When the last of an edge's tasks starts that no other is put before."""
    starts = [r.start_s for r in reservations if r.edge == edge and not r.running and r.moves >= MOVES_BORNE]
    return max(starts, default=-float("inf"))


def _most_sent(reservations: list[Reservation], device: str, start: float, end: float) -> int:
    """The most that a device's tasks are granted on link 1 at any instant of [start, end)."""
    mine = [r for r in reservations if r.sender == device]
    instants = [start, *(r.start_s for r in mine if start < r.start_s < end)]
    return max(sum(r.link1_bps for r in mine if r.start_s <= at_s < r.end_s) for at_s in instants)


def _least_free(reservations: list[Reservation], option: EdgeOption, start: float, end: float) -> tuple[int, int, int]:
    """The least free slots and bandwidths at any instant of [start, end)."""
    account = option.account
    here = [r for r in reservations if r.edge == account.name]
    instants = [start, *(r.start_s for r in here if start < r.start_s < end)]
    free = []
    for at_s in instants:
        live = [r for r in here if r.start_s <= at_s < r.end_s]
        free.append(
            (
                account.slots - sum(r.slots for r in live),
                account.link1_capacity_bps - sum(r.link1_bps for r in live),
                account.link2_capacity_bps - sum(r.link2_bps for r in live),
            )
        )
    return min(f[0] for f in free), min(f[1] for f in free), min(f[2] for f in free)
