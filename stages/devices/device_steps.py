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


def device_segments(placement: Placement, profile: ModelProfile) -> list[Segment]:
    """All segments that a device computes for a placement."""
    alone = (profile.layers, profile.layers)
    beside = placement.edge is not None and alone in placement.cut_pairs
    fronts = [Segment(0, cut1) for cut1, cut2 in placement.cut_pairs if cut1 and not (beside and (cut1, cut2) == alone)]
    return list(dict.fromkeys(fronts + (device_steps(profile) if beside else [])))
