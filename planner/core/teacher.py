"""Turns completed attempts and measured links into recorded changes of what the region has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bus.messages import Learned, LearnedLink, LinkMeasurement, NodeHeartbeat, Placed, TaskCompleted, TaskState
from bus.values import MAX_BATCH, Objective, Role
from planner.core.candidates.candidates import Candidates
from planner.core.change_recorder import ChangeRecorder
from planner.core.region.records import KnownNode, Task
from planner.core.region.state import RegionState
from planner.learning.attempts import Attempt, TierShare, Work, predicted_parts, routes_taken
from planner.learning.learner import Carried, from_attempt, from_link, from_speed
from planner.search.batch_load import share_of_batch
from planner.search.cost import PlatformRow


class _Tier(NamedTuple):
    """What a completed task reports of one tier."""

    node: str | None  # None: it used no such node
    busy_s: float
    shares: Sequence[TierShare]
    batches: float | None


class Teacher:
    """Records what the nodes of one region teach."""

    def __init__(self, region: RegionState, candidates: Candidates, recorder: ChangeRecorder) -> None:
        self._region = region
        self._candidates = candidates
        self._recorder = recorder

    def completed(self, task: Task, completed: TaskCompleted, now: float) -> None:
        """Learn from a task before it ends. A session, an older attempt or a rerouted one teaches nothing."""
        placed = task.placed
        if placed is None or task.state is not TaskState.RUNNING or completed.attempt != task.attempt:
            return
        if placed.session is not None or placed.rest is not None:
            return
        if placed.device in self._region.nodes:
            attempt = self._attempt(placed, completed)
            self._recorder.do(from_attempt(self._region.estimates, attempt, now), now)

    def _attempt(self, placed: Placed, completed: TaskCompleted) -> Attempt:
        """A completed attempt with what the region knows of the nodes that it used."""
        placement, edge, candidates = placed.placement, placed.placement.edge, self._candidates
        measured = completed.measured
        cloud = None
        if placement.uses_cloud and edge is not None:
            cloud = completed.cloud or candidates.clouds.predicted(edge, placed.model, placed.sha256)
        layers = self._region.nodes[placed.device].rows[placed.model].layers
        if candidates.objective is Objective.PIPELINED:
            placed = candidates.loads.averaged(placed)
        taken = routes_taken(placed, completed)
        on_device, on_edge, on_cloud = zip(*(route.by_tier(layers) for route in taken), strict=True)
        tiers = (
            _Tier(placed.device, measured.device_s, on_device, None),
            _Tier(edge, measured.edge_s, on_edge, completed.edge_batches),
            _Tier(cloud, measured.cloud_s, on_cloud, completed.cloud_batches),
        )
        work = [found for tier in tiers if (found := self._work(placed, layers, tier)) is not None]
        overheads = candidates.learned.path_overheads(placed.device, edge)
        return Attempt(placed, completed, predicted_parts(placed, taken), work, overheads)

    def _work(self, placed: Placed, layers: int, tier: _Tier) -> Work | None:
        """What a tier computed of the task, and the time for it by the profile; None if the tier computed nothing."""
        node, region = tier.node, self._region
        if node is None or node not in region.nodes or tier.busy_s <= 0:
            return None
        row = self._candidates.clouds.row(node, placed.model, placed.sha256)
        computed = [share for share in tier.shares if share.first < share.last and share.samples]
        if row is None or row.layers < layers or not computed:
            return None
        count = max(1, round(sum(share.samples for share in computed)))
        if tier.batches and (profile := region.nodes[node].batching.get(placed.model)) is not None:
            batch = min(float(MAX_BATCH), max(1.0, count / tier.batches))
            row = PlatformRow(share_of_batch(profile, batch))  # not kept: hardly another task has the same
        return Work(node, sum(share.profile_s(row) for share in computed), tier.busy_s, count)

    def heartbeat(self, heartbeat: NodeHeartbeat, now: float) -> None:
        """Learn the links and the speed of a node that is present in this incarnation."""
        node = self._region.nodes.get(heartbeat.node)
        if node is None or node.announced.incarnation != heartbeat.incarnation:
            return
        links = [link for measured in heartbeat.links if (link := self._link(node, measured, now)) is not None]
        known = [measured for measured in heartbeat.speeds if measured.model in node.rows]
        table, name = self._region.estimates, heartbeat.node
        speeds = [speed for measured in known if (speed := from_speed(table, name, measured)) is not None]
        if links or speeds:
            self._recorder.do(Learned(links=tuple(links), speeds=tuple(speeds)), now)

    def _link(self, node: KnownNode, measured: LinkMeasurement, now: float) -> LearnedLink | None:
        """What one measurement teaches. A device knows link 1 of edges that it reaches, an edge its own link 2."""
        name, role, edge = node.announced.node, node.announced.role, measured.edge
        account = self._region.ledger.edges.get(edge)
        expected = (1, Role.DEVICE) if measured.link == 1 else (2, Role.EDGE)
        if account is None or (measured.link, role) != expected or (measured.link == 2 and edge != name):
            return None
        reach = node.announced.reachable_edges
        if measured.link == 1 and reach is not None and edge not in reach:
            return None
        device = name if measured.link == 1 else None
        running = [r for r in account.reservations.values() if r.running and device in (None, r.sender)]
        granted = sum(r.link1_bps if device is not None else r.link2_bps for r in running)
        carried = None if measured.bps is None or not granted else Carried(measured.bps, granted)
        capacity = account.link1_capacity_bps if device is not None else account.link2_capacity_bps
        known = self._region.estimates.link(measured.link, device or "", edge)
        return from_link(known, device, measured, carried, capacity, now)
