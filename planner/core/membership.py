"""The handling of nodes that join, change, drain and leave.

It retries or fails the tasks that depend on a node, and places the tasks that waited for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from bus.messages import HandleInput, NodeAnnounced, NodeJoined, NodeLeft, NodeLost, TaskState
from bus.values import Role
from planner.core.candidates.clouds import Clouds
from planner.core.change_recorder import ChangeRecorder
from planner.core.region.records import KnownNode, Task
from planner.core.region.state import RegionState
from planner.search.cost import PlatformRow
from planner.search.ledger.reservation import LOAD_UNITS, Amounts, Reservation, bookable

NO_LIMIT: Final = 1 << 62


class Membership:
    """Handles the events of nodes in one region."""

    def __init__(self, region: RegionState, clouds: Clouds, recorder: ChangeRecorder) -> None:
        self._region = region
        self._clouds = clouds
        self._recorder = recorder

    def announced(self, announced: NodeAnnounced, now: float) -> None:
        """Let a node join, or take over what it announces about itself now."""
        if announced.region != self._region.region:
            return
        node = self._region.nodes.get(announced.node)
        if node is not None and node.announced.incarnation == announced.incarnation:
            self._region.renew(announced.node, announced.incarnation, now)
            if announced == node.announced:
                return
            if announced.role is not node.announced.role:
                self.lose(node, "replaced", now)
            elif announced.role is Role.EDGE:
                held = list(self._region.ledger.edges[announced.node].reservations.values())
                limits = (announced.slots, announced.link1_capacity_bps, announced.link2_capacity_bps)
                self._shrink(held, limits, announced, now)
            elif announced.role is Role.DEVICE and announced.link1_capacity_bps:
                held = [r for r in self._region.ledger.reservations.values() if r.sender == announced.node]
                self._shrink(held, (NO_LIMIT, announced.link1_capacity_bps, NO_LIMIT), announced, now)
        elif node is not None:
            self.lose(node, "replaced", now)
        before = self._clouds_used() if announced.role is Role.CLOUD else {}
        self._recorder.do(NodeJoined(node=announced), now)
        self._region.renew(announced.node, announced.incarnation, now)
        if node is not None and node.announced.role is announced.role:
            self._retry_unserved(announced, now)
            if node.announced.incarnation == announced.incarnation:
                self._retry_changed(node, before, now)
        if announced.draining:
            return  # a draining node gets no new tasks
        if announced.role is Role.DEVICE:
            found = [task for task in self._region.waiting.values() if task.submitted.device == announced.node]
        else:
            found = [task for task in self._region.waiting.values() if task.submitted.device in self._region.nodes]
        for task in found:
            self._recorder.replan_later(task)

    def left(self, left: NodeLeft, now: float) -> None:
        """Remove a node that leaves."""
        node = self._region.nodes.get(left.node)
        if node is not None and node.announced.incarnation == left.incarnation:
            self.lose(node, "left", now)

    def lose(self, node: KnownNode, cause: str, now: float) -> None:
        """Retry or fail the tasks that depend on a node, then remove the node."""
        announced = node.announced
        name = announced.node
        if announced.role is Role.EDGE:
            touched = [self._region.tasks[task_id] for task_id in self._region.ledger.edges[name].reservations]
        elif announced.role is Role.DEVICE:
            touched = [
                task
                for task in self._region.tasks.values()
                if task.submitted.device == name and task.state != TaskState.WAITING
            ]
        else:
            others = [other for other in self._region.cloud_names if other != name]
            touched = [
                task
                for task in self._region.tasks.values()
                if task.placed is not None
                and task.placed.placement.uses_cloud
                and self._clouds.fastest_row_of(others, task.placed.model, task.placed.sha256) is None
            ]
        for task in sorted(touched, key=_seq):
            if announced.role is Role.DEVICE and isinstance(task.submitted.input, HandleInput):
                self._recorder.end(task, TaskState.FAILED, now, cause="input_lost", detail=f"{name}: {cause}")
            else:
                self._recorder.retry(task, "node_lost", now, f"{name}: {cause}")
        if announced.role is Role.DEVICE:
            for task in sorted(self._region.waiting.values(), key=_seq):
                if task.submitted.device != name:
                    continue
                if isinstance(task.submitted.input, HandleInput):
                    self._recorder.end(task, TaskState.FAILED, now, cause="input_lost", detail=f"{name}: {cause}")
        self._recorder.do(NodeLost(node=name, incarnation=announced.incarnation, cause=cause), now)

    def _shrink(self, held: Iterable[Reservation], limits: Amounts, announced: NodeAnnounced, now: float) -> None:
        """Retry the latest sessions and running tasks of a node until the others fit its lowered slots and bandwidths."""
        holders = sorted(held, key=lambda r: r.key)
        slots, link1_bps, link2_bps = limits
        sessions = [(r, (r.load.edge, r.link1_bps, r.link2_bps)) for r in holders if r.load is not None]
        most = bookable(LOAD_UNITS * slots), bookable(link1_bps), bookable(link2_bps)
        gone = _exceeding(sessions, most)
        running = [(r, (r.slots, r.link1_bps, r.link2_bps)) for r in holders if r.running and r not in gone]
        for r in gone + _exceeding(running, limits):
            self._recorder.retry(self._region.tasks[r.task_id], "capacity_lowered", now, announced.node)

    def _retry_unserved(self, announced: NodeAnnounced, now: float) -> None:
        """Retry the tasks that a node no longer serves after a new announcement.

        If the node drains, its scheduled tasks are retried too. Its running tasks stay, except sessions of an edge or cloud:
        they would never end.
        """
        name, role = announced.node, announced.role
        for task in sorted(self._region.tasks.values(), key=_seq):
            placed = task.placed
            if placed is None:
                continue
            placement, cause = placed.placement, ""
            if announced.role is Role.DEVICE and task.submitted.device == name:
                reach = announced.reachable_edges
                if self._clouds.row(name, placed.model, placed.sha256) is None:
                    cause = "model_gone"
                elif placement.edge is not None and reach is not None and placement.edge not in reach:
                    cause = "edge_unreachable"
            elif announced.role is Role.EDGE and placement.edge == name and placement.uses_slot:
                if self._clouds.row(name, placed.model, placed.sha256) is None:
                    cause = "model_gone"
            elif (
                announced.role is Role.CLOUD
                and placement.uses_cloud
                and self._clouds.fastest_row_of(self._region.cloud_names, placed.model, placed.sha256) is None
            ):
                cause = "model_gone"
            if (
                not cause
                and announced.draining
                and (task.state is TaskState.SCHEDULED or (placed.session is not None and role is not Role.DEVICE))
                and self._waits_for(task, announced)
            ):
                cause = "draining"
            if cause:
                self._recorder.retry(task, cause, now, name)

    def _clouds_used(self) -> dict[tuple[str, str], PlatformRow | None]:
        """The cloud's profile row of every model (name and hash) that a placed task runs in the cloud."""
        placed = [task.placed for task in self._region.tasks.values() if task.placed is not None]
        used = {(one.model, one.sha256) for one in placed if one.placement.uses_cloud}
        return {key: self._clouds.fastest_row(*key) for key in used}

    def _retry_changed(self, before: KnownNode, clouds: dict[tuple[str, str], PlatformRow | None], now: float) -> None:
        """Retry the scheduled tasks whose placement was based on values that a node has changed."""
        name, role = before.announced.node, before.announced.role
        after = self._region.nodes[name]
        for task in sorted(self._region.tasks.values(), key=_seq):
            placed = task.placed
            if placed is None or task.state is not TaskState.SCHEDULED:
                continue
            placement, model = placed.placement, (placed.model, placed.sha256)
            if role is Role.DEVICE:
                rests = task.submitted.device == name
                limit = after.announced.link1_capacity_bps
                changed = before.rows.get(placed.model) is not after.rows.get(placed.model)
                changed = changed or 0 < limit < placement.link1_bps
                changed = changed or (placement.uses_link1 and _latencies(before) != _latencies(after))
            elif role is Role.EDGE:
                rests = placement.edge == name and (placement.uses_slot or placement.uses_cloud)
                changed = placement.uses_slot and before.rows.get(placed.model) is not after.rows.get(placed.model)
                changed = changed or (placement.uses_cloud and _latencies(before) != _latencies(after))
            else:
                rests = placement.uses_cloud
                changed = clouds.get(model) is not self._clouds.fastest_row(*model)
            if rests and changed:
                self._recorder.retry(task, "node_changed", now, name)

    def _waits_for(self, task: Task, draining: NodeAnnounced) -> bool:
        """Whether a scheduled task needs the draining node; for a cloud node: whether no other cloud node can serve it."""
        assert task.placed is not None
        placed, placement = task.placed, task.placed.placement
        if draining.role is Role.DEVICE:
            return task.submitted.device == draining.node
        if draining.role is Role.EDGE:
            return placement.edge == draining.node
        return placement.uses_cloud and self._clouds.fastest_row(placed.model, placed.sha256) is None


def _latencies(node: KnownNode) -> tuple[float | None, float | None]:
    """The declared latencies of a node's links."""
    return node.announced.link1_latency_s, node.announced.link2_latency_s


def _seq(task: Task) -> int:
    return task.seq


def _exceeding(held: Sequence[tuple[Reservation, Amounts]], limits: Amounts) -> list[Reservation]:
    """The last reservations without which the others fit the limits."""
    sums = [sum(amounts[i] for _, amounts in held) for i in range(3)]
    gone = []
    for r, amounts in reversed(held):
        if all(total <= limit for total, limit in zip(sums, limits, strict=True)):
            break
        sums = [total - amount for total, amount in zip(sums, amounts, strict=True)]
        gone.append(r)
    return gone
