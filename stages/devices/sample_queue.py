"""The samples of an attempt that are not started yet, and the routes that they take.

The routes through the edge keep their shares among each other. The device-only route beside them takes as many samples as
the device has idle time for: its share is a prediction of that.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

from bus.routes.interleave import RouteOrder
from bus.values import Placement, StationSeconds
from stages.measuring.clock import exact_clock

PACE_RESULTS = 32
"""Number of recent results that show how fast results come."""


class SampleQueue:
    """Gives samples and routes in order."""

    def __init__(self, left: deque[int], placement: Placement, layers: int) -> None:
        """Takes samples from `left`, for a model of `layers` layers."""
        self._left = left
        self._stations_s = [route.stations_s for route in placement.routes or ()]  # by route
        alone = [n for n, (cut1, _) in enumerate(placement.cut_pairs) if cut1 == layers and placement.edge is not None]
        self.alone = alone[0] if alone else None  # the device-only route beside others
        self.others = [route for route in range(len(placement.cut_pairs)) if route not in alone]
        self.totals = [0] * len(placement.cut_pairs)  # samples taken so far, by route
        self._shares = self._among_others([1.0] if placement.routes is None else [r.share for r in placement.routes])
        self._order = RouteOrder(self._shares)
        self._came_s: deque[float] = deque(maxlen=PACE_RESULTS)  # when the last results came

    def __len__(self) -> int:
        return len(self._left)

    def _among_others(self, shares: Sequence[float]) -> list[float]:
        """The shares of the other routes among each other."""
        total = sum([shares[route] for route in self.others])
        return [shares[route] / total if total else 1.0 / len(self.others) for route in self.others]

    def change(self, stations_s: Sequence[StationSeconds], shares: Sequence[float]) -> None:
        """New station times and shares of the routes, from the next sample on."""
        self._stations_s = list(stations_s)
        self._shares = self._among_others(shares)
        self._order.change(self._shares)

    def take(self) -> tuple[int, int]:
        """The next sample of a route that is not device-only, and its route."""
        others = self.others
        route = others[0] if len(others) == 1 else others[self._order.next(range(len(others)))]
        self.totals[route] += 1
        return self._left.popleft(), route

    def take_alone(self) -> int:
        """The next sample of the device-only route."""
        assert self.alone is not None
        self.totals[self.alone] += 1
        return self._left.popleft()

    def drop(self, sample: int) -> None:
        """Do not start a sample whose result is there already."""
        with contextlib.suppress(ValueError):
            self._left.remove(sample)

    @property
    def sent(self) -> int:
        """Samples taken so far that are not device-only."""
        return sum([self.totals[route] for route in self.others])

    # --- idle time of the device ---------------------------------------------------------------------------------------

    def came(self, now_s: float) -> None:
        """The result of a sample came that is not device-only."""
        self._came_s.append(now_s)

    @property
    def alone_s(self) -> float:
        """Time of a device-only sample without interruptions."""
        return 0.0 if self.alone is None else self._stations_s[self.alone][0]

    def time_for_alone(self, under_way: int) -> bool:
        """Whether the device has idle time for one more sample until the others end, of which some are under way."""
        interval_s = self._interval_s()
        idle_s = max(0.0, interval_s - self._means_s()[0]) * (len(self._left) - 1)
        return self.alone_s <= idle_s + under_way * interval_s  # the last ones under way need the device no more

    def left_to_device(self, under_way: int, begun_s: float) -> bool:
        """Whether the device ends the rest in time alone: before the results of the samples that are under way.

        `begun_s`: the time that its present device-only sample still takes.
        """
        return self.alone is not None and begun_s + len(self._left) * self.alone_s <= under_way * self._interval_s()

    def _means_s(self) -> list[float]:
        """Mean times at the stations of samples that are not device-only."""
        routes = [(share, self._stations_s[route]) for share, route in zip(self._shares, self.others, strict=True)]
        return [sum([share * stations_s[k] for share, stations_s in routes]) for k in range(7)]

    def _interval_s(self) -> float:
        """Mean time between two results; as predicted until enough have come."""
        came_s = self._came_s
        if len(came_s) < PACE_RESULTS:
            return max(self._means_s())
        return max((came_s[-1] - came_s[0]) / (len(came_s) - 1), (exact_clock()() - came_s[0]) / len(came_s))
