"""The candidates for a task: the edges that its device reaches, and the speed of its model on each tier.

Nodes announce their profiles, which are matched with the device's profile by model name and hash. What was learned of a node
scales its profile; what was learned of a device's links and paths becomes `Overheads` and limits of grants.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from bus.messages import NodeAnnounced, Placed, TaskSubmitted
from bus.values import BatchLoad, Objective, Placement, Role
from planner.core.candidates.batch_loads import BatchLoads
from planner.core.candidates.clouds import Clouds
from planner.core.candidates.learned_rows import LearnedRows
from planner.core.candidates.missing import missing_nodes
from planner.core.candidates.searches import MAX_SEARCH_BYTES, PreparedSearches
from planner.core.region.records import KnownNode
from planner.core.region.state import RegionState
from planner.learning.table import EstimateTable
from planner.search.batch_load import samples_each
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow
from planner.search.request import EdgeOption, Reached, Request

MAX_OPTIONS: Final = 50_000
"""Limit of cached edge options (an edge as seen by devices with equal profiles). When it is reached, all are dropped."""


class _Terms(NamedTuple):
    """What distinguishes devices with equal profiles, and their tasks, on the same edge."""

    capacity_bps: int  # of the device's own link 1; 0: no limit of its own
    latency_s: float  # declared of it; 0 where nothing is declared
    consent: float | None  # see `PlatformRow.consent`
    each: int  # samples of the task in a batch; 0 where no node computes in batches
    own: Placement | None = None  # of a task that is running, which does not count beside itself

    @classmethod
    def of(cls, announced: NodeAnnounced, consent: float | None, each: int, own: Placement | None = None) -> _Terms:
        return cls(announced.link1_capacity_bps, announced.link1_latency_s or 0.0, consent, each, own)


_OptionKey = tuple[PlatformRow, _Terms, BatchLoad | None, BatchLoad | None]
"""The row of a device, its terms, and the loads of edge and cloud."""


class Candidates:
    """Lists the candidates of Algorithm 1 for a task. Reads `region`; results are cached until a node changes."""

    def __init__(
        self,
        region: RegionState,
        objective: Objective = Objective.SEQUENTIAL,
        max_search_bytes: int = MAX_SEARCH_BYTES,
        *,
        learning: bool = False,
        mixes: bool = False,
    ) -> None:
        """`mixes`: whether the policy places tasks of several routes."""
        self.objective = objective
        self._region = region
        self._nodes = region.nodes
        self._ledger = region.ledger
        # Without learning, what an earlier planner has learned stays in the state and is not used.
        self._estimates = region.estimates if learning else EstimateTable()
        self.searches = PreparedSearches(max_search_bytes, self._forget_reached, mixes=mixes)
        self.learned = LearnedRows(region, self._estimates, self.searches)
        self.clouds = Clouds(region, self._estimates)
        self.loads = BatchLoads(region, self.clouds)
        self._options: dict[str, dict[_OptionKey, EdgeOption | None]] = {}  # by edge
        self._option_count = 0
        # Counts changed predictions; what a device reaches was computed at some count, and at which edges changed last.
        self._version = 0
        self._changed_at: dict[str, int] = {}
        self._all_changed_at = 0
        region.watch_nodes(self._node_changed)
        region.watch_loads(self._load_changed)
        region.under_way.watch(self._tasks_changed)
        self._estimates.watch(self._predictions_changed)

    def request(self, submitted: TaskSubmitted, avoid: Collection[str] = ()) -> Request | str | None:
        """The input of Algorithm 1 for a task. None: its device is absent or drains. A string: the cause of rejection.

        Nodes in `avoid` are left out: edges, the cloud, or the device as the only tier. The nodes of a session are as fast as
        they are without other sessions.
        """
        device = self._nodes.get(submitted.device)
        if device is None or device.draining or device.announced.role is not Role.DEVICE:
            return None
        row = device.rows.get(submitted.model)
        if row is None:
            return "unknown_model"
        account, deviations = self._ledger.devices.get(submitted.device), self._estimates.deviations
        others = self._ledger.held_by.get(submitted.device, 0)
        consent = row.consent(submitted.min_agreement)
        each = samples_each(submitted.samples, row.cut_bytes) if self.loads.nodes else 0
        own = self.loads.running(submitted.task_id) if self.loads.nodes else None
        if submitted.session is not None or own is not None:  # rare, so it is not cached
            terms, unloaded = _Terms.of(device.announced, consent, each, own), submitted.session is not None
            reached = self._reach(device, row, terms, unloaded=unloaded)
            if avoid:
                reached = self._without(reached, avoid, device, terms, unloaded=unloaded)
            return Request(submitted, reached, account, self.objective, deviations, others)
        key = row.model, consent, each
        held = device.reach.get(key)
        if held is None or (held[0] != self._version and self._outdated(device, held[0])):
            held = self._version, self._reach(device, row, _Terms.of(device.announced, consent, each))
        reached = held[1]
        device.reach[key] = self._version, reached
        if avoid:
            reached = self._without(reached, avoid, device, _Terms.of(device.announced, consent, each))
        return Request(submitted, reached, account, self.objective, deviations, others)

    def plan_for(self, objective: Objective) -> None:
        """Minimise this objective from now on."""
        if objective is not self.objective:
            self.objective = objective
            self._version += 1
            self._all_changed_at = self._version

    def missing(self, submitted: TaskSubmitted) -> tuple[str, ...]:
        """The nodes that a waiting task needs, in words; see `missing_nodes`."""
        return missing_nodes(self._region, self.clouds, submitted)

    def _reach(self, device: KnownNode, profiled: PlatformRow, terms: _Terms, *, unloaded: bool = False) -> Reached:
        """The edges and searches that a device can use for one model; cached until a node or a prediction changes.

        `unloaded`: with nodes as fast as they are without sessions.
        """
        announced = device.announced
        name = announced.node
        row = self.learned.row(name, profiled, unloaded=unloaded)
        options: list[EdgeOption] = []
        for edge in self._reachable(announced):
            if unloaded:
                option = self._option(edge, row, self._cloud_of(edge, row), terms, unloaded=True)
            else:
                option = self._shared_option(edge, row, terms)
            if option is not None:
                options.append(self.learned.for_device(option, name))
        overheads = self.learned.overheads(name, None, NO_OVERHEADS)
        whole = self.learned.row(name, profiled, alone=True, unloaded=unloaded)
        alone = self.searches.search(whole, None, None, None, self.objective)
        return Reached(row, alone, tuple(options), overheads=overheads)

    def _reachable(self, device: NodeAnnounced) -> Sequence[str]:
        names = device.reachable_edges
        return self._region.edge_names if names is None else sorted(set(names))

    def _shared_option(self, edge: str, row: PlatformRow, terms: _Terms) -> EdgeOption | None:
        """As `_option`, cached."""
        known = self._options.setdefault(edge, {})
        edge_load, cloud_load = self._batch_loads(edge, row, terms)
        key = row, terms, edge_load, cloud_load
        if key not in known:
            if self._option_count >= MAX_OPTIONS:
                self._forget_options()
                known = self._options.setdefault(edge, {})
            self._option_count += 1
            known[key] = self._option(edge, row, self._cloud_of(edge, row, cloud_load), terms, edge_load)
        return known[key]

    def _without(
        self,
        reached: Reached,
        avoid: Collection[str],
        device: KnownNode,
        terms: _Terms,
        *,
        unloaded: bool = False,
    ) -> Reached:
        """`reached` without the nodes in `avoid`."""
        row = reached.row
        left = [option for option in reached.edges if option.account.name not in avoid]
        if any(name in avoid for name in self._region.cloud_names):
            names = [option.account.name for option in left]
            loads = [None if unloaded else self._batch_loads(name, row, terms)[0] for name in names]
            local = (
                self._option(name, row, None, terms, load, unloaded=unloaded)
                for name, load in zip(names, loads, strict=True)
            )
            left = [self.learned.for_device(option, device.announced.node) for option in local if option is not None]
        alone = device.announced.node not in avoid
        return Reached(row, reached.device_search, left, alone=alone, overheads=reached.overheads)

    def _option(
        self,
        name: str,
        row: PlatformRow,
        cloud: PlatformRow | None,
        terms: _Terms,
        load: BatchLoad | None = None,
        *,
        unloaded: bool = False,
    ) -> EdgeOption | None:
        """An edge as seen by devices with equal profiles and terms, or None if these devices cannot use it."""
        node = self._nodes.get(name)
        if node is None or node.draining or node.announced.role is not Role.EDGE:
            return None
        edge = node.rows.get(row.model)
        if edge is not None and (edge.sha256 != row.sha256 or edge.layers != row.layers):
            edge = None
        if edge is None and cloud is None:
            return None
        if edge is not None:
            edge = self.learned.row(name, edge, load=load, unloaded=unloaded)
        account = self._ledger.edges[name]
        limit1 = account.link1_capacity_bps
        if terms.capacity_bps and terms.capacity_bps < limit1:
            limit1 = terms.capacity_bps
        link2_latency_s = node.announced.link2_latency_s or 0.0
        declared = terms.latency_s or link2_latency_s
        overheads = Overheads(terms.latency_s, link2_latency_s) if declared else NO_OVERHEADS
        search = self.searches.search(row, edge, cloud, terms.consent, self.objective)
        return EdgeOption(account, search, limit1, account.link2_capacity_bps, overheads)

    def _batch_loads(self, edge: str, row: PlatformRow, terms: _Terms) -> tuple[BatchLoad | None, BatchLoad | None]:
        """The loads of batches on an edge and in the cloud behind it."""
        if not self.loads.nodes or self.objective is not Objective.PIPELINED:
            return None, None
        asked = edge, row, terms.each, terms.own
        return self.loads.on_edge(*asked), self.loads.in_cloud(*asked)

    def _cloud_of(self, edge: str, device: PlatformRow, load: BatchLoad | None = None) -> PlatformRow | None:
        """The row of the cloud node that the prediction for an edge uses, with what was learned."""
        name = self.clouds.predicted(edge, device.model, device.sha256)
        row = None if name is None else self.clouds.row(name, device.model, device.sha256)
        return None if name is None or row is None else self.learned.row(name, row, load=load)

    def _outdated(self, device: KnownNode, version: int) -> bool:
        """Whether predictions for a device have changed since a version."""
        if self._all_changed_at > version:
            return True
        changed_at = self._changed_at
        return any(changed_at.get(edge, 0) > version for edge in self._reachable(device.announced))

    # --- changes of the region ---------------------------------------------------------------------------------------

    def _node_changed(self, changed: NodeAnnounced) -> None:
        """Clear what is cached about a node that joined, changed or left."""
        self._load_changed(changed.node)
        self.loads.node_changed(changed.node)
        self.learned.forget(changed.node)
        if changed.role is Role.DEVICE:
            return  # a device that joins gets a new `KnownNode` with an empty cache
        self._changed_at.pop(changed.node, None)
        self._forget_options()
        if changed.role is Role.CLOUD:
            self.clouds.forget()
        for node in self._nodes.values():
            reachable = node.announced.reachable_edges
            if changed.role is Role.CLOUD or reachable is None or changed.node in reachable:
                node.reach.clear()

    def _tasks_changed(self, placed: Placed) -> None:
        """Drop predictions of batches that change because a task begins or ends."""
        edge = placed.placement.edge
        if not self.loads.nodes or edge is None:
            return
        self._version += 1
        if placed.placement.uses_cloud and self.clouds.predicted(edge, placed.model, placed.sha256) in self.loads.nodes:
            self._all_changed_at = self._version
        else:
            self._changed_at[edge] = self._version

    def _load_changed(self, name: str) -> None:
        """Update the load of the sessions of an edge or device."""
        if self.learned.load_changed(name):
            self._predictions_changed(name)

    def _predictions_changed(self, name: str | None) -> None:
        """Drop what depends on the estimates of a node, or of all devices (None)."""
        self._version += 1
        if name is None:
            self._all_changed_at = self._version
            return
        self.learned.forget(name)
        node = self._nodes.get(name)
        if node is None:
            return
        if node.announced.role is Role.DEVICE:
            node.reach.clear()
        elif node.announced.role is Role.EDGE:
            self._option_count -= len(self._options.pop(name, ()))
            self._changed_at[name] = self._version
        else:
            self._forget_options()
            self._all_changed_at = self._version

    def _forget_options(self) -> None:
        self._options.clear()
        self._option_count = 0

    def _forget_reached(self) -> None:
        """Drop all caches that refer to prepared searches."""
        self._forget_options()
        for node in self._nodes.values():
            node.reach.clear()
