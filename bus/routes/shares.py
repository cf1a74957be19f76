"""The best shares of a task's samples among routes: a linear program, solved exactly by the simplex method.

A sample of route r needs s_k(r) seconds at station k and F_r seconds alone (its fill: stations, latencies and overheads).
For N samples, shares a_r >= 0 with sum 1 minimise

    sum_r a_r F_r + (N - 1) P,    where P = max_k sum_r a_r s_k(r) is the mean time of the slowest station.

As a linear program: for each station, sum_r a_r s_k(r) - P + t_k = 0 with a slack t_k >= 0. Its dual has a price y_k >= 0 of
each station with sum_k y_k = N - 1, and maximises the least F_r + sum_k y_k s_k(r) of all routes. So any such prices prove a
lower bound, and the prices of an optimal solution prove that it is optimal, however many routes there are.

`ShareProgram` is a revised simplex method: the caller looks for a route whose F_r + y s(r) is less than the present value and
lets it enter (column generation). Only the columns of the basis inverse that belong to saturated stations and to the sum of
the shares differ from unit vectors, so only these are kept: three to five lists of nine numbers. The last number of each is
the objective's row, so that a pivot updates the prices, too. The right-hand side is the unit vector of the sum of the
shares, so its column holds the values of the basic variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import Final, NamedTuple

from bus.values import StationSeconds

LEAST_SHARE: Final = 1e-13
"""A route with a smaller share is left out: it is a rounding error."""

TOLERANCE: Final = 1e-12
"""Relative to the objective: a route that promises less than this does not enter."""

MAX_PIVOTS: Final = 400
"""A bound for inputs on which rounding errors keep the method from ending; ordinary ones take 2 to 15."""

_STATIONS: Final = 7
_COST: Final = 8  # the row of the objective; row 7 is that of the sum of the shares
_SLOWEST: Final = -1  # label of P in the basis
_SLACK: Final = -2  # label of a station's slack, which is in the row of its station
_LEAST_CHANGE: Final = 1e-13  # of a share; of a slack, relative to P
_LEAST_SLOWEST: Final = 1e-6  # the least P that this is relative to, in the unit


class Shares(NamedTuple):
    """Shares of routes in the order in which these were given, and the proof that no others are better."""

    shares: tuple[float, ...]  # a_r; at least one is positive, the sum is 1
    slowest_s: float  # P
    objective_s: float
    prices: StationSeconds  # y_k >= 0, with sum N - 1


class ShareProgram:
    """The linear program while routes are added. Begins with all samples on one route, whose label is 0 or greater."""

    __slots__ = ("_basis", "_columns", "_more", "_unit", "_unsaturated", "_values", "pivots", "prices", "value_s")

    def __init__(self, label: int, fill_s: float, stations_s: StationSeconds, samples: int) -> None:
        slowest_s = max(stations_s)
        self._unit = unit = slowest_s or 1.0  # times are in this unit, so that entries of columns are about 1
        saturated = stations_s.index(slowest_s)
        self._more = more = float(samples - 1)
        values = [(slowest_s - s) / unit for s in stations_s]  # the slacks
        values[saturated] = slowest_s / unit
        values += [1.0, -(fill_s / unit + more * values[saturated])]
        self._values = values  # the column of the sum of the shares
        self._columns = {saturated: [-1.0] * _STATIONS + [0.0, more]}  # of the saturated stations
        self._basis = [_SLACK] * _STATIONS + [label]
        self._basis[saturated] = _SLOWEST
        self.pivots = 0
        self.prices: list[float]  # y_k; one may be negative, see `negative_price`
        self.value_s = fill_s + more * slowest_s  # the objective, and F_r + y s(r) of all routes in the basis
        self._unsaturated: list[float]  # 1 over the unit for unsaturated stations, else 0
        self._note_prices()

    @property
    def shares(self) -> list[tuple[int, float]]:
        """The label and the share of each route in use; the shares sum to 1."""
        values = self._values
        used = [
            (label, values[row]) for row, label in enumerate(self._basis) if label >= 0 and values[row] > LEAST_SHARE
        ]
        total = sum([share for _, share in used])
        return [(label, share / total) for label, share in used]

    @property
    def proof(self) -> StationSeconds:
        """The prices, free of rounding errors: none is negative, their sum is N - 1."""
        y1, y2, y3, y4, y5, y6, y7 = [max(price, 0.0) for price in self.prices]
        total = y1 + y2 + y3 + y4 + y5 + y6 + y7
        scale = self._more / total if total else 0.0
        return y1 * scale, y2 * scale, y3 * scale, y4 * scale, y5 * scale, y6 * scale, y7 * scale

    def negative_price(self) -> int | None:
        """The station with the least price, if this is negative: its slack must enter before any route."""
        prices = self.prices
        least = min(prices)
        return prices.index(least) if least < -TOLERANCE * (self._more + 1.0) else None

    def enter(self, label: int, fill_s: float, stations_s: StationSeconds) -> None:
        """Let a route enter that would lower the objective."""
        u1, u2, u3, u4, u5, u6, u7 = self._unsaturated
        s1, s2, s3, s4, s5, s6, s7 = stations_s
        v1, v2, v3, v4, v5, v6, v7, share, cost = self._values
        unit = self._unit
        change = [
            v1 + u1 * s1,
            v2 + u2 * s2,
            v3 + u3 * s3,
            v4 + u4 * s4,
            v5 + u5 * s5,
            v6 + u6 * s6,
            v7 + u7 * s7,
            share,
            cost + fill_s / unit,
        ]
        for k, column in self._columns.items():
            if s := stations_s[k]:
                change = _minus(change, -s / unit, column)
        if self._exchange(label, change) >= 0:
            self._note_prices()

    def release(self, station: int) -> None:
        """Let the slack of a saturated station enter: its price is negative, so the objective falls."""
        columns, basis = self._columns, self._basis
        row = self._exchange(_SLACK, columns[station])
        if row < 0:
            return
        del columns[station]
        if row != station:  # a slack is in the row of its station
            basis[row], basis[station] = basis[station], basis[row]
            for column in (self._values, *columns.values()):
                column[row], column[station] = column[station], column[row]
        self._note_prices()

    def _exchange(self, label: int, change: list[float]) -> int:
        """Let a variable enter with these changes of the basic ones; returns the row in which it is then.

        -1: rounding errors leave no variable to take its place, so `pivots` is set to `MAX_PIVOTS`.
        """
        row = self._leaving(change)
        if row < 0:
            self.pivots = MAX_PIVOTS
            return row
        columns, basis = self._columns, self._basis
        scale = 1.0 / change[row]
        for k, column in columns.items():
            if factor := column[row] * scale:
                columns[k] = column = _minus(column, factor, change)
                column[row] = factor
        factor = self._values[row] * scale
        self._values = values = _minus(self._values, factor, change)
        values[row] = factor
        if basis[row] == _SLACK:
            columns[row] = column = [-scale * b for b in change]
            column[row] = scale
        basis[row] = label
        self.pivots += 1
        self.value_s = -values[_COST] * self._unit
        return row

    def _note_prices(self) -> None:
        self.prices = prices = [0.0] * _STATIONS
        self._unsaturated = unsaturated = [1.0 / self._unit] * _STATIONS
        for k, column in self._columns.items():
            prices[k] = column[_COST]
            unsaturated[k] = 0.0

    def _leaving(self, change: list[float]) -> int:
        """The row whose variable reaches 0 first while the entering one grows, in a tie the first one; P never does.

        Rows whose change is only a rounding error are left out; returns -1 if no row remains. In theory ties could make the
        method repeat itself forever. Thousands of inputs made of ties did not, and `MAX_PIVOTS` would end it.
        """
        values, basis = self._values, self._basis
        least_slack = _LEAST_CHANGE * max(values[basis.index(_SLOWEST)], _LEAST_SLOWEST)
        best, leaving = float("inf"), -1
        for row, label in enumerate(basis):
            speed = change[row]
            if (
                speed > (least_slack if label == _SLACK else _LEAST_CHANGE)
                and values[row] < best * speed
                and label != _SLOWEST
            ):
                best, leaving = values[row] / speed, row
        return leaving


def _minus(column: list[float], factor: float, other: list[float]) -> list[float]:
    """column - factor * other; written out, because a loop takes three times as long."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = column
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = other
    return [
        a0 - factor * b0,
        a1 - factor * b1,
        a2 - factor * b2,
        a3 - factor * b3,
        a4 - factor * b4,
        a5 - factor * b5,
        a6 - factor * b6,
        a7 - factor * b7,
        a8 - factor * b8,
    ]


