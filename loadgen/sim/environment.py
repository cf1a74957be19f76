"""The simulated world: what tasks really take, where predictions are wrong.

Two things make a task take another time than its declared profiles and bandwidths say:

* Noise multiplies the times of one task by a log-normal factor of mean 1. The factor belongs to the task: all policies meet
  the same one.
* Drift changes the speed of every node and every link over time, around what was declared.

Each is drawn from streams of the seed. A task meets the speeds of the instant at which it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bus.messages import Placed, TaskSubmitted
from bus.routes.interleave import interleaved_s
from bus.routes.shares import solve_shares
from bus.values import Parts, Placement, Role
from loadgen.random_streams import Streams
from loadgen.sim.platforms import Platforms
from planner.search.cost import NO_OVERHEADS, Costs, Overheads, PlatformRow, StationTimes, busy_parts, stations_s
from planner.search.families import family_of
from planner.search.policies import EXACT_BELOW
from planner.search.route_search import Way

STEP_S = 30.0
"""Time for which a drifting speed stays the same."""
KEPT = 0.9
"""Share of its distance from the declared speed that a drifting speed keeps in a step: it forgets in about five minutes."""

Factor = Callable[[str], float]
"""The noise of a task, by its id."""
Speed = Callable[[str, float], float]
"""The speed of a node, or of a link (see `link1` and `link2`), relative to the declared one, at a virtual time."""


class Ran(NamedTuple):
    """What a task took."""

    parts: Parts  # busy times
    delay_s: float  # from its start, or from its latest reroute, to its end
    route_samples: tuple[int, ...] | None = None  # on each route; None: as planned


World = Callable[[TaskSubmitted, Placed, float], Ran]
"""What a task takes that starts, or is rerouted, now: the task, its placement, virtual time."""


def as_predicted(task: TaskSubmitted, placed: Placed, now_s: float) -> Ran:
    """A world in which the planner's predictions are exact."""
    if placed.rest is not None:
        return Ran(placed.rest.parts, placed.rest.delay_s)
    return Ran(placed.parts, placed.delay_s)


def link1(device: str, edge: str) -> str:
    """The name of a device's link to an edge."""
    return f"{device}>{edge}"


def link2(edge: str) -> str:
    """The name of an edge's link to the cloud."""
    return f"{edge}>cloud"


def _samples(placed: Placed) -> int:
    """The samples that a placement is for: all, or those that were left at the latest reroute."""
    return placed.samples if placed.rest is None else placed.rest.samples


class Environment:
    """A world with noise and changing speeds. Times follow from the declared profiles, not from the planner's predictions."""

    def __init__(
        self,
        machines: Platforms,
        factor: Factor | None = None,
        speed: Speed | None = None,
        latencies: Overheads = NO_OVERHEADS,
    ) -> None:
        self._machines = machines
        self._latencies = latencies  # of the links; neither noise nor drift changes them
        self._factor = factor or _constant
        self._speed = speed or _constant
        self._costs: dict[str, Costs] = {}  # by model

    def __call__(self, task: TaskSubmitted, placed: Placed, now_s: float) -> Ran:
        """What a task takes; see `World`."""
        ways, samples = _ways_of(placed.placement), _samples(placed)
        if len(ways) > 1:
            return self._mixed(task, placed, ways, now_s)
        way = ways[0]
        sample = self._sample_s(task, placed, way, now_s)
        delay_s = stations_s(sample, samples, placed.objective)
        return Ran(busy_parts(sample, samples), delay_s + self._latency_s(task, placed, way))

    def _mixed(self, task: TaskSubmitted, placed: Placed, ways: Sequence[Way], now_s: float) -> Ran:
        """What a task of several routes takes. Its device solves the shares again from what it measures; here at once."""
        samples = _samples(placed)
        stations = [self._sample_s(task, placed, way, now_s) for way in ways]
        fill_s = [sum(s) + self._latency_s(task, placed, way) for s, way in zip(stations, ways, strict=True)]
        found = solve_shares(fill_s, stations, samples)
        parts = [busy_parts(s, samples).model_dump() for s in stations]
        busy = {name: sum(a * one[name] for a, one in zip(found.shares, parts, strict=True)) for name in parts[0]}
        beyond_s = [
            fill
            for fill, share, way in zip(fill_s, found.shares, ways, strict=True)
            if share and way.cut1 < self._costs_of(task.model).layers
        ]
        delay_s = max(beyond_s, default=min(fill_s)) + (samples - 1) * found.slowest_s
        if samples < EXACT_BELOW:
            delay_s = interleaved_s(fill_s, stations, found.shares, samples)
        return Ran(Parts(**busy), delay_s, _whole(found.shares, samples))

    def _latency_s(self, task: TaskSubmitted, placed: Placed, way: Way) -> float:
        """The share of the links' latencies in the delay of a task on one route."""
        family = family_of(way.cut1, way.cut2, self._costs_of(task.model).layers)
        return self._latencies.total_s(family, _samples(placed), placed.objective)

    def _sample_s(self, task: TaskSubmitted, placed: Placed, way: Way, now_s: float) -> StationTimes:
        """The station times of one sample."""
        factor = self._factor(task.task_id)
        place, edge = placed.placement, placed.placement.edge
        bps1, bps2 = place.link1_bps or 1, place.link2_bps or 1
        edge_speed = 1.0
        if edge is not None:
            edge_speed = self._speed(edge, now_s)
            bps1 = _carried(bps1, task.max_link1_bps, self._speed(link1(task.device, edge), now_s))
            bps2 = _carried(bps2, task.max_link2_bps, self._speed(link2(edge), now_s))
        s = self._costs_of(task.model).sample_parts(way.cut1, way.cut2, bps1, bps2, task.input_bytes, way.codecs)
        return (
            factor * (s.s1 / self._speed(task.device, now_s)),
            factor * s.s2,
            factor * (s.s3 / edge_speed),
            factor * s.s4,
            factor * (s.s5 / self._speed("cloud", now_s)),
            factor * s.s6b,
            factor * s.s6a,
        )

    def _costs_of(self, model: str) -> Costs:
        if model not in self._costs:
            machines = self._machines
            rows = (PlatformRow(machines.model(role, model)) for role in (Role.DEVICE, Role.EDGE, Role.CLOUD))
            self._costs[model] = Costs(*rows)
        return self._costs[model]


