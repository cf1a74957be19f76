"""The least cost of one task where time on shared stations has a price: the subproblem of the column generation.

A task may end after any delay D. It divides its samples among its routes, so that each station works at most as long as D
allows, and buys time on shared stations in the intervals in which it is cheap. Its cost is D plus what it pays.

For given D this is a linear program with a row for each station. `FluidPricing.least` returns a certified lower bound of the
least cost over all D. It collects vectors of weights w >= 0 of the stations. With head_k and tail_k, the least times that a
sample needs before and behind station k, weak duality gives for each vector a lower bound of what is paid, for all D and
prices:

    N min_r sum_k w_k s_k(r) - sum_k w_k (D - head_k - tail_k) - sum_h sum_j max(0, w_h - price_hj) available_hj(D)

with k over the stations of the task's own and h over shared ones. A program is solved only where the collected vectors leave
the least cost open; its solution is a new vector, and a column. So the bound does not depend on how exactly a solver solves.

Delays are rounded in the bound's favour: between two points of a grid a task pays for the lower one and has the time of the
higher one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from bus.errors import InvariantError
from loadgen.bounds.edge_case import STATIONS, FluidTask, Vector

STEP: Final = 1.004
"""Ratio of neighbouring delays of the grid."""
MOST_POINTS: Final = 1_500
TOLERANCE: Final = 1e-4  # relative: a least cost is settled this closely
MOST_ROUNDS: Final = 40
MOST_VECTORS: Final = 300
MORE_ROUTES: Final = 6


class Column(NamedTuple):
    """A way to run a task: its delay, and for each shared station its busy seconds in each interval."""

    delay_s: float
    busy_s: Vector  # (shared stations, intervals)


class Least(NamedTuple):
    """The least cost of a task at given prices."""

    bound_s: float  # certified: no way costs less
    cost_s: float  # of `column`
    column: Column


class FluidPricing:
    """The subproblem of one task, prepared for the shared stations and the time intervals of an edge."""

    def __init__(self, task: FluidTask, shared: Sequence[int], times_s: Vector) -> None:
        """`times_s`: the ends of the intervals, from before the first arrival; after the last, time is free."""
        self._shared, self._intervals = list(shared), len(times_s) - 1
        self._routes = [0]  # those that programs are solved over
        self._own = [k for k in range(STATIONS) if k not in shared]
        self._work_s = task.samples * task.stations_s  # (routes, stations): if all samples took the route
        heads, tails = task.ends_s()
        shortest_s = task.shortest_s
        self._heads = np.minimum(heads, shortest_s)
        self._tails = np.minimum(tails, shortest_s - self._heads)
        alone_s = float(self._work_s[0].sum())
        least_s = min(max(shortest_s, self._fastest_s()), alone_s)
        count = 1 + min(MOST_POINTS, int(np.ceil(np.log(alone_s / least_s) / np.log(STEP)))) if least_s > 0 else 1
        self._low = np.geomspace(least_s, alone_s, max(2, count)) if alone_s > least_s else np.array([alone_s])
        self._low[0], self._low[-1] = least_s, alone_s
        self._high = np.append(self._low[1:], alone_s)
        self._budget = np.maximum(0.0, self._high[:, None] - (self._heads + self._tails)[self._own])  # (delays, own)
        self._available = [self._time(task.arrival_s, k, times_s) for k in shared]  # each (delays, intervals)
        self._weights = np.zeros((0, STATIONS))

    @property
    def alone(self) -> Column:
        """The device alone."""
        return Column(float(self._low[-1]), np.zeros((len(self._shared), self._intervals)))

    def least(self, prices: Vector) -> Least:
        """The least cost. `prices` (shared stations, intervals): of one busy second of this task."""
        bounds = self._bounds(self._weights, prices)
        best: tuple[float, Column] | None = None
        for _ in range(MOST_ROUNDS):
            costs = self._low + bounds
            at = int(costs.argmin())
            if best is not None and costs[at] >= best[0] - TOLERANCE * abs(best[0]):
                break
            weights, column, paid = self._solve(at, prices)
            if best is None or column.delay_s + paid < best[0]:
                best = (column.delay_s + paid, column)
            self._weights = np.vstack((weights, self._weights))[:MOST_VECTORS]
            found = self._bounds(weights, prices)
            if found[at] <= bounds[at] + 1e-12 * costs[at]:
                break  # the solver's tolerance: no vector improves the bound here
            bounds = np.maximum(bounds, found)
        assert best is not None
        return Least(float((self._low + bounds).min()), best[0], best[1])

    def _fastest_s(self) -> float:
        """A lower bound of the delay if everything is free: the least D at which all stations suffice. Notes its routes."""
        from scipy.optimize import linprog  # imported late: loading scipy would slow down every command

        ends = self._heads + self._tails
        routes = len(self._work_s)
        work = np.hstack((self._work_s.T, -np.ones((STATIONS, 1))))
        cost = np.append(np.zeros(routes), 1.0)
        done = linprog(
            cost, A_ub=work, b_ub=-ends, A_eq=[np.append(np.ones(routes), 0.0)], b_eq=[1.0], method="highs-ds"
        )
        self._routes = [0, *(int(r) for r in np.flatnonzero(done.x[1:routes] > 0) + 1)]
        weights = np.maximum(0.0, -done.ineqlin.marginals)
        weights /= weights.sum()
        return float((self._work_s @ weights).min() + weights @ ends)

    def _time(self, arrival_s: float, station: int, times_s: Vector) -> Vector:
        """The seconds of each interval in which the station may work for the task, for every delay of the grid."""
        begin_s = arrival_s + self._heads[station]
        end_s = arrival_s + self._high - self._tails[station]
        span = np.minimum(times_s[1:], end_s[:, None]) - np.maximum(times_s[:-1], begin_s)
        free = end_s - max(begin_s, times_s[-1])
        return np.asarray(np.maximum(0.0, np.column_stack((span, free))), dtype=np.float64)

    def _bounds(self, weights: Vector, prices: Vector) -> Vector:
        """For every delay of the grid the best lower bound of what is paid that these weights (rows) prove; at least 0."""
        if not len(weights):
            return np.zeros(len(self._low))
        total = (weights @ self._work_s.T).min(axis=1)[:, None] - weights[:, self._own] @ self._budget.T
        for index, station in enumerate(self._shared):
            above = np.maximum(0.0, weights[:, station, None] - np.append(prices[index], 0.0))
            total -= above @ self._available[index].T
        return np.asarray(np.maximum(0.0, total.max(axis=0)), dtype=np.float64)

    def _solve(self, at: int, prices: Vector) -> tuple[Vector, Column, float]:
        """Solve the program at one delay: its weights (one row), the column, and what it pays.

        Few routes matter, so it is solved over some of them, and again with those that its weights show to be better.
        """
        while True:
            weights, column, paid, least_s = self._solve_over(self._routes, at, prices)
            work_s = self._work_s @ weights[0]
            better = [int(r) for r in work_s.argsort()[:MORE_ROUTES] if work_s[r] < least_s - TOLERANCE * abs(least_s)]
            if not better or set(better) <= set(self._routes):
                return weights, column, paid
            self._routes = list(dict.fromkeys([*self._routes, *better]))

    def _solve_over(self, routes: Sequence[int], at: int, prices: Vector) -> tuple[Vector, Column, float, float]:
        """The same over some routes; also the weighted work of a task on the routes that it takes."""
        from scipy.optimize import linprog  # imported late: loading scipy would slow down every command

        order = self._own + self._shared
        limits = [available[at] for available in self._available]
        cost = np.concatenate((np.zeros(len(routes)), *(np.append(row, 0.0) for row in prices)))
        intervals = self._intervals + 1
        rows = np.zeros((STATIONS, len(cost)))
        rows[:, : len(routes)] = self._work_s[routes][:, order].T
        for index in range(len(self._shared)):
            first = len(routes) + index * intervals
            rows[len(self._own) + index, first : first + intervals] = -1.0
        upper = np.concatenate((np.full(len(routes), np.inf), *limits))
        used = upper > 0
        done = linprog(
            cost[used],
            A_ub=rows[:, used],
            b_ub=np.append(self._budget[at], np.zeros(len(self._shared))),
            A_eq=np.where(np.arange(len(cost)) < len(routes), 1.0, 0.0)[None, used],
            b_eq=[1.0],
            bounds=np.column_stack((np.zeros(used.sum()), upper[used])),
            method="highs-ds",
        )
        if done.x is None:
            raise InvariantError(f"the program of a task has no solution at {self._high[at]:.6g} s: {done.message}")
        weights = np.zeros((1, STATIONS))
        weights[0, order] = np.maximum(0.0, -done.ineqlin.marginals)
        bought = np.zeros(len(cost))
        bought[used] = done.x
        busy = bought[len(routes) :].reshape(len(self._shared), intervals)[:, :-1]
        return weights, Column(float(self._low[at]), busy), float(done.fun), float(done.eqlin.marginals[0])
