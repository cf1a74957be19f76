"""Routes benchmark (`deepar loadgen bench routes`): time of the search for the best mix of routes, and its distance from the
optimum.

The models are random, as in the benchmark `planner`, and the routes are all pairs of cuts and the device alone. Times are
processor times of the thread, the least of three, because a search changes nothing. `highs_p50_s` is the time of HiGHS
(`scipy.optimize.linprog`) for the same linear program, without writing it down; it must find the same objective.

`gap` is the largest relative distance between an objective and the bound that its prices prove, computed here from all
routes and without the search: no shares of any routes have an objective below min_r (F_r + sum_k y_k s_k(r)).
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.errors import InvariantError
from loadgen.bench.planner import no_collection, random_profile
from planner.search.cost import Costs, PlatformRow
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE
from planner.search.route_search import Mix, RouteSearch

AIMS_S: Final = {13: 0.12e-3, 22: 0.15e-3, 92: 0.3e-3}
"""Layers -> the median time to reach."""
GAP: Final = 1e-9

MODELS: Final = 12
SEARCHES: Final = 40
REPEATS: Final = 3
HIGHS_SEARCHES: Final = 3
"""Searches of each model that HiGHS repeats."""
_INPUT_BYTES: Final = 500_000


class _Question(NamedTuple):
    link1_bps: int
    link2_bps: int
    samples: int


class Routes(NamedTuple):
    """All routes of a model at the bandwidths of a question."""

    fill_s: npt.NDArray[np.float64]
    stations_s: npt.NDArray[np.float64]  # a row of seven for each route
    samples: int


def run(*, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes. Takes a few seconds."""
    say = progress or (lambda line: None)
    results = []
    with no_collection():
        for layers in AIMS_S:
            say(f"{layers} layers")
            results.append(case(layers, seed))
    aims: list[dict[str, Any]] = [
        {"name": f"a solution, {row['layers']} layers", "value": row["solve_p50_s"], "aim": AIMS_S[row["layers"]]}
        for row in results
    ]
    aims.append({"name": "relative gap", "value": max(row["gap"] for row in results), "aim": GAP})
    for aim in aims:
        aim["pass"] = aim["value"] <= aim["aim"]
    return {
        "bench": "routes",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": aims,
    }


def case(layers: int, seed: int) -> dict[str, Any]:
    """One row of the results: models with this many layers."""
    rng = random.Random(f"{seed} routes {layers}")
    solved_s: list[float] = []
    highs_s: list[float] = []
    ratios: list[float] = []
    gap = 0.0
    for search in _searches(rng, layers):
        for number in range(SEARCHES):
            question = _Question(
                rng.randrange(20_000_000, 300_000_000), rng.randrange(10_000_000, 50_000_000), rng.randint(2, 1000)
            )
            mix, took_s = _timed(search, question)
            routes = _all_routes(search.search.costs, question)
            gap = max(gap, relative_gap(mix, routes))
            solved_s.append(took_s)
            if number < HIGHS_SEARCHES:
                highs_s.append(_highs_s(routes, mix.objective_s))
                ratios.append(highs_s[-1] / took_s)
    solved_s.sort()
    return {
        "layers": layers,
        "pairs": (layers + 1) * (layers + 2) // 2,
        "solve_p50_s": statistics.median(solved_s),
        "solve_p99_s": solved_s[len(solved_s) * 99 // 100],
        "highs_p50_s": statistics.median(highs_s),
        "ratio": statistics.median(ratios),
        "gap": gap,
    }


def relative_gap(mix: Mix, routes: Routes) -> float:
    """The distance between an objective and the bound that its prices prove, over the objective.

    Raises `InvariantError` if a price is negative, or if the sum of the prices is not N - 1.
    """
    prices = np.array(mix.prices)
    if prices.min() < 0.0 or abs(prices.sum() - (routes.samples - 1)) > 1e-9 * routes.samples:
        raise InvariantError(f"prices {mix.prices} of {routes.samples} samples")
    bound_s = float((routes.fill_s + routes.stations_s @ prices).min())
    return max(0.0, mix.objective_s - bound_s) / mix.objective_s


def _searches(rng: random.Random, layers: int) -> Iterator[RouteSearch]:
    for _ in range(MODELS):
        sizes = tuple(rng.randrange(1_000, 1_000_000) for _ in range(layers + 1))
        device, edge, cloud = (PlatformRow(random_profile(rng, layers, sizes)) for _ in range(3))
        search = RouteSearch(CutSearch(device, edge, cloud))
        search.best(ALL_THREE, 1e8, 1e7, 10, _INPUT_BYTES)  # prepares it
        yield search


def _timed(search: RouteSearch, question: _Question) -> tuple[Mix, float]:
    least_s = float("inf")
    for _ in range(REPEATS):
        began_s = time.thread_time()
        mix = search.best(ALL_THREE, *question, _INPUT_BYTES)
        least_s = min(least_s, time.thread_time() - began_s)
    if mix is None:
        raise InvariantError("the search found no mix of routes")
    return mix, least_s


def _all_routes(costs: Costs, question: _Question) -> Routes:
    layers = costs.layers
    stations_s = np.array(
        [
            costs.sample_parts(cut1, cut2, question.link1_bps, question.link2_bps, _INPUT_BYTES)
            for cut1 in range(layers + 1)
            for cut2 in range(cut1, layers + 1)
        ]
    )
    return Routes(stations_s.sum(axis=1), stations_s, question.samples)


def _highs_s(routes: Routes, objective_s: float) -> float:
    """The time of HiGHS for the same linear program. Raises `InvariantError` if it finds another objective."""
    from scipy import optimize  # imported late: loading scipy would slow down every command

    count = len(routes.fill_s)
    program = {
        "c": np.append(routes.fill_s, routes.samples - 1.0),
        "A_ub": np.hstack([routes.stations_s.T, -np.ones((7, 1))]),
        "b_ub": np.zeros(7),
        "A_eq": np.append(np.ones(count), 0.0).reshape(1, -1),
        "b_eq": np.ones(1),
        "method": "highs",
    }
    began_s = time.thread_time()
    found = optimize.linprog(**program)
    took_s = time.thread_time() - began_s
    if found.status != 0 or abs(found.fun - objective_s) > 1e-6 * objective_s:
        raise InvariantError(f"the search found {objective_s} s, HiGHS {found.fun} s")
    return took_s
