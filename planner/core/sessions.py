"""The placing of sessions: what is free for one, the choice, and the message that records it.

A session starts at once if some placement that sustains its rate fits beside the running tasks; scheduled tasks make room.
Otherwise the planner looks at what will be free when the running tasks have ended. If the rate is sustained there, the
session is scheduled for the first instant at which its grants are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from bus.messages import Placed, PlacedOverhead, PlacedSession, SessionTerms, TaskSubmitted
from bus.unchecked_constructors import maker
from bus.values import Execution
from planner.core.candidates.candidates import Candidates
from planner.core.region.records import Task
from planner.core.region.state import RegionState
from planner.search.codec_search import CodecSearch
from planner.search.cost import RAW, busy_parts
from planner.search.ledger.accounts import DeviceAccount, EdgeAccount
from planner.search.ledger.reservation import LOAD_UNITS, Reservation, bookable
from planner.search.placements import Choice, placement_of
from planner.search.policies import Policy, Restriction
from planner.search.request import EdgeOption, Request
from planner.search.route_search import MixedRoute
from planner.search.session_search import SessionChoice, Site, Wish, held, least

_placed, _session = maker(Placed), maker(PlacedSession)  # built without validation, from values computed here

_BETTER: Final = (
    0.8  # a session moves if its delay, or the period of its slowest station, shrinks at least by this factor
)


class SessionPlacement(NamedTuple):
    """A choice for a session and its start."""

    request: Request
    choice: SessionChoice
    start_s: float  # ledger time


class Sessions:
    """Finds placements for the sessions of one region."""

    def __init__(self, region: RegionState, candidates: Candidates, policy: Policy) -> None:
        self._region = region
        self._candidates = candidates
        self._policy = policy

    def best(
        self, request: Request, submitted: TaskSubmitted, now: float, own: Reservation | None = None
    ) -> SessionPlacement | None:
        """The best placement for a session; None: nothing is free for it. `own`: what it holds and would give back."""
        soon = self.at_once(request, submitted, own)
        if soon is not None and _satisfies(soon, submitted):
            return SessionPlacement(request, soon, now)
        later = self._least(request, submitted, own, beside_running=False)
        if later is not None and (soon is None or _satisfies(later, submitted)):
            start_s = self._start_s(request, later, own, now)
            return SessionPlacement(request, later, start_s)
        return None if soon is None else SessionPlacement(request, soon, now)

    def at_once(
        self, request: Request, submitted: TaskSubmitted, own: Reservation | None = None
    ) -> SessionChoice | None:
        """The best placement that fits beside the running tasks now."""
        return self._least(request, submitted, own, beside_running=True)

    def better(self, task: Task, own: Reservation, request: Request, offered: Request) -> bool:
        """Whether a running session would gain at least a fifth by another placement that `offered` has room for now.

        A session that has all that it asks for, a latency target included, stays.
        """
        placed, submitted = task.placed, task.submitted
        assert placed is not None
        terms, wish = _terms(submitted), self._wish(request, submitted, own)
        here = next((site for site in self._sites(request) if site[0].edge == placed.placement.edge), None)
        if here is None:
            return False
        site, option = here
        now = held(site if option is None else _beside_sessions(site, option.account, own), wish, placed.placement)
        sustained = now.period_s * terms.rate_hz <= 1.0
        if sustained and terms.latency_s is not None and now.delay_s <= terms.latency_s:
            return False
        other = self.at_once(offered, submitted, own)
        if other is None:
            return False
        if sustained:
            return other.rate_hz >= terms.rate_hz and other.delay_s <= _BETTER * now.delay_s
        return other.period_s <= _BETTER * now.period_s

    def servable(self, request: Request, submitted: TaskSubmitted) -> bool:
        """Whether the session could be placed if no other session were there."""
        wish = self._wish(request, submitted, None)._replace(device_units=bookable(LOAD_UNITS), device_share=0.0)
        sites = []
        for site, option in self._sites(request):
            if option is None:
                sites.append(site)
                continue
            account = option.account
            link1_bps = min(option.max_link1_bps, bookable(account.link1_capacity_bps))
            link2_bps = min(option.max_link2_bps, bookable(account.link2_capacity_bps))
            units = bookable(LOAD_UNITS * account.slots)
            sites.append(site._replace(link1_bps=link1_bps, link2_bps=link2_bps, edge_units=units, edge_share=0.0))
        return least(sites, wish) is not None

    def message(self, task: Task, found: SessionPlacement, now: float) -> Placed:
        """The message that records a placement."""
        request, choice, start_s = found
        row, submitted = request.device_row, task.submitted
        option = request.edge(choice.edge)
        overheads = request.overheads if option is None else option.overheads
        latency_s, sample_s = overheads.latency_s(choice.family), overheads.sample_s[choice.family]
        placed = Choice(
            choice.family,
            choice.edge,
            choice.cut1,
            choice.cut2,
            choice.link1_bps,
            choice.link2_bps,
            start_s,
            choice.delay_s,
            () if choice.codecs == RAW else (MixedRoute(choice.cut1, choice.cut2, 1.0, choice.codecs),),
        )
        return _placed(
            task_id=task.task_id,
            attempt=task.attempt,
            device=submitted.device,
            model=row.model,
            sha256=row.sha256,
            samples=1,
            policy=self._policy.name,
            objective=self._candidates.objective,
            execution=Execution.STREAMING,
            placement=placement_of(request, placed, option),
            start_s=start_s,
            wait_s=start_s - now,
            delay_s=choice.delay_s,
            parts=busy_parts(choice.stations_s, 1),
            overhead=PlacedOverhead(latency_s=latency_s, task_s=sample_s) if latency_s or sample_s else None,
            session=_session(
                rate_hz=choice.rate_hz,
                device_load=choice.device_units / LOAD_UNITS,
                edge_load=choice.edge_units / LOAD_UNITS,
            ),
        )

    def _least(
        self, request: Request, submitted: TaskSubmitted, own: Reservation | None, *, beside_running: bool
    ) -> SessionChoice | None:
        device = request.device
        sites = []
        for site, option in self._sites(request):
            if option is not None:
                link1_bps, link2_bps = _free(option, own, beside_running)
                if device is not None and device.limited:
                    link1_bps = min(link1_bps, _free_link1(device, own, beside_running))
                site = _beside_sessions(site, option.account, own)._replace(
                    link1_bps=link1_bps,
                    link2_bps=link2_bps,
                    link1_spare_bps=_spare(link1_bps, option.account.link1_capacity_bps),
                    link2_spare_bps=_spare(link2_bps, option.account.link2_capacity_bps),
                )
            sites.append(site)
        return least(sites, self._wish(request, submitted, own))

    def _sites(self, request: Request) -> Iterator[tuple[Site, EdgeOption | None]]:
        """The device alone and every edge, without what is free there."""
        if request.alone:
            search = request.device_search
            yield Site(None, search.costs, search.forbidden, request.overheads), None
        for option in request.edges:
            search = option.search
            coded = search if isinstance(search, CodecSearch) else None
            yield Site(option.account.name, search.costs, search.forbidden, option.overheads, coded=coded), option

    def _wish(self, request: Request, submitted: TaskSubmitted, own: Reservation | None) -> Wish:
        policy, terms = self._policy, _terms(submitted)
        families, device_computes = request.families, request.device_computes
        if isinstance(policy, Restriction):
            families, device_computes = families & policy.families, device_computes and policy.device_computes
        booked = 0 if request.device is None else request.device.sessions.units
        if own is not None and own.load is not None:
            booked -= own.load.device
        return Wish(
            rate_hz=terms.rate_hz,
            latency_s=terms.latency_s,
            input_bytes=request.input_bytes,
            families=families,
            device_computes=device_computes,
            device_units=bookable(LOAD_UNITS) - booked,
            device_share=booked / LOAD_UNITS,
        )

    def _start_s(self, request: Request, choice: SessionChoice, own: Reservation | None, now: float) -> float:
        """The first instant at which the running tasks are predicted to leave enough bandwidth for a choice."""
        option, device = request.edge(choice.edge), request.device
        if option is None:
            return now
        account = option.account
        capacities, needs = (
            (account.link1_capacity_bps, account.link2_capacity_bps),
            (choice.link1_bps, choice.link2_bps),
        )
        start_s = _free_from_s(account, capacities, needs, own, now)
        if device is not None and device.limited:
            start_s = max(start_s, _free_from_s(device, (device.link1_capacity_bps, 0), (needs[0], 0), own, now))
        return start_s


def _free_from_s(
    account: EdgeAccount | DeviceAccount,
    capacities: tuple[int, int],
    needs: tuple[int, int],
    own: Reservation | None,
    now: float,
) -> float:
    """The first instant at which the running tasks of an edge or device are predicted to leave enough bandwidth."""
    free1, free2 = capacities[0] - account.sessions.link1_bps, capacities[1] - account.sessions.link2_bps
    if own is not None and own.task_id in account.reservations:
        free1, free2 = free1 + own.link1_bps, free2 + own.link2_bps
    for r in sorted(_running(account), key=lambda r: -r.end_s):
        free1, free2 = free1 - r.link1_bps, free2 - r.link2_bps
        if free1 < needs[0] or free2 < needs[1]:
            return max(now, r.end_s)
    return now


def _running(account: EdgeAccount | DeviceAccount) -> list[Reservation]:
    """The running tasks of an edge or device that have an end."""
    return [r for r in account.reservations.values() if r.running and r.load is None]


def _terms(submitted: TaskSubmitted) -> SessionTerms:
    assert submitted.session is not None
    return submitted.session


def _satisfies(choice: SessionChoice, submitted: TaskSubmitted) -> bool:
    """Whether a placement gives a session all that it asks for."""
    terms = _terms(submitted)
    return choice.rate_hz >= terms.rate_hz and (terms.latency_s is None or choice.delay_s <= terms.latency_s)


def _beside_sessions(site: Site, account: EdgeAccount, own: Reservation | None) -> Site:
    """A site with the load that is free on its edge."""
    capacity, booked = LOAD_UNITS * account.slots, account.sessions.units
    if own is not None and own.load is not None and own.edge == account.name:
        booked -= own.load.edge
    share = booked / capacity if capacity else 0.0
    return site._replace(edge_units=bookable(capacity) - booked, edge_share=share)


def _free(option: EdgeOption, own: Reservation | None, beside_running: bool) -> tuple[int, int]:
    """The bandwidth that is free for a session on both links of an edge."""
    account = option.account
    held1, held2 = account.sessions.link1_bps, account.sessions.link2_bps
    if own is not None and own.edge == account.name:
        held1, held2 = held1 - own.link1_bps, held2 - own.link2_bps
    capacity1, capacity2 = account.link1_capacity_bps, account.link2_capacity_bps
    free1, free2 = bookable(capacity1) - held1, bookable(capacity2) - held2
    if beside_running:
        running = _running(account)
        free1 = min(free1, capacity1 - held1 - sum(r.link1_bps for r in running))
        free2 = min(free2, capacity2 - held2 - sum(r.link2_bps for r in running))
    return min(free1, option.max_link1_bps), min(free2, option.max_link2_bps)


def _spare(free_bps: int, capacity_bps: int) -> int:
    """The bandwidth that a session may get beyond 4 times its need: a quarter of what is free, of half of the link.

    The other half of what sessions may hold stays for what later sessions need.
    """
    return max(0, (free_bps - bookable(capacity_bps) // 2) // 4)


def _free_link1(device: DeviceAccount, own: Reservation | None, beside_running: bool) -> int:
    """The bandwidth that is free for a session on the own link of its device."""
    held = device.sessions.link1_bps - (0 if own is None else own.link1_bps)
    free = bookable(device.link1_capacity_bps) - held
    if beside_running:
        free = min(free, device.link1_capacity_bps - held - sum(r.link1_bps for r in _running(device)))
    return free
