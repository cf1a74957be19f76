"""The candidates for a task: the edges that its device reaches, and the speed of its model on each tier.

Nodes announce their profiles, which are matched with the device's profile by model name and hash. What was learned of a node
scales its profile; what was learned of a device's links and paths becomes `Overheads` and limits of grants. The cloud nodes
form one consumer group, so any of them may serve a task; the prediction uses the one that served the edge's last task if this
is known, otherwise the one with the fastest profile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from bus.messages import NodeAnnounced, Placed, TaskCompleted, TaskState, TaskSubmitted
from bus.values import MAX_BATCH, BatchLoad, ModelProfile, Objective, Placement, Role
from planner.core.region.records import KnownNode
from planner.core.region.state import RegionState
from planner.learning.attempts import Attempt, TierShare, Work, predicted_parts, routes_taken
from planner.learning.table import EstimateTable
from planner.learning.values import FAMILIES, NODE_PRIOR
from planner.search.batch_load import batch_load, samples_each, share_of_batch
from planner.search.codec_search import CodecSearch, PathSearch, codec_search_bytes, may_encode
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow, RowTable
from planner.search.cut_search import CutSearch, search_bytes
from planner.search.request import EdgeOption, Reached, Request
from planner.search.route_search import route_search_bytes

MAX_SEARCH_BYTES: Final = 256 << 20
"""Memory limit for prepared searches. When it is exceeded, all are dropped and rebuilt on demand."""

MAX_OPTIONS: Final = 50_000
"""Limit of cached edge options (an edge as seen by devices with equal profiles). When it is reached, all are dropped."""

LOAD_STEPS: Final = 32
"""Steps of the load by which tasks beside sessions are predicted to take longer, so that few searches are prepared."""


_SearchKey = (
    tuple[PlatformRow, PlatformRow | None, PlatformRow | None]
    | tuple[PlatformRow, PlatformRow | None, PlatformRow | None, float | None]
)
"""The rows of device, edge and cloud; with codecs also the consent."""


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
        self.max_search_bytes = max_search_bytes
        self.search_bytes = 0  # memory that the prepared searches hold
        self._mixes = mixes
        self._region = region
        self._nodes = region.nodes
        self._ledger = region.ledger
        self._searches: dict[_SearchKey, PathSearch] = {}
        self._searches_of: dict[PlatformRow, list[_SearchKey]] = {}  # of learned rows only
        self._options: dict[str, dict[_OptionKey, EdgeOption | None]] = {}  # by edge
        self._option_count = 0
        self._clouds: dict[tuple[str, str], str | None] = {}
        # Without learning, what an earlier planner has learned stays in the state and is not used.
        self._estimates = region.estimates if learning else EstimateTable()
        self._rows = RowTable()
        self._learned: dict[
            str, dict[tuple[str, bool, int, BatchLoad | None], PlatformRow]
        ] = {}  # rows with estimates: node -> (model, alone, load of sessions, of batches)
        self._batching: set[str] = set()  # nodes that compute in batches
        self._load_steps: dict[str, int] = {}  # load of the sessions of edges and devices, in steps
        # Counts changed predictions; what a device reaches was computed at some count, and at which edges changed last.
        self._version = 0
        self._changed_at: dict[str, int] = {}
        self._all_changed_at = 0
        region.watch_nodes(self._forget)
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
        each = samples_each(submitted.samples, row.cut_bytes) if self._batching else 0
        own = self._running_placement(submitted.task_id) if self._batching else None
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

    def _reach(self, device: KnownNode, profiled: PlatformRow, terms: _Terms, *, unloaded: bool = False) -> Reached:
        """The edges and searches that a device can use for one model; cached until a node or a prediction changes.

        `unloaded`: with nodes as fast as they are without sessions.
        """
        announced = device.announced
        name = announced.node
        row = self._learned_row(name, profiled, unloaded=unloaded)
        options: list[EdgeOption] = []
        for edge in self._reachable(announced):
            if unloaded:
                option = self._option(edge, row, self._cloud_of(edge, row), terms, unloaded=True)
            else:
                option = self._shared_option(edge, row, terms)
            if option is not None:
                options.append(self._for_device(option, name))
        overheads = self._overheads(name, None, NO_OVERHEADS)
        alone = self._search(self._learned_row(name, profiled, alone=True, unloaded=unloaded), None, None)
        return Reached(row, alone, tuple(options), overheads=overheads)

    def _reachable(self, device: NodeAnnounced) -> Sequence[str]:
        names = device.reachable_edges
        return self._region.edge_names if names is None else sorted(set(names))

    def _shared_option(self, edge: str, row: PlatformRow, terms: _Terms) -> EdgeOption | None:
        """As `_option`, cached."""
        known = self._options.setdefault(edge, {})
        edge_load, cloud_load = self._edge_load(edge, row, terms), self._cloud_load(edge, row, terms)
        key = row, terms, edge_load, cloud_load
        if key not in known:
            if self._option_count >= MAX_OPTIONS:
                self._options.clear()
                self._option_count = 0
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
            loads = [None if unloaded else self._edge_load(name, row, terms) for name in names]
            local = (
                self._option(name, row, None, terms, load, unloaded=unloaded)
                for name, load in zip(names, loads, strict=True)
            )
            left = [self._for_device(option, device.announced.node) for option in local if option is not None]
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
            edge = self._learned_row(name, edge, load=load, unloaded=unloaded)
        account = self._ledger.edges[name]
        limit1 = account.link1_capacity_bps
        if terms.capacity_bps and terms.capacity_bps < limit1:
            limit1 = terms.capacity_bps
        link2_latency_s = node.announced.link2_latency_s or 0.0
        declared = terms.latency_s or link2_latency_s
        overheads = Overheads(terms.latency_s, link2_latency_s) if declared else NO_OVERHEADS
        return EdgeOption(
            account, self._search(row, edge, cloud, terms.consent), limit1, account.link2_capacity_bps, overheads
        )

    # --- what was learned --------------------------------------------------------------------------------------------

    def _for_device(self, option: EdgeOption, device: str) -> EdgeOption:
        """An edge as seen by one device: with the latencies, overheads and limits of their path."""
        if not self._estimates:
            return option
        edge = option.account.name
        limit1, limit2 = option.max_link1_bps, option.max_link2_bps
        link1, link2 = self._estimates.link(1, device, edge), self._estimates.link(2, "", edge)
        if link1 is not None and link1.bps is not None and link1.bps < limit1:
            limit1 = link1.bps
        if link2 is not None and link2.bps is not None and link2.bps < limit2:
            limit2 = link2.bps
        overheads = self._overheads(device, edge, option.overheads)
        return EdgeOption(option.account, option.search, limit1, limit2, overheads)

    def _overheads(self, device: str, edge: str | None, declared: Overheads) -> Overheads:
        """Latencies and overheads between a device and an edge, or of the device alone."""
        table = self._estimates
        if not table:
            return declared
        kinds = FAMILIES[:1] if edge is None else FAMILIES[1:]
        lines = [table.path(device, edge, kind) for kind in kinds]
        task_s, sample_s = (tuple(line[at] for line in lines) for at in (0, 1))
        link1 = None if edge is None else table.link(1, device, edge)
        link2 = None if edge is None else table.link(2, "", edge)
        overheads = Overheads(
            link1_latency_s=declared.link1_latency_s if link1 is None else link1.latency_s,
            link2_latency_s=declared.link2_latency_s if link2 is None else link2.latency_s,
            task_s=(*task_s, 0.0, 0.0, 0.0) if edge is None else (0.0, *task_s),  # type: ignore[arg-type]
            sample_s=(*sample_s, 0.0, 0.0, 0.0) if edge is None else (0.0, *sample_s),  # type: ignore[arg-type]
        )
        return NO_OVERHEADS if overheads == NO_OVERHEADS else overheads

    def _learned_row(
        self,
        node: str,
        profiled: PlatformRow,
        alone: bool = False,
        *,
        load: BatchLoad | None = None,
        unloaded: bool = False,
    ) -> PlatformRow:
        """A node's profile row, scaled by what was learned, by the tasks in its batches and by the load of its sessions.

        `alone`: of a device that runs the whole model. `load`: of its batches. `unloaded`: without the load of sessions.
        """
        steps = 0 if unloaded else self._load_steps.get(node, 0)
        if not self._estimates and not steps and load is None:
            return profiled
        known = self._learned.setdefault(node, {})
        row = known.get((profiled.model, alone, steps, load))
        if row is None:
            line = self._estimates.node(node, profiled.model, alone) if self._estimates else NODE_PRIOR.line
            row = profiled
            if steps or load is not None or line != NODE_PRIOR.line:
                profile = next(one for one in self._nodes[node].announced.models if one.model == profiled.model)
                slower = LOAD_STEPS / (LOAD_STEPS - steps)
                row = self._rows.row(profile, line.a * slower, line.b * slower, load)
                self._searches_of.setdefault(row, [])
            known[profiled.model, alone, steps, load] = row
        return row

    # --- batches -----------------------------------------------------------------------------------------------------

    def _edge_load(self, edge: str, row: PlatformRow, terms: _Terms) -> BatchLoad | None:
        """What the tasks under way do to an edge that computes in batches; None for another edge."""
        profile = self._batch_profile(edge, row)
        if profile is None:
            return None
        others = self._region.under_way.on_edge(edge, row.model)
        if terms.own is not None and terms.own.edge == edge and terms.own.uses_slot:
            others -= 1
        slots = max(1, self._ledger.edges[edge].slots)
        return batch_load(profile, min(others + 1, slots), terms.each)

    def _cloud_load(self, edge: str, row: PlatformRow, terms: _Terms) -> BatchLoad | None:
        """The same of the cloud node that the prediction for an edge uses."""
        cloud = self._cloud_name(edge, row.model, row.sha256) if self._batching else None
        profile = self._batch_profile(cloud, row)
        if profile is None:
            return None
        own = terms.own.edge if terms.own is not None and terms.own.uses_cloud else None
        others = sum(
            count - (sender == own)
            for sender, count in self._region.under_way.in_cloud(row.model)
            if self._cloud_name(sender, row.model, row.sha256) == cloud
        )
        return batch_load(profile, others + 1, terms.each)

    def _batch_profile(self, node: str | None, row: PlatformRow) -> ModelProfile | None:
        if node not in self._batching or self.objective is not Objective.PIPELINED:
            return None
        return self._nodes[node].batching.get(row.model)

    def _running_placement(self, task_id: str) -> Placement | None:
        """The placement of a task if it runs."""
        task = self._region.tasks.get(task_id)
        if task is None or task.state is not TaskState.RUNNING or task.placed is None:
            return None
        return task.placed.placement

    def _beside_others(self, placed: Placed) -> Placed:
        """The placement of a task that ends, with the mean of the loads of its batches at its placement and now."""
        placement = placed.placement
        if placement.edge is None or (placement.edge_batch is None and placement.cloud_batch is None):
            return placed
        device = self._nodes[placed.device]
        row = device.rows[placed.model]
        terms = _Terms.of(device.announced, None, samples_each(placed.samples, row.cut_bytes), placement)
        now = (self._edge_load(placement.edge, row, terms), self._cloud_load(placement.edge, row, terms))
        edge, cloud = map(_mean_load, (placement.edge_batch, placement.cloud_batch), now)
        loads = {"edge_batch": edge, "cloud_batch": cloud}
        return placed.model_copy(update={"placement": placement.model_copy(update=loads)})

    def _tasks_changed(self, placed: Placed) -> None:
        """Take over that a task begins or ends on nodes that compute in batches."""
        edge = placed.placement.edge
        if not self._batching or edge is None:
            return
        self._version += 1
        if placed.placement.uses_cloud and self._cloud_name(edge, placed.model, placed.sha256) in self._batching:
            self._all_changed_at = self._version
        else:
            self._changed_at[edge] = self._version

    def _load_changed(self, name: str) -> None:
        """Take over the load of the sessions of an edge or device."""
        steps = self._ledger.load_steps(name, LOAD_STEPS)
        if steps == self._load_steps.get(name, 0):
            return
        self._load_steps[name] = steps
        if not steps:
            del self._load_steps[name]
        self._predictions_changed(name)

    def _outdated(self, device: KnownNode, version: int) -> bool:
        """Whether predictions for a device have changed since a version."""
        if self._all_changed_at > version:
            return True
        changed_at = self._changed_at
        return any(changed_at.get(edge, 0) > version for edge in self._reachable(device.announced))

    def _predictions_changed(self, name: str | None) -> None:
        """Drop what depends on the estimates of a node, or of all devices (None)."""
        self._version += 1
        if name is None:
            self._all_changed_at = self._version
            return
        self._forget_rows(name)
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

    def _forget_rows(self, name: str) -> None:
        """Drop the learned rows of a node, and the searches that use them."""
        for row in self._learned.pop(name, {}).values():
            for key in self._searches_of.pop(row, ()):
                if self._searches.pop(key, None) is not None:
                    self.search_bytes -= self._held_bytes(key)

    def _forget_options(self) -> None:
        self._options.clear()
        self._option_count = 0

    def attempt(self, placed: Placed, completed: TaskCompleted) -> Attempt:
        """A completed attempt with what the region knows of the nodes that it used."""
        placement, edge = placed.placement, placed.placement.edge
        key, measured = (placed.model, placed.sha256), completed.measured
        cloud = None
        if placement.uses_cloud and edge is not None:
            cloud = completed.cloud or self._cloud_name(edge, *key)
        layers = len(self._nodes[placed.device].rows[placed.model].compute_s) - 1
        placed = self._beside_others(placed)
        taken = routes_taken(placed, completed)
        on_device, on_edge, on_cloud = zip(*(route.by_tier(layers) for route in taken), strict=True)
        tiers: Iterable[tuple[str | None, float, Sequence[TierShare], float | None]] = (
            (placed.device, measured.device_s, on_device, None),
            (edge, measured.edge_s, on_edge, completed.edge_batches),
            (cloud, measured.cloud_s, on_cloud, completed.cloud_batches),
        )
        work = []
        for node, busy_s, shares, batches in tiers:
            row = None if node not in self._nodes else self.row(node, *key)
            if node is None or row is None or row.layers < layers or busy_s <= 0:
                continue
            computed = [share for share in shares if share.first < share.last and share.samples]
            if computed:
                count = max(1, round(sum(share.samples for share in computed)))
                if batches and (profile := self._nodes[node].batching.get(placed.model)) is not None:
                    batch = min(float(MAX_BATCH), max(1.0, count / batches))
                    row = PlatformRow(share_of_batch(profile, batch))  # not kept: hardly another task has the same
                work.append(Work(node, sum(share.profile_s(row) for share in computed), busy_s, count))
        return Attempt(
            placed, completed, predicted_parts(placed, taken), work, self._known_overheads(placed.device, edge)
        )

    def _known_overheads(self, device: str, edge: str | None) -> Overheads:
        """Latencies and overheads of a path that a running task uses."""
        if edge is None or edge not in self._nodes:
            return self._overheads(device, None, NO_OVERHEADS)
        link1, link2 = self._nodes[device].announced.link1_latency_s, self._nodes[edge].announced.link2_latency_s
        return self._overheads(device, edge, Overheads(link1 or 0.0, link2 or 0.0))

    # --- caches and rows ---------------------------------------------------------------------------------------------

    def _forget(self, changed: NodeAnnounced) -> None:
        """Clear what is cached about a node that joined, changed or left."""
        self._load_changed(changed.node)
        node = self._nodes.get(changed.node)
        if node is not None and node.batching:
            self._batching.add(changed.node)
        else:
            self._batching.discard(changed.node)
        if changed.role is Role.DEVICE:
            self._forget_rows(changed.node)
            return  # a device that joins gets a new `KnownNode` with an empty cache
        self._forget_rows(changed.node)
        self._changed_at.pop(changed.node, None)
        self._forget_options()
        if changed.role is Role.CLOUD:
            self._clouds.clear()
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
        name = self._fastest_cloud(model, sha256)
        return None if name is None else self.row(name, model, sha256)

    def _fastest_cloud(self, model: str, sha256: str) -> str | None:
        key = model, sha256
        if key not in self._clouds:
            staying = [name for name in self._region.cloud_names if not self._nodes[name].draining]
            self._clouds[key] = self._fastest(staying, model, sha256)
        return self._clouds[key]

    def fastest_cloud(self, names: Iterable[str], model: str, sha256: str) -> PlatformRow | None:
        """As `cloud_row`, among these cloud nodes; the result is not cached."""
        name = self._fastest(names, model, sha256)
        return None if name is None else self.row(name, model, sha256)

    def _fastest(self, names: Iterable[str], model: str, sha256: str) -> str | None:
        rows = [(row.compute_s[-1], name) for name in names if (row := self.row(name, model, sha256)) is not None]
        return min(rows, default=(0.0, None))[1]

    def _cloud_name(self, edge: str, model: str, sha256: str) -> str | None:
        """The cloud node that the prediction for an edge uses."""
        last = self._estimates.served.get(edge)
        node = None if last is None else self._nodes.get(last)
        if last is not None and node is not None and not node.draining and self.row(last, model, sha256) is not None:
            return last
        return self._fastest_cloud(model, sha256)

    def _cloud_of(self, edge: str, device: PlatformRow, load: BatchLoad | None = None) -> PlatformRow | None:
        """The row of the cloud node that the prediction for an edge uses, with what was learned."""
        name = self._cloud_name(edge, device.model, device.sha256)
        row = None if name is None else self.row(name, device.model, device.sha256)
        return None if name is None or row is None else self._learned_row(name, row, load=load)

    def _search(
        self,
        device: PlatformRow,
        edge: PlatformRow | None,
        cloud: PlatformRow | None,
        consent: float | None = None,
    ) -> PathSearch:
        if cloud is not None and cloud.layers != device.layers:
            cloud = None
        rows = device, edge, cloud
        key = rows if not may_encode(rows, consent) else (*rows, consent)
        search = self._searches.get(key)
        if search is None:
            size_bytes = self._held_bytes(key)
            if self.search_bytes + size_bytes > self.max_search_bytes:
                self._forget_searches()
            self.search_bytes += size_bytes
            search = self._searches[key] = CutSearch(*rows) if len(key) == 3 else CodecSearch(rows, consent)
            for row in rows:
                if row is not None and row in self._searches_of:
                    self._searches_of[row].append(key)
        return search

    def _held_bytes(self, key: _SearchKey) -> int:
        """An upper bound of the memory that the search of a key holds."""
        device = key[0]
        crossings = device.layers
        if len(key) == 3:
            held = search_bytes(device.layers, self.objective)
        else:
            held = codec_search_bytes(device.layers, len(device.codings))
            crossings += len(device.codings)
        return held + (route_search_bytes(crossings) if self._mixes else 0)

    def _forget_searches(self) -> None:
        """Drop all prepared searches and all caches that refer to them."""
        self._searches.clear()
        for keys in self._searches_of.values():
            keys.clear()
        self._forget_options()
        for node in self._nodes.values():
            node.reach.clear()
        self.search_bytes = 0


def _mean_load(before: BatchLoad | None, now: BatchLoad | None) -> BatchLoad | None:
    if before is None or now is None:
        return before
    return before.model_copy(update={"apart": (before.apart + now.apart) / 2})
