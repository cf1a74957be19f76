"""What a device computes of a model: the front of each route, and in its idle time the whole model in steps."""

from __future__ import annotations

from itertools import pairwise

from bus.values import ModelProfile, Placement
from stages.computing import Segment


def device_steps(profile: ModelProfile) -> list[Segment]:
    """The whole model in few steps that are as short as they can be.

    No step can be shorter than the longest layer, so shorter layers are joined as long as no step gets longer than it.
    """
    cuts = [position for position in range(profile.layers + 1) if position not in profile.forbidden]
    times_s = [sum(profile.layer_s[first:last]) for first, last in pairwise(cuts)]
    limit_s = max(times_s) * (1 + 1e-9)
    steps, first, step_s = [], 0, 0.0
    for begin, time_s in zip(cuts, times_s, strict=False):
        if begin > first and step_s + time_s > limit_s:
            steps.append(Segment(first, begin))
            first, step_s = begin, 0.0
        step_s += time_s
    return [*steps, Segment(first, profile.layers)]


def weighted_steps(profile: ModelProfile) -> list[tuple[Segment, float]]:
    """These steps, and the share of each in the model's time."""
    whole_s = sum(profile.layer_s) or 1.0
    return [(step, sum(profile.layer_s[step.first : step.last]) / whole_s) for step in device_steps(profile)]


def front(placement: Placement, route: int) -> Segment:
    """What the device does for a sample of a route before it sends it."""
    cut1, _ = placement.cut_pairs[route]
    if placement.edge is None or placement.routes is None:
        return Segment(0, cut1)
    return Segment(0, cut1, leaves=placement.routes[route].codec1)


def device_segments(placement: Placement, profile: ModelProfile) -> list[Segment]:
    """All segments that a device computes for a placement."""
    alone = (profile.layers, profile.layers)
    beside = placement.edge is not None and alone in placement.cut_pairs
    pairs = placement.cut_pairs
    fronts = [front(placement, route) for route, pair in enumerate(pairs) if not (beside and pair == alone)]
    used = [segment for segment in fronts if segment.works]
    return list(dict.fromkeys(used + (device_steps(profile) if beside else [])))
