"""All reservations of a region, booked on the accounts of edges and devices.

All sessions together hold at most 80 % of an edge, a device or a link (`bookable`), so that every other task still fits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping

from bus.errors import InvariantError
from planner.search.ledger.accounts import DeviceAccount, EdgeAccount
from planner.search.ledger.reservation import LOAD_UNITS, Reservation
from planner.search.ledger.timeline import LONG_AGO, Timeline


class Ledger:
    """All reservations of a region. Mutated only by `RegionState.apply`."""

    def __init__(
        self,
        make_timeline: Callable[[int, int, int], Timeline] = Timeline,
        make_device: Callable[[str, int, Callable[[int, int, int], Timeline]], DeviceAccount] = DeviceAccount,
    ) -> None:
        """`make_timeline` has the parameters of `Timeline`, and `make_device` those of `DeviceAccount`."""
        self._make_timeline = make_timeline
        self._make_device = make_device
        self.edges: dict[str, EdgeAccount] = {}
        self.devices: dict[str, DeviceAccount] = {}  # devices with reservations
        self.own_links: dict[str, int] = {}  # limits that devices announced of their own link, bit/s
        self.reservations: dict[str, Reservation] = {}
        self.held_by: dict[str, int] = {}  # number of reservations of the tasks of each device that has any
        self.alone: dict[str, Reservation] = {}  # those that use no edge

    def open_edge(self, name: str, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        """Add an edge, or change its capacities."""
        account = self.edges.get(name)
        if account is None:
            self.edges[name] = EdgeAccount(name, slots, link1_capacity_bps, link2_capacity_bps, self._make_timeline)
        else:
            account.resize(slots, link1_capacity_bps, link2_capacity_bps)

    def close_edge(self, name: str) -> None:
        """Remove an edge. Raises `InvariantError` if it still has reservations."""
        account = self.edges.pop(name)
        if account.reservations:
            raise InvariantError(f"edge {name} is removed but still has reservations {sorted(account.reservations)}")

    def limit_device(self, name: str, link1_capacity_bps: int) -> list[Reservation]:
        """Set the limit of a device's own link; 0: no limit. Return the reservations that this affects."""
        if self.own_links.get(name, 0) == link1_capacity_bps:
            return []
        if link1_capacity_bps:
            self.own_links[name] = link1_capacity_bps
        else:
            del self.own_links[name]
        self.devices.pop(name, None)
        concerned = [r for r in self.reservations.values() if r.sender == name]
        for r in concerned:
            self._book_device(r, LONG_AGO)
        return concerned

    def load_steps(self, name: str, steps: int) -> int:
        """The share of an edge's or device's computing time that sessions hold, in steps, rounded up."""
        account = self.edges.get(name)
        capacity = LOAD_UNITS if account is None else LOAD_UNITS * account.slots
        holder = self.devices.get(name) if account is None else account
        units = 0 if holder is None else holder.sessions.units
        return -(-steps * units // capacity) if units and capacity else 0

    def reserve(self, r: Reservation, now: float) -> None:
        """Book a reservation. Raises `InvariantError` if its task has one already or its edge is unknown."""
        if r.task_id in self.reservations:
            raise InvariantError(f"task {r.task_id} reserves twice: {self.reservations[r.task_id]} and {r}")
        account = self._edge(r)
        self.reservations[r.task_id] = r
        if r.sender is not None:
            self.held_by[r.sender] = self.held_by.get(r.sender, 0) + 1
        if account is None:
            self.alone[r.task_id] = r
        else:
            account.timeline.forget_before(now)
            account.reservations[r.task_id] = r
            account.timeline.take(r, now)
            if r.load is not None:
                account.sessions.add(1, r.load.edge, r.link1_bps, r.link2_bps)
            if not r.running:
                insort(account.queue, (r.start_s, r.seq, r))
                if r.first_served:
                    insort(account.first_served, (r.start_s, r.seq, r))
        self._book_device(r, now)

    def _book_device(self, r: Reservation, now: float) -> None:
        """Book a reservation on its device: the processor or a load, or bandwidth on a limited own link, or both."""
        name = r.sender
        loads = r.load is not None and r.load.device > 0
        if name is None or not (r.computes or loads or (r.link1_bps and name in self.own_links)):
            r.device = None
            return
        r.device = name
        device = self.devices.get(name)
        if device is None:
            device = self.devices[name] = self._make_device(name, self.own_links.get(name, 0), self._make_timeline)
        else:
            device.timeline.forget_before(now)
        device.reservations[r.task_id] = r
        device.take(r, now)
        if r.load is not None:
            device.sessions.add(1, r.load.device, r.link1_bps, 0)
        if not r.running:
            insort(device.queue, (r.start_s, r.seq, r))

    def release(self, task_id: str, now: float = LONG_AGO) -> Reservation:
        """Give back a task's reservation. Raises `InvariantError` if the task has none, e.g. on a second release."""
        r = self.reservations.pop(task_id, None)
        if r is None:
            raise InvariantError(f"task {task_id} has no reservation to release")
        if r.sender is not None:
            self.held_by[r.sender] -= 1
            if not self.held_by[r.sender]:
                del self.held_by[r.sender]
        if not r.running:
            self._unqueue(r)
        account = self._edge(r)
        if account is not None:
            del account.reservations[task_id]
            if r.load is not None:
                account.sessions.add(-1, r.load.edge, r.link1_bps, r.link2_bps)
            if r.end_s > now:
                account.timeline.give(r)
            else:  # it ended on time, so nothing of it lies in the future
                account.timeline.forget_before(now)
        else:
            del self.alone[task_id]
        if r.device is not None:
            device = self.devices[r.device]
            del device.reservations[task_id]
            if r.load is not None:
                device.sessions.add(-1, r.load.device, r.link1_bps, 0)
            if not device.reservations:
                del self.devices[r.device]
            elif r.end_s > now:
                device.give(r)
            else:
                device.timeline.forget_before(now)
        return r

    def move(self, task_id: str, start_s: float, *, counts: bool = True) -> None:
        """Move a scheduled task to another start, with the same resources and the same length.

        `counts`: whether a move to a later start counts towards `MOVES_BORNE`.
        """
        r = self.reservations[task_id]
        if r.running:
            raise InvariantError(f"{r} cannot be moved because it is running")
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.give(r)
        if device is not None:
            device.give(r)
        self._unqueue(r)
        r.moves += counts and account is not None and start_s > r.start_s
        r.start_s, r.end_s = start_s, start_s + r.length_s
        self._queue(r)
        if account is not None:
            account.timeline.take(r)
        if device is not None:
            device.take(r)

    def rebook(self, r: Reservation, wanted: Reservation, now: float) -> None:
        """Exchange what a running task holds for what another reservation of it names, from now until that one's end."""
        if not r.running:
            raise InvariantError(f"{r} cannot be exchanged because it is not running")
        self.release(r.task_id, now)
        r.edge, r.computes, r.slots = wanted.edge, wanted.computes, wanted.slots
        r.link1_bps, r.link2_bps = wanted.link1_bps, wanted.link2_bps
        r.length_s, r.end_s = wanted.length_s, wanted.end_s
        self.reserve(r, now)

    def prolong(self, task_id: str, end_s: float) -> None:
        """Extend the reservation of a running task until `end_s`."""
        r = self.reservations[task_id]
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.change(r.end_s, end_s, -r.slots, -r.link1_bps, -r.link2_bps)
        if device is not None:
            device.timeline.change(r.end_s, end_s, -r.computes, -r.link1_bps, 0)
        r.end_s = end_s

    def concerned(self, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> float | None:
        """The earliest start among the scheduled tasks that a change may affect, or None if it affects none.

        `edges` and `devices` give the time until which resources were freed. If that is not after `now`, only tasks that are
        due are affected. A start before `now` means that another task ended late.
        """
        earliest: float | None = None
        accounts: Mapping[str, EdgeAccount] | Mapping[str, DeviceAccount]
        for accounts, changed in ((self.edges, edges), (self.devices, devices)):
            for name, until in changed.items():
                account = accounts.get(name)
                if account is None or not account.queue:
                    continue
                start = account.queue[0][0]
                if (start <= now or until > now) and (earliest is None or start < earliest):
                    earliest = start
        return earliest

    def overbooked(self, r: Reservation, from_s: float) -> bool:
        """Whether the edge or device of `r` is overbooked at any time from `from_s` (not before now) to the end of `r`."""
        return any(
            account is not None and not account.timeline.fits(from_s, r.end_s, 0, 0, 0)
            for account in (self._edge(r), self._device(r))
        )

    def start(self, task_id: str) -> None:
        """Mark a scheduled task as running."""
        r = self.reservations[task_id]
        self._unqueue(r)
        r.running = True

    def _queue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            insort(self.edges[r.edge].queue, item)
            if r.first_served:
                insort(self.edges[r.edge].first_served, item)
        if r.device is not None:
            insort(self.devices[r.device].queue, item)

    def _unqueue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            queue = self.edges[r.edge].queue
            del queue[bisect_left(queue, item)]
            if r.first_served:
                queue = self.edges[r.edge].first_served
                del queue[bisect_left(queue, item)]
        if r.device is not None:
            queue = self.devices[r.device].queue
            del queue[bisect_left(queue, item)]

    def _edge(self, r: Reservation) -> EdgeAccount | None:
        if r.edge is None:
            return None
        account = self.edges.get(r.edge)
        if account is None:
            raise InvariantError(f"{r} names an edge that is not in the ledger")
        return account

    def _device(self, r: Reservation) -> DeviceAccount | None:
        return None if r.device is None else self.devices[r.device]
