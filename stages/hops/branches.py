"""What a plan has for one stage: for each route its layers, the size of what arrives, and where the outputs go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from bus.errors import ProtocolError
from bus.frames import MAX_SAMPLE_BYTES, AttemptPlan
from bus.routes.windows import MAX_WINDOW
from bus.tensors import encoded_limit
from bus.values import Codec, ModelProfile, Placement
from stages.computing import Segment
from stages.window import window_of


@dataclass(frozen=True, slots=True)
class Branch:
    """The part of one route on one stage."""

    segment: Segment  # the layers; none where the stage passes samples on
    to_cloud: bool  # whether the outputs go to the cloud, not to the device
    arrives: Codec = Codec.RAW  # codec of what arrives
    predicted_s: float = 0.0  # of computing one sample
    expected_bytes: int | None = None  # of one sample that arrives, where the model is known

    @property
    def computes(self) -> bool:
        """Whether the stage has layers of the route."""
        return self.segment.first != self.segment.last


class StageSide(Protocol):
    """What branches depend on of a stage."""

    @property
    def part(self) -> str:
        """The part of a task's delay that computing here belongs to."""

    def segment(self, cut1: int, cut2: int, layers: int | None) -> Segment | None:
        """The layers of a route with these cuts; None where it does not pass the stage. `layers` None: unknown."""


@dataclass(frozen=True, slots=True)
class Branches:
    """All routes of one plan on one stage, and the limits that follow."""

    routes: tuple[Branch | None, ...]  # by route; None where it does not pass the stage
    window: int = MAX_WINDOW  # samples that the device may have in the pipeline
    widest_bytes: int = MAX_SAMPLE_BYTES  # upper limit for one sample

    @property
    def used(self) -> list[Branch]:
        """The branches of the routes that pass the stage."""
        return [branch for branch in self.routes if branch is not None]

    @property
    def segments(self) -> list[Segment]:
        """The segments that the stage computes, each once."""
        return list(dict.fromkeys(branch.segment for branch in self.used if branch.computes))

    @property
    def destinations(self) -> list[bool]:
        """Whether outputs go to the cloud: False, True or both."""
        return sorted({branch.to_cloud for branch in self.used})

    def of(self, route: int) -> Branch:
        """The branch of a route. Raises `ProtocolError` where it does not pass the stage."""
        branch = self.routes[route] if route < len(self.routes) else None
        if branch is None:
            raise ProtocolError("wrong_shape", f"route {route} of the plan does not pass this stage")
        return branch

    def total(self, totals: tuple[int, ...], *, to_cloud: bool | None = None, computed: bool = False) -> int:
        """How many of a task's samples pass the stage: all, those of one destination, or those that it computes."""
        return sum(
            count
            for count, branch in zip(totals, self.routes, strict=True)
            if branch is not None
            and (to_cloud is None or branch.to_cloud == to_cloud)
            and (branch.computes or not computed)
        )


def segments_of(stage: StageSide, placement: Placement, layers: int | None) -> list[Segment]:
    """The segments that a stage computes for a placement of a model of `layers` layers."""
    found = (stage.segment(cut1, cut2, _layers_of(placement, layers)) for cut1, cut2 in placement.cut_pairs)
    return list(dict.fromkeys(segment for segment in found if segment is not None and segment.first != segment.last))


def branches_of(stage: StageSide, plan: AttemptPlan, profile: ModelProfile | None) -> Branches:
    """The branches of a plan on a stage that has this profile of the model, or none. Raises `ProtocolError`."""
    placement = plan.placement
    if placement.edge is None or not placement.link1_bps or (placement.uses_cloud and not placement.link2_bps):
        raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan lacks an edge or a link rate")
    known = profile is not None and profile.sha256 == plan.sha256
    if profile is not None and any(cut2 > profile.layers for _, cut2 in placement.cut_pairs):
        raise ProtocolError("wrong_shape", f"task {plan.task_id}: {plan.model} has {profile.layers} layers")
    layers = _layers_of(placement, profile.layers if profile is not None and known else None)
    branches = Branches(tuple(_branch(stage, plan, route, layers) for route in range(len(placement.cut_pairs))))
    if not branches.used:
        raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan does not use the {stage.part}")
    if branches.segments and not known:
        lacks = f"this stage has no model {plan.model!r}"
        differs = f"SHA-256 of {plan.model} differs from the plan"
        raise ProtocolError("unknown_model", f"task {plan.task_id}: {lacks if profile is None else differs}")
    return _sized(branches, plan, profile) if profile is not None and known else branches


def _layers_of(placement: Placement, layers: int | None) -> int | None:
    """The number of layers, which also follows from a placement without the cloud, or with a device-only route."""
    known = not placement.uses_cloud or any(route.device_only for route in placement.routes or ())
    return max(cut2 for _, cut2 in placement.cut_pairs) if known else layers


def _branch(stage: StageSide, plan: AttemptPlan, route: int, layers: int | None) -> Branch | None:
    cut1, cut2 = plan.placement.cut_pairs[route]
    segment = stage.segment(cut1, cut2, layers)
    if segment is None:
        return None
    to_cloud = segment.last != layers
    if plan.placement.routes is None:
        return Branch(segment, to_cloud)
    taken, on_edge = plan.placement.routes[route], stage.part == "edge"
    arrives = taken.codec1 if on_edge or cut1 == cut2 else taken.codec2
    if segment.first != segment.last:  # else it passes on what it gets
        segment = segment._replace(arrives=arrives, leaves=taken.codec2 if to_cloud else Codec.RAW)
    busy_s = taken.stations_s[2 if on_edge else 4] / plan.placement.apart(stage.part)
    return Branch(segment, to_cloud, arrives, busy_s)


def _sized(branches: Branches, plan: AttemptPlan, profile: ModelProfile) -> Branches:
    """The branches with the sizes of a known model."""
    sizes = profile.cut_bytes
    routes = tuple(
        None if branch is None else replace(branch, expected_bytes=_arriving_bytes(branch, plan, profile))
        for branch in branches.routes
    )
    widest = [size for branch in branches.used for size in sizes[branch.segment.first : branch.segment.last + 1]]
    widest_bytes = max(plan.input_bytes or 0, *widest)
    if any(branch.arrives is not Codec.RAW or branch.segment.leaves is not Codec.RAW for branch in branches.used):
        widest_bytes = encoded_limit(widest_bytes)
    return Branches(routes, window_of(plan, sizes), widest_bytes)


def _arriving_bytes(branch: Branch, plan: AttemptPlan, profile: ModelProfile) -> int:
    first = branch.segment.first
    return plan.input_bytes if first == 0 and plan.input_bytes is not None else profile.cut_bytes[first]
