"""The candidates for a task: the edges that its device reaches, and the speed of its model on each tier.

Nodes announce their profiles, which are matched with the device's profile by model name and hash. The cloud nodes form one
consumer group, so any of them may serve a task; the prediction uses the fastest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from bus.messages import NodeAnnounced, TaskSubmitted
from bus.values import Objective, Role
from planner.core.records import KnownNode
from planner.core.state import RegionState
from planner.search.algorithm1 import EdgeOption, Reached, Request
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow
from planner.search.cut_search import CutSearch, search_bytes

MAX_SEARCH_BYTES: Final = 256 << 20
"""Memory limit for prepared searches. When it is exceeded, all are dropped and rebuilt on demand."""

MAX_OPTIONS: Final = 50_000
"""Limit of cached edge options (an edge as seen by devices with equal profiles). When it is reached, all are dropped."""


class _OwnLink(NamedTuple):
    """What a device announces about its own link 1."""

    capacity_bps: int  # 0: no limit of its own
    latency_s: float  # declared; 0 where nothing is declared

    @classmethod
    def of(cls, announced: NodeAnnounced) -> _OwnLink:
        return cls(announced.link1_capacity_bps, announced.link1_latency_s or 0.0)


class Candidates:
    """Lists the candidates of Algorithm 1 for a task. Reads `region`; results are cached until a node changes."""

    def __init__(
        self, region: RegionState, objective: Objective = Objective.SEQUENTIAL, max_search_bytes: int = MAX_SEARCH_BYTES
    ) -> None:
        self.objective = objective
        self.max_search_bytes = max_search_bytes
        self.search_bytes = 0  # memory that the prepared searches hold
        self._region = region
        self._nodes = region.nodes
        self._ledger = region.ledger
        self._searches: dict[tuple[PlatformRow | None, ...], CutSearch] = {}
        self._options: dict[tuple[str, PlatformRow, _OwnLink], EdgeOption | None] = {}
        self._cloud_rows: dict[tuple[str, str], PlatformRow | None] = {}
        region.watch_nodes(self._forget)

    def request(self, submitted: TaskSubmitted, avoid: Collection[str] = ()) -> Request | str | None:
        """The input of Algorithm 1 for a task. None: its device is absent or drains. A string: the cause of rejection.

        Nodes in `avoid` are left out: edges, the cloud, or the device as the only tier.
        """
        device = self._nodes.get(submitted.device)
        if device is None or device.draining or device.announced.role is not Role.DEVICE:
            return None
        row = device.rows.get(submitted.model)
        if row is None:
            return "unknown_model"
        reached = device.reach.get(row.model)
        if reached is None:
            reached = device.reach[row.model] = self._reach(device, row)
        if avoid:
            reached = self._without(reached, avoid, device)
        return Request(submitted, reached, self._ledger.devices.get(submitted.device), self.objective)

    def missing(self, submitted: TaskSubmitted) -> tuple[str, ...]:
        """The nodes that a waiting task needs, in words. If there are several entries, any of them may be enough."""
        name, model = submitted.device, submitted.model
        device = self._nodes.get(name)
        if device is None:
            return (f"device {name} to join",)
        if device.draining:
            return (f"device {name}, which drains, to join again",)
        row = device.rows.get(model)
        if row is None:
            return ()
        found = []
        staying = [cloud for cloud in self._region.cloud_names if not self._nodes[cloud].draining]
        if not staying:
            found.append("a cloud to join")
        elif self.cloud_row(model, row.sha256) is None:
            found.append(f"a cloud that runs {model} ({', '.join(staying)} {'do' if staying[1:] else 'does'} not)")
        reachable = device.announced.reachable_edges
        names = self._region.edge_names if reachable is None else sorted(set(reachable))
        there = [edge for edge in names if edge in self._region.edge_names and not self._nodes[edge].draining]
        if not there:
            found.append("an edge to join" if reachable is None else f"one of the edges {', '.join(names)} to join")
        elif all(self.row(edge, model, row.sha256) is None for edge in there):
            found.append(f"an edge that runs {model} ({', '.join(there)} {'do' if there[1:] else 'does'} not)")
        return tuple(found)

    def _reach(self, device: KnownNode, row: PlatformRow) -> Reached:
        """The edges and searches that a device can use for one model; cached until a node joins or is lost."""
        announced = device.announced
        cloud = self.cloud_row(row.model, row.sha256)
        names = self._region.edge_names if announced.reachable_edges is None else sorted(set(announced.reachable_edges))
        known, own = self._options, _OwnLink.of(announced)
        options: list[EdgeOption] = []
        for name in names:
            key = name, row, own
            if key not in known:
                if len(known) >= MAX_OPTIONS:
                    known.clear()
                known[key] = self._option(name, row, cloud, own)
            option = known[key]
            if option is not None:
                options.append(option)
        return Reached(row, self._search(row, None, None), tuple(options))

    def _without(self, reached: Reached, avoid: Collection[str], device: KnownNode) -> Reached:
        """`reached` without the nodes in `avoid`."""
        row, own = reached.row, _OwnLink.of(device.announced)
        left = [option for option in reached.edges if option.account.name not in avoid]
        if any(name in avoid for name in self._region.cloud_names):
            local = (self._option(option.account.name, row, None, own) for option in left)
            left = [option for option in local if option is not None]
        return Reached(row, reached.device_search, left, alone=device.announced.node not in avoid)

    def _option(self, name: str, row: PlatformRow, cloud: PlatformRow | None, own: _OwnLink) -> EdgeOption | None:
        """An edge as seen by devices with equal profiles and links, or None if these devices cannot use it."""
        node = self._nodes.get(name)
        if node is None or node.draining or node.announced.role is not Role.EDGE:
            return None
        edge = node.rows.get(row.model)
        if edge is not None and (edge.sha256 != row.sha256 or edge.layers != row.layers):
            edge = None
        if edge is None and cloud is None:
            return None
        account = self._ledger.edges[name]
        limit1 = account.link1_capacity_bps
        if own.capacity_bps and own.capacity_bps < limit1:
            limit1 = own.capacity_bps
        link2_latency_s = node.announced.link2_latency_s or 0.0
        declared = own.latency_s or link2_latency_s
        overheads = Overheads(own.latency_s, link2_latency_s) if declared else NO_OVERHEADS
        return EdgeOption(account, self._search(row, edge, cloud), limit1, account.link2_capacity_bps, overheads)

    def _forget(self, changed: NodeAnnounced) -> None:
        """Clear what is cached about a node that joined, changed or left."""
        if changed.role is Role.DEVICE:
            return  # a device that joins gets a new `KnownNode` with an empty cache
        self._options.clear()
        if changed.role is Role.CLOUD:
            self._cloud_rows.clear()
        for node in self._nodes.values():
            reachable = node.announced.reachable_edges
            if changed.role is Role.CLOUD or reachable is None or changed.node in reachable:
                node.reach.clear()

    def row(self, node: str, model: str, sha256: str) -> PlatformRow | None:
        """The profile row of a model, given by name and hash, on a node."""
        row = self._nodes[node].rows.get(model)
        return row if row is not None and row.sha256 == sha256 else None

    def cloud_row(self, model: str, sha256: str) -> PlatformRow | None:
        """The profile row of the fastest cloud node that does not drain; of equally fast ones, the first by name."""
        key = model, sha256
        if key not in self._cloud_rows:
            staying = [name for name in self._region.cloud_names if not self._nodes[name].draining]
            self._cloud_rows[key] = self.fastest_cloud(staying, model, sha256)
        return self._cloud_rows[key]

    def fastest_cloud(self, names: Iterable[str], model: str, sha256: str) -> PlatformRow | None:
        """As `cloud_row`, among these cloud nodes; the result is not cached."""
        rows = [row for name in names if (row := self.row(name, model, sha256)) is not None]
        return min(rows, key=lambda row: row.compute_s[-1], default=None)

    def _search(self, device: PlatformRow, edge: PlatformRow | None, cloud: PlatformRow | None) -> CutSearch:
        if cloud is not None and cloud.layers != device.layers:
            cloud = None
        key = device, edge, cloud
        search = self._searches.get(key)
        if search is None:
            size_bytes = search_bytes(device.layers, self.objective)
            if self.search_bytes + size_bytes > self.max_search_bytes:
                self._forget_searches()
            self.search_bytes += size_bytes
            search = self._searches[key] = CutSearch(device, edge, cloud)
        return search

    def _forget_searches(self) -> None:
        """Drop all prepared searches and all caches that refer to them."""
        self._searches.clear()
        self._options.clear()
        for node in self._nodes.values():
            node.reach.clear()
        self.search_bytes = 0
