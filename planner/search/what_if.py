"""The plans for a single task without a ledger: the best cuts under given constraints and bandwidths.

The setting is one device, one edge, one cloud, and two links. Every pair of cuts is evaluated, because the caller may ask for
more than the best plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from typing import Final

from bus.errors import ConfigError, CutError
from bus.routes.interleave import interleaved_s
from bus.routes.shares import solve_shares
from bus.values import Codec, Kind, ModelProfile, Objective, Parts, Role
from planner.search.batch_load import batch_load, samples_each
from planner.search.codec_search import CodecSearch
from planner.search.cost import (
    NO_OVERHEADS,
    RAW,
    Codecs,
    Costs,
    Crossing,
    Overheads,
    PlatformRow,
    SampleParts,
    stations_s,
)
from planner.search.families import DEVICE, family_of
from planner.search.policies import BUILT_IN, EXACT_BELOW, check_objective
from planner.search.route_search import MixedRoute

_CODECS: Final = tuple(Codec)


@dataclass(frozen=True, slots=True)
class Constraints:
    """The constraints on a plan. The default has none."""

    pinned: frozenset[Role] = frozenset()  # tiers that must compute
    forbidden: frozenset[Role] = frozenset()  # tiers that must not compute; a forbidden edge may still relay
    keep_on_device: int = 0  # the device runs at least layers 1..keep_on_device (privacy)
    max_cut_bytes: int | None = None  # neither link may carry more for one sample; the result is not counted
    max_delay_s: float | None = None  # for all samples

    def __post_init__(self) -> None:
        both = sorted(role.value for role in self.pinned & self.forbidden)
        if both:
            raise ConfigError(f"{', '.join(both)} cannot be pinned and forbidden at once")


@dataclass(frozen=True, slots=True)
class Situation:
    """The input: one model on three platforms, two links, and a number of samples."""

    device: ModelProfile
    edge: ModelProfile | None
    cloud: ModelProfile | None
    link1_bps: int
    link2_bps: int
    samples: int = 1
    objective: Objective = Objective.SEQUENTIAL
    input_bytes: int | None = None  # G(0); None: the model's own
    constraints: Constraints = field(default_factory=Constraints)
    overheads: Overheads = NO_OVERHEADS  # latencies of the links
    codecs: bool = False  # whether the codecs of the profiles may be used
    min_agreement: float | None = None  # of lossy ones; None: lossless ones only


@dataclass(frozen=True, slots=True)
class WhatIfPlan:
    """One way to run the task: its cuts, bandwidths and delay."""

    kind: Kind
    cut1: int
    cut2: int
    cut1_name: str
    cut2_name: str
    link1_bps: int  # 0 if unused
    link2_bps: int
    delay_s: float
    latency_s: float  # share of the links' latencies in the delay
    parts: Parts
    codecs: Codecs = RAW
    routes: tuple[MixedRoute, ...] = ()  # by falling share; empty: one route, cut1 and cut2


def position_of(profile: ModelProfile, layer: str) -> int:
    """The position after a layer, given by name or number (0 is `input`). Raises `CutError` for an unknown layer."""
    if layer == "input":
        return 0
    if layer in profile.layer_names:
        return profile.layer_names.index(layer) + 1
    if layer.isdecimal() and int(layer) <= profile.layers:
        return int(layer)
    raise CutError(
        f"{profile.model} has no layer {layer}; there are {', '.join(profile.layer_names)}, or 0 to {profile.layers}"
    )


def plans(situation: Situation, top: int = 1) -> list[WhatIfPlan]:
    """The best `top` plans, best first; ties as in Algorithm 1. Empty if no plan meets the constraints."""
    costs, search = _prepared(situation)
    return _best(situation, costs, _allowed(situation, search), top)


def _best(s: Situation, costs: Costs, ways: Iterable[tuple[int, int, Codecs]], top: int) -> list[WhatIfPlan]:
    """The best `top` plans of some cuts and codecs, best first."""
    ranked = []
    for cut1, cut2, codecs in ways:
        one = costs.sample_parts(cut1, cut2, s.link1_bps or 1, s.link2_bps or 1, s.input_bytes, codecs)
        family = family_of(cut1, cut2, costs.layers)
        delay = stations_s(one, s.samples, s.objective) + s.overheads.total_s(family, s.samples, s.objective)
        if s.constraints.max_delay_s is None or delay <= s.constraints.max_delay_s:
            ranked.append((delay, family, cut1, cut2, [_CODECS.index(codec) for codec in codecs], codecs))
    found = nsmallest(top, ranked)
    return [_plan(s, costs, delay, (cut1, cut2), codecs) for delay, _, cut1, cut2, _, codecs in found]


def mixed(situation: Situation) -> WhatIfPlan | None:
    """The best plan of one or several routes, each of which meets the constraints; None if no plan does.

    Raises `ConfigError` unless the objective is pipelined.
    """
    check_objective(BUILT_IN["routes"], situation.objective)
    most_s = situation.constraints.max_delay_s  # of the whole task: a mix may meet it though no single route does
    s = replace(situation, constraints=replace(situation.constraints, max_delay_s=None))
    costs, search = _prepared(s)
    routes = list(_allowed(s, search))
    best = next(iter(_best(s, costs, routes, 1)), None)
    if best is not None:
        mix = _mix(s, costs, routes)
        best = best if mix is None or mix.delay_s >= best.delay_s else mix
    return None if best is None or (most_s is not None and best.delay_s > most_s) else best


def _mix(s: Situation, costs: Costs, routes: Sequence[tuple[int, int, Codecs]]) -> WhatIfPlan | None:
    """The best mix of at least two of these routes; None where one of them or the device alone is best."""
    stations = [
        costs.sample_parts(cut1, cut2, s.link1_bps or 1, s.link2_bps or 1, s.input_bytes, codecs)
        for cut1, cut2, codecs in routes
    ]
    families = [family_of(cut1, cut2, costs.layers) for cut1, cut2, _ in routes]
    fill_s = [
        sum(one) + s.overheads.total_s(family, s.samples, s.objective)
        for one, family in zip(stations, families, strict=True)
    ]
    found = solve_shares(fill_s, stations, s.samples)
    used = sorted((r for r, share in enumerate(found.shares) if share), key=lambda r: (-found.shares[r], r))
    beyond = [r for r in used if families[r] != DEVICE]
    if len(used) < 2 or not beyond:
        return None
    shares = [found.shares[r] for r in used]
    delay_s = max(fill_s[r] for r in beyond) + (s.samples - 1) * found.slowest_s
    if s.samples < EXACT_BELOW:
        delay_s = interleaved_s([fill_s[r] for r in used], [stations[r] for r in used], shares, s.samples)
    largest = _plan(s, costs, delay_s, routes[beyond[0]][:2], routes[beyond[0]][2])
    cut_pairs = [routes[r][:2] for r in used]
    mean = [sum(found.shares[r] * stations[r][k] for r in used) for k in range(7)]
    return replace(
        largest,
        kind=Kind.of_all(cut_pairs, costs.layers),
        link2_bps=s.link2_bps if any(cut2 != costs.layers for _, cut2 in cut_pairs) else 0,
        latency_s=max(s.overheads.latency_s(families[r]) for r in used),
        parts=costs.busy_parts(SampleParts(*mean), s.samples),
        routes=tuple(MixedRoute(*routes[r][:2], found.shares[r], routes[r][2]) for r in used),
    )


def _prepared(s: Situation) -> tuple[Costs, CodecSearch | None]:
    """The costs, and the search that knows the codecs if they may be used."""
    rows = (PlatformRow(s.device), _alone(s.edge, s), _alone(s.cloud, s))
    search = CodecSearch(rows, rows[0].consent(s.min_agreement)) if s.codecs else None
    return Costs(*rows) if search is None else search.costs, search


def _alone(profile: ModelProfile | None, s: Situation) -> PlatformRow | None:
    """The row of an edge or cloud on which no other task runs."""
    if profile is None:
        return None
    batches = profile.batch is not None and s.objective is Objective.PIPELINED
    load = batch_load(profile, 1, samples_each(s.samples, profile.cut_bytes)) if batches else None
    return PlatformRow(profile, load=load)


def _plan(s: Situation, costs: Costs, delay: float, cuts: tuple[int, int], codecs: Codecs) -> WhatIfPlan:
    cut1, cut2 = cuts
    crossings = s.samples if s.objective is Objective.SEQUENTIAL else 1
    one = costs.sample_parts(cut1, cut2, s.link1_bps or 1, s.link2_bps or 1, s.input_bytes, codecs)
    return WhatIfPlan(
        kind=Kind.of(cut1, cut2, costs.layers),
        cut1=cut1,
        cut2=cut2,
        cut1_name=s.device.cut_name(cut1),
        cut2_name=s.device.cut_name(cut2),
        link1_bps=s.link1_bps if cut1 != costs.layers else 0,
        link2_bps=s.link2_bps if cut2 != costs.layers else 0,
        delay_s=delay,
        latency_s=s.overheads.latency_s(family_of(cut1, cut2, costs.layers)) * crossings,
        parts=costs.busy_parts(one, s.samples),
        codecs=codecs,
    )


def _allowed(s: Situation, search: CodecSearch | None) -> Iterable[tuple[int, int, Codecs]]:
    """The cuts and codecs that meet the constraints."""
    own_input = s.input_bytes not in (None, s.device.cut_bytes[0])
    for cut1, cut2 in _allowed_cuts(s):
        for codecs in (RAW,) if search is None else search.codecs_at(cut1, cut2, own_input=own_input):
            crossings = zip((cut1, cut2), codecs, strict=True)
            if s.constraints.max_cut_bytes is None or _sent(s, crossings) <= s.constraints.max_cut_bytes:
                yield cut1, cut2, codecs


def _allowed_cuts(s: Situation) -> Iterable[tuple[int, int]]:
    layers, limits = s.device.layers, s.constraints
    uncut = set(s.device.forbidden)
    for profile in (s.edge, s.cloud):
        uncut |= set(profile.forbidden if profile is not None else ())
    positions = [p for p in range(layers + 1) if p not in uncut]
    for cut1 in positions:
        for cut2 in positions:
            if cut1 > cut2 or cut1 < limits.keep_on_device:
                continue
            used = {
                role
                for role, computes in (
                    (Role.DEVICE, cut1 > 0),
                    (Role.EDGE, cut1 != cut2),
                    (Role.CLOUD, cut2 != layers),
                )
                if computes
            }
            if not limits.pinned <= used or limits.forbidden & used:
                continue
            if (Role.EDGE in used and s.edge is None) or (Role.CLOUD in used and s.cloud is None):
                continue
            if (cut1 != layers and s.link1_bps < 1) or (cut2 != layers and s.link2_bps < 1):
                continue
            yield cut1, cut2


def _sent(s: Situation, crossings: Iterable[Crossing]) -> int:
    """The largest size that either link carries for one sample, in bytes."""
    encoded = {(one.position, one.codec): one.bytes for one in s.device.codecs or ()}
    sizes = []
    for crossing in crossings:
        raw_bytes = s.device.cut_bytes[crossing[0]]
        if crossing[0] == 0 and s.input_bytes is not None:
            raw_bytes = s.input_bytes
        if crossing[0] < s.device.layers:
            sizes.append(raw_bytes if crossing[1] is Codec.RAW else encoded[crossing])
    return max(sizes, default=0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """An interval of bandwidth over which the same cuts are best."""

    from_bps: int
    to_bps: int
    cut1: int
    cut2: int


def sweep(situation: Situation, link: int, bandwidths: Iterable[int]) -> list[WhatIfPlan | None]:
    """The best plan at each bandwidth of one link, with the other link unchanged; None if no plan is allowed."""

    def at(bps: int) -> Situation:
        return replace(situation, link1_bps=bps) if link == 1 else replace(situation, link2_bps=bps)

    costs, search = _prepared(situation)
    ways = list(_allowed(at(1), search))  # the same at every bandwidth above 0
    found: list[WhatIfPlan | None] = []
    for bps in bandwidths:
        changed = at(bps)
        found.append(next(iter(_best(changed, costs, ways if bps >= 1 else _allowed(changed, search), 1)), None))
    return found


def stretches(bandwidths: list[int], best: list[WhatIfPlan | None]) -> list[Stretch]:
    """The intervals of a sweep over which the best cuts stay the same."""
    found: list[Stretch] = []
    for bps, plan in zip(bandwidths, best, strict=True):
        if plan is None:
            continue
        if found and (found[-1].cut1, found[-1].cut2) == (plan.cut1, plan.cut2):
            found[-1] = Stretch(found[-1].from_bps, bps, plan.cut1, plan.cut2)
        else:
            found.append(Stretch(bps, bps, plan.cut1, plan.cut2))
    return found
