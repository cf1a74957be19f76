"""What a completed task or a heartbeat teaches: the recorded change `Learned`.

Only times measured on one clock are used: busy times of one node, the delay on the device's clock, and half round trips. The
functions read the estimates; `EstimateTable.apply` changes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median_low
from typing import Final, NamedTuple

from bus.messages import (
    Learned,
    LearnedLink,
    LearnedNode,
    LearnedPath,
    LearnedSpeed,
    LinkMeasurement,
    Placed,
    SpeedMeasurement,
)
from bus.unchecked_constructors import maker
from bus.values import DELAY_PARTS, Kind, Objective, Parts
from planner.learning.attempts import Attempt, Work
from planner.learning.estimates import WINDOW, Line, Point, Prior, deviation, fit, kept, rounded, shrunk, steady
from planner.learning.table import EstimateTable
from planner.learning.values import (
    FAMILIES,
    NO_PATH,
    NODE_PRIOR,
    LinkEstimate,
    NodeEstimate,
    PathEstimate,
    SlowTransfers,
    family_kind,
)
from planner.search.cost import parts_s

_FAMILY_NUMBER: Final = {kind: number for number, kind in enumerate(FAMILIES)}

_learned, _node, _path, _link = maker(Learned), maker(LearnedNode), maker(LearnedPath), maker(LearnedLink)

_STEADY: Final = 0.05  # a latency is recorded if it has changed by this share...
_STEADY_S: Final = 1e-4  # ...and by this time
_SLOWER: Final = (
    1.25  # what a node measures of itself is recorded if it takes this much longer than the last recorded time...
)
_FASTER: Final = (
    0.67  # ...or this much shorter: the gap keeps a noisy machine from making its estimates stale all the time
)
_LONG_S: Final = 0.05  # a link's part that is predicted to take this long says what the link carries
_CARRIES_LESS: Final = 0.9  # share of the grants below which a link is said to carry less
_SLOW: Final = 3  # slow transfers in a row that show a limit
_RAISED: Final = 1.5  # factor by which a limit is raised to see whether the link carries more again...
_RAISED_AFTER_S: Final = 10.0  # ...after this time, if the link carried all that it was granted
_UNKNOWN_AFTER_S: Final = 60.0  # or this, if nothing is known
_ROW_S: Final = 1e-4  # a time for each sample, so that a profile of zeros can be compared, too

_START_SAMPLES: Final = 10  # a task's fixed costs, in samples, to compare the delays of tasks of different length


class Carried(NamedTuple):
    """What a link carried while there was more to send."""

    bps: int
    granted_bps: int  # the sum of the grants meanwhile


def from_attempt(table: EstimateTable, attempt: Attempt, now: float) -> Learned:
    """What a completed attempt teaches."""
    placed, completed = attempt.placed, attempt.completed
    nodes = [_observe_node(table, placed, work) for work in attempt.work]
    parts, links = _carried_parts(table, attempt, now)
    stale = table.stale(now)
    return _learned(
        task_id=placed.task_id,
        attempt=completed.attempt,
        nodes=tuple(nodes),
        paths=(_observe_path(table, attempt, parts),),
        links=tuple(links),
        stale=() if stale is None else (stale,),
        cloud=completed.cloud if placed.placement.uses_cloud else None,
    )


def from_link(
    known: LinkEstimate | None,
    device: str | None,
    measured: LinkMeasurement,
    carried: Carried | None,
    capacity_bps: int,
    now: float,
) -> LearnedLink | None:
    """What a measured link teaches; None: nothing new. `device`: of link 1; `capacity_bps`: 0 means no limit."""
    latency_s = float(f"{measured.latency_s:.3g}")
    bps = None
    if known is not None:
        margin = max(_STEADY * known.latency_s, _STEADY_S, measured.deviation_s / 2)
        if abs(latency_s - known.latency_s) <= margin:
            latency_s = known.latency_s
        bps = _limit(known, carried, capacity_bps, now)
    elif carried is not None and carried.bps < _CARRIES_LESS * carried.granted_bps:
        bps = _two_digits(carried.bps)
    if known is not None and (known.latency_s, known.bps) == (latency_s, bps):
        return None
    return _link(link=measured.link, device=device, edge=measured.edge, latency_s=latency_s, bps=bps)


def from_speed(table: EstimateTable, node: str, measured: SpeedMeasurement) -> LearnedSpeed | None:
    """What a node teaches that measured itself without work; None: nothing new."""
    change = measured.factor / table.speed(node, measured.model)
    if _FASTER < change < _SLOWER:
        return None
    return LearnedSpeed(node=node, model=measured.model, factor=float(f"{measured.factor:.3g}"))


def _limit(known: LinkEstimate, carried: Carried | None, capacity_bps: int, now: float) -> int | None:
    """The limit of grants on a link from now on."""
    limit = known.bps
    if carried is not None and carried.bps < _CARRIES_LESS * carried.granted_bps:
        return _two_digits(carried.bps)
    if limit is None:
        return None
    if now - known.at_s < (_UNKNOWN_AFTER_S if carried is None else _RAISED_AFTER_S):
        return limit
    raised = _two_digits(limit * _RAISED)
    return None if 0 < capacity_bps <= raised else raised


def _after_transfer(
    known: LinkEstimate, slow: SlowTransfers, carried: Carried, now: float
) -> tuple[int | None, SlowTransfers]:
    """The limit of grants on a link after a task's transfer, and the slow transfers that it ends with.

    Not every slow transfer shows a limit: all of a task may have been slow. A limit shows in several transfers in a row that
    all were granted more, and it is at least what each of them carried.
    """
    if carried.bps >= _CARRIES_LESS * carried.granted_bps:
        return _limit(known, carried, 0, now), ()
    slow = (*slow, (carried.granted_bps, carried.bps))[-_SLOW:]
    most_bps = max(bps for _, bps in slow)
    if len(slow) < _SLOW or min(granted_bps for granted_bps, _ in slow) <= most_bps:
        return known.bps, slow
    return _two_digits(most_bps), ()


def _two_digits(bps: float) -> int:
    return max(1, int(float(f"{bps:.2g}")))


def node_points(observed: Iterable[tuple[float, int, float]]) -> list[Point]:
    """The observations of a node: profile time, samples, busy time. Noise is relative to the usual busy time."""
    rows = list(observed)
    rate = median_low(busy_s / (profile_s + _ROW_S * samples) for profile_s, samples, busy_s in rows)
    return [Point(p, n, y, rate * (p + _ROW_S * n)) for p, n, y in rows]


def path_points(observed: Iterable[tuple[int, float, float, float]]) -> list[Point]:
    """The observations of a path: samples, delay, gap, error. Noise is relative to the usual delay."""
    rows = list(observed)
    rate = median_low(delay_s / (_START_SAMPLES + n) for n, delay_s, _, _ in rows)
    return [Point(1.0, n, gap_s, rate * (_START_SAMPLES + n)) for n, _, gap_s, _ in rows]


def _observe_node(table: EstimateTable, placed: Placed, work: Work) -> LearnedNode:
    alone = placed.placement.kind is Kind.DEVICE
    old = table.nodes.get((work.node, placed.model, alone))
    prior = NODE_PRIOR._replace(line=table.node_prior(work.node, alone) if old is None else NODE_PRIOR.line)
    seen = (_digits(work.profile_s), work.samples, _digits(work.busy_s))
    observed = [*(() if old is None else old.observed), seen][-WINDOW:]
    line, count = _estimate(node_points(observed), prior, old, table.scatter())
    return _node(
        node=work.node,
        model=placed.model,
        alone=alone,
        samples=work.samples,
        profile_s=seen[0],
        busy_s=seen[2],
        factor=line.a,
        overhead_s=line.b,
        kept=count,
    )


def _observe_path(table: EstimateTable, attempt: Attempt, parts: Parts) -> LearnedPath:
    placed, completed = attempt.placed, attempt.completed
    placement, samples, delay_s = placed.placement, placed.samples, completed.delay_s
    kind = family_kind(placement.kind)
    latency_s = attempt.overheads.latency_s(_FAMILY_NUMBER[kind])
    sequential = placed.objective is Objective.SEQUENTIAL
    explained_s = parts_s(parts, placed) + latency_s * (samples if sequential else 1)
    error = delay_s / placed.delay_s - 1.0 if placed.delay_s > 0 else 0.0
    seen = (samples, _digits(delay_s), _digits(delay_s - explained_s), _digits(min(max(error, -1.0), 1e6)))
    old = table.paths.get((placed.device, placement.edge or "", kind))
    observed = [*(() if old is None else old.observed), seen][-WINDOW:]
    # Together with the latency an overhead is not negative: no cut is predicted to be faster than its stations.
    least = Line(0.0, -latency_s) if sequential else Line(-latency_s, 0.0)
    prior = Prior(table.path_prior(kind), NO_PATH.a_deviation, NO_PATH.b_deviation, least, NO_PATH.most)
    line, count = _estimate(path_points(observed), prior, old)
    line = Line(max(line.a, least.a), max(line.b, least.b))
    return _path(
        device=placed.device,
        edge=placement.edge,
        kind=kind,
        samples=samples,
        delay_s=seen[1],
        gap_s=seen[2],
        error=seen[3],
        task_s=line.a,
        sample_s=line.b,
        deviation=deviation([row[3] for row in observed[-count:]]),
        kept=count,
    )


def _estimate(
    points: list[Point], prior: Prior, old: NodeEstimate | PathEstimate | None, scatter: float = 0.0
) -> tuple[Line, int]:
    """The values to use after the last observation, and how many observations they use."""
    if old is None:
        count = kept(points, prior, prior.line, scatter=scatter)
    else:
        count = kept(points, prior, old.line, retried=old.age.tried, scatter=scatter)
    points = points[-count:]
    found = shrunk(fit(points, prior), prior, points, scatter)
    if old is None:
        return Line(rounded(found.a), rounded(found.b)), count
    return steady(found, old.line, points), count


def _carried_parts(table: EstimateTable, attempt: Attempt, now: float) -> tuple[Parts, list[LearnedLink]]:
    """The parts that explain a delay, and what they say of the links.

    Links count as granted, so what sending takes beside is an overhead of the path; except where a long transfer shows that a
    link carries less than it was granted. Where all parts work at once, only the slowest one shows that: a link that waits
    for a busy tier is not slow itself, and smaller grants would make it so.
    """
    placed, measured, predicted = attempt.placed, attempt.completed.measured, attempt.predicted
    placement = placed.placement
    busy = {name: getattr(measured, name) or getattr(predicted, name) for name in ("device_s", "edge_s", "cloud_s")}
    parts = {"link1_s": predicted.link1_s, "link2_s": predicted.link2_s, "result_s": predicted.result_s}
    links: list[LearnedLink] = []
    sequential = placed.objective is Objective.SEQUENTIAL
    slowest_s = max(getattr(measured, f"{name}_s") or 0.0 for name in DELAY_PARTS)
    for link, granted, device in ((1, placement.link1_bps, placed.device), (2, placement.link2_bps, "")):
        name = f"link{link}_s"
        expected_s, took_s = parts[name], getattr(measured, name)
        if placement.edge is None or expected_s < _LONG_S or not took_s:
            continue
        if took_s < slowest_s and not sequential:
            continue
        if took_s * _CARRIES_LESS > expected_s:
            parts[name] = took_s
        key = link, device, placement.edge
        known, before = table.link(*key), table.slow.get(key, ())
        if known is None:
            continue
        carried = Carried(int(granted * min(1.0, expected_s / took_s)), granted)
        bps, slow = _after_transfer(known, before, carried, now)
        if (bps, slow) != (known.bps, before):
            of = {"link": link, "device": device or None, "edge": placement.edge}
            links.append(_link(**of, latency_s=known.latency_s, bps=bps, slow=slow))
    return Parts(**busy, **parts), links


def _digits(value: float) -> float:
    """Six digits, so that records stay short."""
    return float(f"{value:.6g}")
