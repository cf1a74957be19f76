"""Waiting under uncertainty: how much a later start counts when candidates are compared.

A wait ends when other tasks end, and their ends are predictions. sigma is the relative deviation of the predictions for the
tasks of a node: 0.5 means that such a task typically takes half as long again, or half as long, as predicted. The predicted
end of a task that began at b and is predicted to end at e is therefore uncertain by sigma (e - b), however little of it is
left. A start s counts as one deviation later than it is predicted:

    s - now + sigma (s - b)

where b is the earliest begin of the tasks there that are predicted to end by s, or now if that is earlier. So a task waits
only if this pays even when the predictions are wrong by one deviation. Multiplying the time left, (1 + sigma)(s - now), is
not enough: a task that should end in a moment may still run for another half of its length.

The tasks of the edge count with the deviation of the edge, the tasks of the waiting task's device with the deviation of the
device; the larger term counts. A term is 0 while no task there ends by s. It never falls with s, so Algorithm 1's bounds and
its choice of candidate starts stay exact. Deadlines are compared with the predicted end itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from planner.search.ledger.accounts import DeviceAccount, EdgeAccount
from planner.search.ledger.reservation import Reservation

Deviations = Mapping[str, float]
"""Relative deviation of the predictions for the tasks of an edge or device, by its name; a missing name counts as 0."""

NO_DEVIATIONS: Final[Deviations] = MappingProxyType({})


class Waits:
    """How much later starts count, for one task at one instant. Valid until the ledger changes."""

    __slots__ = ("_deviations", "_device", "_ends", "_now")

    def __init__(self, deviations: Deviations, device: DeviceAccount | None, now: float) -> None:
        self._deviations = deviations
        self._device = device
        self._now = now
        self._ends: dict[str, _Ends] = {}  # by edge or device

    def delta_s(self, account: EdgeAccount | None, start_s: float) -> float:
        """How much the start counts: the time until it, plus one deviation. `account` is None for the device alone."""
        now, more_s = self._now, 0.0
        if start_s <= now:
            return start_s - now
        for holder in (account, self._device):
            sigma = 0.0 if holder is None else self._deviations.get(holder.name, 0.0)
            if holder is not None and sigma > 0.0:
                ends = self._ends.get(holder.name)
                if ends is None:
                    ends = self._ends[holder.name] = _Ends(holder.reservations.values(), now)
                more_s = max(more_s, sigma * ends.reach_s(start_s))
        return start_s - now + more_s


class _Ends:
    """The predicted ends of one edge or device, with the earliest begin of the tasks that end by then."""

    __slots__ = ("_begins", "_ends")

    def __init__(self, reservations: Iterable[Reservation], now: float) -> None:
        begin = now
        self._ends: list[float] = []
        self._begins: list[float] = []
        for end, start in sorted((r.end_s, r.start_s) for r in reservations):
            if end > now:
                begin = min(begin, start)
                self._ends.append(end)
                self._begins.append(begin)

    def reach_s(self, start_s: float) -> float:
        """s - b, or 0 if no task ends by then."""
        count = bisect_right(self._ends, start_s)
        return start_s - self._begins[count - 1] if count else 0.0
