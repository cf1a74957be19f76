"""A completed attempt: what each tier computed of it, and what was predicted for the routes that its samples took.

The shares of a placement of several routes are a plan: the device gives the samples other shares when stations turn out
faster or slower. It reports how many samples took each route, and what was measured is compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bus.messages import Placed, TaskCompleted
from bus.values import Parts
from planner.search.cost import Overheads, busy_parts, mean_stations_s

Taken = tuple[int, int, float]
"""Cut1 and cut2 of a route, and the number of samples that took it; a fraction where only the plan is known."""


class Work(NamedTuple):
    """What one tier computed of a completed attempt."""

    node: str
    profile_s: float  # time of all samples, by the profile
    busy_s: float  # measured
    samples: int  # that it computed: of several routes perhaps not all of the task


class Attempt(NamedTuple):
    """A completed attempt and what the region knows of it."""

    placed: Placed
    completed: TaskCompleted
    predicted: Parts  # for the routes that its samples took
    work: Sequence[Work]  # of each tier that computed: device, edge, cloud
    overheads: Overheads  # of the path, as they are known now


def routes_taken(placed: Placed, completed: TaskCompleted) -> list[Taken]:
    """The routes of an attempt and how many samples took each: as reported, or else as planned."""
    routes, samples = placed.placement.routes, placed.samples
    if routes is None:
        return [(placed.placement.cut1, placed.placement.cut2, samples)]
    told: Sequence[float] | None = completed.route_samples
    if told is None or len(told) != len(routes) or sum(told) != samples:
        told = [route.share * samples for route in routes]
    return [(route.cut1, route.cut2, taken) for route, taken in zip(routes, told, strict=True)]


def predicted_parts(placed: Placed, taken: Sequence[Taken]) -> Parts:
    """The predicted busy times, had the samples been predicted to take their routes so."""
    routes = placed.placement.routes
    if routes is None:
        return placed.parts
    shares = [samples / placed.samples for *_, samples in taken]
    return busy_parts(mean_stations_s(shares, routes), placed.samples)