def _ways_of(placement: Placement) -> list[Way]:
    """The cuts and codecs of each route."""
    if placement.routes is None:
        return [Way(placement.cut1, placement.cut2)]
    return [Way(route.cut1, route.cut2, (route.codec1, route.codec2)) for route in placement.routes]


def _whole(shares: Sequence[float], samples: int) -> tuple[int, ...]:
    """Whole numbers of samples for these shares, with the right sum: the largest fractions are rounded up."""
    exact = [share * samples for share in shares]
    counts = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda r: counts[r] - exact[r])
    for r in by_rest[: samples - sum(counts)]:
        counts[r] += 1
    return tuple(counts)


def _carried(granted_bps: int, cap_bps: int | None, speed: float) -> int:
    """What a link carries of a task: its grant, or the task's cap times the speed of the link if that is less."""
    return max(1, min(granted_bps, int((cap_bps or granted_bps) * speed)))


def _constant(*_: object) -> float:
    return 1.0


class LogNormal:
    """Noise: a log-normal factor of mean 1 for each task; `sigma` is the standard deviation of its logarithm.

    The factor depends on the seed and the task's id alone, so it is the same under every policy.
    """

    def __init__(self, sigma: float, seed: int) -> None:
        self._sigma = sigma
        self._seed = seed

    def __call__(self, task_id: str) -> float:
        """The factor of a task."""
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, *f"noise {task_id}".encode()]))
        return math.exp(float(rng.normal(-self._sigma * self._sigma / 2, self._sigma)))


class Drift:
    """Speeds that wander around the declared ones: an autoregressive walk of the logarithm, one for each node and link.

    `sigma` is the standard deviation of the logarithm of a speed at any instant, the first one included.
    """

    def __init__(self, sigma: float, seed: int) -> None:
        self._sigma = sigma
        self._streams = Streams(seed)
        self._walks: dict[str, tuple[np.random.Generator, list[float]]] = {}

    def __call__(self, name: str, at_s: float) -> float:
        """The speed of a node or link, relative to the declared one."""
        if name not in self._walks:
            rng = self._streams.stream(f"drift {name}")
            self._walks[name] = rng, [float(rng.normal(0.0, self._sigma))]
        rng, walk = self._walks[name]
        step = int(at_s / STEP_S)
        while len(walk) <= step:
            walk.append(KEPT * walk[-1] + math.sqrt(1 - KEPT * KEPT) * float(rng.normal(0.0, self._sigma)))
        return math.exp(walk[step])