def solve_shares(fill_s: Sequence[float], stations_s: Sequence[StationSeconds], samples: int) -> Shares:
    """The best shares of `samples` samples among routes, given the fill and the seven station times of each.

    Raises `ValueError` if no routes are given.
    """
    more = samples - 1
    label = min(range(len(fill_s)), key=lambda r: fill_s[r] + more * max(stations_s[r]))
    program = ShareProgram(label, fill_s[label], stations_s[label], samples)
    while program.pivots < MAX_PIVOTS:
        station = program.negative_price()
        if station is not None:
            program.release(station)
            continue
        prices, value_s = program.prices, program.value_s
        least_s, label = min(
            (fill + sum(map(mul, prices, stations)), r)
            for r, (fill, stations) in enumerate(zip(fill_s, stations_s, strict=True))
        )
        if least_s >= value_s * (1.0 - TOLERANCE):
            break
        program.enter(label, fill_s[label], stations_s[label])
    return _checked(program, fill_s, stations_s, samples)


def _checked(
    program: ShareProgram, fill_s: Sequence[float], stations_s: Sequence[StationSeconds], samples: int
) -> Shares:
    shares = [0.0] * len(fill_s)
    for label, share in program.shares:
        shares[label] = share
    used = [r for r, share in enumerate(shares) if share]
    slowest_s = max(sum(shares[r] * stations_s[r][k] for r in used) for k in range(_STATIONS))
    objective_s = sum(shares[r] * fill_s[r] for r in used) + (samples - 1) * slowest_s
    return Shares(tuple(shares), slowest_s, objective_s, program.proof)
