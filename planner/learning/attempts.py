"""A completed attempt: what each tier computed of it, and what was predicted for the routes that its samples took.

The shares of a placement of several routes are a plan: the device gives the samples other shares when stations turn out
faster or slower. It reports how many samples took each route, and what was measured is compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bus.messages import Placed, TaskCompleted
from bus.values import Parts
from planner.search.cost import RAW, Codecs, Crossing, Overheads, PlatformRow, busy_parts, mean_stations_s


class Taken(NamedTuple):
    """A route, and how many samples took it."""

    cut1: int
    cut2: int
    samples: float  # a fraction where only the plan is known
    codecs: Codecs = RAW

    def by_tier(self, layers: int) -> tuple[TierShare, TierShare, TierShare]:
        """What device, edge and cloud compute, encode and decode of it."""
        cut1, cut2, samples, (codec1, codec2) = self
        one = two = None
        if cut1 < layers:
            one = cut1, codec1
        if cut2 < layers:
            two = cut2, codec2
        middle = (None, None) if cut1 == cut2 else (one, two)  # an edge that computes nothing passes on what it gets
        return (
            TierShare(0, cut1, samples, decodes=None, encodes=one),
            TierShare(cut1, cut2, samples, decodes=middle[0], encodes=middle[1]),
            TierShare(cut2, layers, samples, decodes=two, encodes=None),
        )


class TierShare(NamedTuple):
    """What a tier does for the samples of one route."""

    first: int
    last: int  # it computes layers first + 1..last
    samples: float
    decodes: Crossing | None
    encodes: Crossing | None

    def profile_s(self, row: PlatformRow) -> float:
        """The time of the samples by the tier's profile; of a crossing that it has not measured, without the codec."""
        one_s = row.compute_s[self.last] - row.compute_s[self.first]
        if self.decodes is not None and self.decodes in row.codings:
            one_s += row.codings[self.decodes].decode_s
        if self.encodes is not None and self.encodes in row.codings:
            one_s += row.codings[self.encodes].encode_s
        return self.samples * one_s


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
        return [Taken(placed.placement.cut1, placed.placement.cut2, samples)]
    told: Sequence[float] | None = completed.route_samples
    if told is None or len(told) != len(routes) or sum(told) != samples:
        told = [route.share * samples for route in routes]
    return [
        Taken(route.cut1, route.cut2, count, (route.codec1, route.codec2))
        for route, count in zip(routes, told, strict=True)
    ]


def predicted_parts(placed: Placed, taken: Sequence[Taken]) -> Parts:
    """The predicted busy times, had the samples been predicted to take their routes so."""
    routes = placed.placement.routes
    if routes is None:
        return placed.parts
    shares = [one.samples / placed.samples for one in taken]
    s1, s2, s3, s4, s5, s6b, s6a = mean_stations_s(shares, routes)
    s3, s5 = s3 / placed.placement.apart("edge"), s5 / placed.placement.apart("cloud")
    return busy_parts((s1, s2, s3, s4, s5, s6b, s6a), placed.samples)
