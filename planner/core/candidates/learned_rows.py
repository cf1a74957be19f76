"""Profiles and links as the region has learned them: scaled profile rows, overheads, and limits of grants."""

from __future__ import annotations

from typing import Final

from bus.values import BatchLoad
from planner.core.candidates.searches import PreparedSearches
from planner.core.region.state import RegionState
from planner.learning.table import EstimateTable
from planner.learning.values import FAMILIES, NODE_PRIOR
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow, RowTable
from planner.search.request import EdgeOption

LOAD_STEPS: Final = 32
"""Steps of the load by which tasks beside sessions are predicted to take longer, so that few searches are prepared."""

_Variant = tuple[str, bool, int, BatchLoad | None]
"""Model, alone, load of sessions in steps, load of batches."""


class LearnedRows:
    """What the estimates say of the nodes and paths of a region. Rows are cached until `forget`."""

    def __init__(self, region: RegionState, estimates: EstimateTable, searches: PreparedSearches) -> None:
        self._nodes = region.nodes
        self._ledger = region.ledger
        self._estimates = estimates
        self._searches = searches
        self._table = RowTable()
        self._rows: dict[str, dict[_Variant, PlatformRow]] = {}  # by node
        self._load_steps: dict[str, int] = {}  # load of the sessions of edges and devices

    def row(
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
        known = self._rows.setdefault(node, {})
        row = known.get((profiled.model, alone, steps, load))
        if row is None:
            line = self._estimates.node(node, profiled.model, alone) if self._estimates else NODE_PRIOR.line
            row = profiled
            if steps or load is not None or line != NODE_PRIOR.line:
                profile = next(one for one in self._nodes[node].announced.models if one.model == profiled.model)
                slower = LOAD_STEPS / (LOAD_STEPS - steps)
                row = self._table.row(profile, line.a * slower, line.b * slower, load)
                self._searches.track(row)
            known[profiled.model, alone, steps, load] = row
        return row

    def forget(self, node: str) -> None:
        """Drop the rows of a node, and the searches that use them."""
        for row in self._rows.pop(node, {}).values():
            self._searches.forget(row)

    def load_changed(self, name: str) -> bool:
        """Update the load of the sessions of an edge or device; returns whether this changes predictions."""
        steps = self._ledger.load_steps(name, LOAD_STEPS)
        if steps == self._load_steps.get(name, 0):
            return False
        self._load_steps[name] = steps
        if not steps:
            del self._load_steps[name]
        return True

    def for_device(self, option: EdgeOption, device: str) -> EdgeOption:
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
        overheads = self.overheads(device, edge, option.overheads)
        return EdgeOption(option.account, option.search, limit1, limit2, overheads)

    def overheads(self, device: str, edge: str | None, declared: Overheads) -> Overheads:
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

    def path_overheads(self, device: str, edge: str | None) -> Overheads:
        """Latencies and overheads of the path that a running task uses."""
        if edge is None or edge not in self._nodes:
            return self.overheads(device, None, NO_OVERHEADS)
        link1, link2 = self._nodes[device].announced.link1_latency_s, self._nodes[edge].announced.link2_latency_s
        return self.overheads(device, edge, Overheads(link1 or 0.0, link2 or 0.0))
