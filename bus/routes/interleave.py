"""The order in which the samples of a task take its routes, and the delay that this order gives.

Sample i takes the route with the largest i a_r - n_r, where n_r earlier samples took route r: the one furthest behind its
share. So no route is ever a whole sample ahead of its share, and the stations see nearly the mean load all the time.

Samples of the device-only route fill the time in which the device has no layers of other routes to compute. The others keep
their order on the device and on link 1, where even those without layers on the device wait for earlier ones: otherwise they
run ahead and queue at later stations. At most `LEAST_WINDOW` of them are under way: with fewer a station is idle too often.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from heapq import heappop, heapreplace
from typing import Final

from bus.values import StationSeconds

LEAST_WINDOW: Final = 32
"""Samples of a task of several routes that may be under way, not counting those of the device-only route."""

_FAR_AHEAD: Final = float("-inf")
_STATIONS: Final = range(7)
_IN_ORDER: Final = 2  # samples that skip one of the first stations, the device and link 1, still keep their order there


def device_only(stations_s: StationSeconds) -> bool:
    """Whether a route with these station times is the whole model on the device."""
    return not any(stations_s[1:])


class RouteOrder:
    """Gives each sample its route. Routes are the indices of the shares."""

    __slots__ = ("_carried", "_counts", "_samples", "_shares")

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = tuple(shares)
        self._carried = [0.0] * len(shares)  # i a_r - n_r when the present shares began
        self._counts = [0] * len(shares)  # n_r since then
        self._samples = 0  # i since then

    def next(self, allowed: Collection[int]) -> int:
        """The route of the next sample, of those allowed; in a tie the first one.

        A route without a share is taken only if no other one is allowed. Raises `ValueError` if none is allowed.
        """
        self._samples += 1
        shares, carried, counts, samples = self._shares, self._carried, self._counts, self._samples
        route = min(allowed)
        most = _FAR_AHEAD
        for one in allowed:
            behind = carried[one] + samples * shares[one] - counts[one] if shares[one] else _FAR_AHEAD
            if behind > most or (behind == most and one < route):
                most, route = behind, one
        counts[route] += 1
        return route

    def change(self, shares: Sequence[float]) -> None:
        """Other shares of the same routes, from the next sample on.

        What a route is ahead or behind is carried over, but at most one sample: a route that could not keep up with its share
        would otherwise have to catch up.
        """
        self._carried = [max(-1.0, min(1.0, self._behind(r))) for r in range(len(self._shares))]
        self._counts = [0] * len(self._shares)
        self._samples = 0
        self._shares = tuple(shares)

    def _behind(self, route: int) -> float:
        return self._carried[route] + self._samples * self._shares[route] - self._counts[route]


def interleaved_s(
    fill_s: Sequence[float], stations_s: Sequence[StationSeconds], shares: Sequence[float], samples: int
) -> float:
    """The delay of a task whose samples take routes in the order of `RouteOrder`, exactly: each station serves the samples as
    they arrive.

    For small tasks; a sample costs about 3 us. The device-only route gets no more samples than end by the delay
    max F_r + (N - 1) P that the shares predict.
    """
    used = [route for route, share in enumerate(shares) if share > 0.0]
    alone = [route for route in used if device_only(stations_s[route])]
    others = [route for route in used if route not in alone]
    if not others:
        return fill_s[alone[0]] + (samples - 1) * max(stations_s[alone[0]])
    slowest_s = max(sum(shares[r] * stations_s[r][k] for r in used) for k in _STATIONS)
    device_s = max(fill_s[r] for r in others) + (samples - 1) * slowest_s
    device_s -= samples * sum(shares[r] * stations_s[r][0] for r in others)  # left for the device-only route
    order, entering = RouteOrder(shares), []
    count = 0  # of samples on the device alone
    for _ in range(samples):
        fits = bool(alone) and fill_s[alone[0]] + count * stations_s[alone[0]][0] <= device_s
        route = order.next(used if fits else others)
        if route in alone:
            count += 1
        else:
            entering.append(route)
    end_s = max(_served(entering, fill_s, stations_s), default=0.0)
    if count:
        busy_s = sum(stations_s[route][0] for route in entering) + count * stations_s[alone[0]][0]
        end_s = max(end_s, busy_s + fill_s[alone[0]] - stations_s[alone[0]][0])
    return end_s


def _served(entering: Sequence[int], fill_s: Sequence[float], stations_s: Sequence[StationSeconds]) -> Iterator[float]:
    """When the results of samples on these routes arrive; arrivals at stations are served in the order of time."""
    more_s = [fill - sum(stations) for fill, stations in zip(fill_s, stations_s, strict=True)]
    free_s = [0.0] * 7
    arrivals = [(0.0, i, 0) for i in range(min(LEAST_WINDOW, len(entering)))]  # when, sample, station
    entered = len(arrivals)
    while arrivals:
        now, i, k = arrivals[0]
        stations = stations_s[entering[i]]
        while k < 7 and not stations[k] and k >= _IN_ORDER:
            k += 1
        if k < 7:
            free_s[k] = now = max(now, free_s[k]) + stations[k]
            heapreplace(arrivals, (now, i, k + 1))
            continue
        yield now + more_s[entering[i]]
        if entered < len(entering):
            heapreplace(arrivals, (now, entered, 0))
            entered += 1
        else:
            heappop(arrivals)
