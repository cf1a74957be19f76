"""A lower bound of the sum of delays on one edge, valid for every policy: a linear program, solved by column generation.

The master program chooses for each task a mixture of ways to run it (`loadgen.bounds.pricing.Column`), so that in each
interval of time the tasks together use a shared station no longer than its capacity allows, and minimises the sum of the
delays. What a policy does is one way for each task, so the optimum is a lower bound. So is, for any prices >= 0 of the shared
stations,

    sum of the tasks' least costs - sum of price x capacity

and this is what `edge_bound` returns: prices come from the master program, least costs are certified. A solver that errs
makes the bound weaker, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from bus.errors import InvariantError
from loadgen.bounds.edge_case import EdgeCase, Vector
from loadgen.bounds.pricing import Column, FluidPricing, Least

CLOSE: Final = 0.003
"""The column generation ends when its bound is this close, relatively, to the value of the master program."""
MOST_ROUNDS: Final = 100
MERGED: Final = (16, 8, 4, 2, 1)
"""How many intervals have the same price: first many, so that few prices are sought at a time."""
MOST_EVEN: Final = 40
"""Most intervals between the first and the last arrival."""
LONGER: Final = 1.12
"""Ratio of neighbouring intervals after the last arrival."""
SMOOTHING: Final = 0.5  # weight of the best prices so far in those tried next: calms the column generation


@dataclass(frozen=True, slots=True)
class EdgeBound:
    """The bound of one edge."""

    edge: str
    tasks: int
    delay_s: float  # lower bound of the sum of the delays
    program_s: float  # value of the master program: the bound that more rounds would approach


def edge_bound(case: EdgeCase) -> EdgeBound:
    """Bound the sum of the delays of the tasks of one edge."""
    shared = case.scarce
    times_s = intervals(case)
    subproblems = [FluidPricing(task, shared, times_s) for task in case.tasks]
    weights = np.array([[task.weight(k) for k in shared] for task in case.tasks])  # (tasks, shared)
    room = np.array([case.capacity(k) for k in shared])[:, None] * np.diff(times_s)  # (shared, intervals)
    columns = [(index, one.alone) for index, one in enumerate(subproblems)]  # without them no mixture might fit
    value = float(sum(one.alone.delay_s for one in subproblems))
    best_bound, best_prices = -np.inf, np.zeros_like(room)
    prices, merged = best_prices, [size for size in MERGED if size < len(times_s)] if shared else []
    for _ in range(MOST_ROUNDS):
        tried = SMOOTHING * best_prices + (1 - SMOOTHING) * prices
        found = [one.least(weight[:, None] * tried) for one, weight in zip(subproblems, weights, strict=True)]
        bound = _bound(found, tried, room)
        if bound > best_bound:
            best_bound, best_prices = bound, tried
        if not shared:
            value = sum(one.cost_s for one in found)  # the tasks do not hinder each other
            break
        columns += enumerate(one.column for one in found)
        value, prices = _master(columns, weights, room, merged[0])
        while value - best_bound <= CLOSE * value and merged[1:]:
            merged = merged[1:]
            value, prices = _master(columns, weights, room, merged[0])
        if value - best_bound <= CLOSE * value:
            break
    return EdgeBound(case.edge, len(case.tasks), best_bound, value)


def _bound(found: Sequence[Least], prices: Vector, room: Vector) -> float:
    return sum(one.bound_s for one in found) - float((prices * room).sum())


def intervals(case: EdgeCase) -> Vector:
    """The ends of the intervals of time: even while tasks arrive, then ever longer, until each device alone would be done."""
    arrivals = [task.arrival_s for task in case.tasks]
    first, last = min(arrivals), max(arrivals)
    end = max(task.arrival_s + task.samples * float(task.stations_s[0].sum()) for task in case.tasks)
    typical_s = fmean(task.samples * float(task.stations_s.max(axis=1).min()) for task in case.tasks)
    step = max((last - first) / MOST_EVEN, typical_s / 20, 1e-9)
    even = first + step * np.arange(np.ceil((last - first) / step) + 1)
    later = even[-1] + step * np.cumsum(LONGER ** np.arange(100))
    return np.concatenate((even, later[later < end], [max(end, even[-1] + step)]))


def _master(columns: Sequence[tuple[int, Column]], weights: Vector, room: Vector, merged: int) -> tuple[float, Vector]:
    """The value of the master program over these columns, and its prices, equal in `merged` neighbouring intervals."""
    from scipy.optimize import linprog  # imported late: loading scipy would slow down every command
    from scipy.sparse import csr_matrix

    firsts = np.arange(0, room.shape[1], merged)
    amounts = np.add.reduceat(room, firsts, axis=1)
    usage = [
        (weights[task][:, None] * np.add.reduceat(column.busy_s, firsts, axis=1) / amounts).ravel()
        for task, column in columns
    ]
    tasks, count = len(weights), len(columns)
    one = csr_matrix((np.ones(count), ([task for task, _ in columns], range(count))), (tasks, count))
    done = linprog(
        [column.delay_s for _, column in columns],
        A_ub=csr_matrix(np.array(usage).T),
        b_ub=np.ones(amounts.size),
        A_eq=one,
        b_eq=np.ones(tasks),
        method="highs-ds",
    )
    if done.x is None:
        raise InvariantError(f"the master program has no solution: {done.message}")
    prices = np.maximum(0.0, -done.ineqlin.marginals.reshape(amounts.shape) / amounts)
    return float(done.fun), np.repeat(prices, merged, axis=1)[:, : room.shape[1]]
