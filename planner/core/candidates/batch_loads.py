"""The loads of nodes that compute in batches: how the tasks under way slow down one more (`planner.search.batch_load`)."""

from __future__ import annotations

from bus.messages import Placed, TaskState
from bus.values import BatchLoad, ModelProfile, Placement
from planner.core.candidates.clouds import Clouds
from planner.core.region.state import RegionState
from planner.search.batch_load import batch_load, samples_each
from planner.search.cost import PlatformRow


class BatchLoads:
    """Counts the tasks beside one task on the nodes of a region. `each`: the samples of that task in a batch."""

    def __init__(self, region: RegionState, clouds: Clouds) -> None:
        self._region = region
        self._nodes = region.nodes
        self._edges = region.ledger.edges
        self._clouds = clouds
        self.nodes: set[str] = set()  # those that compute in batches

    def node_changed(self, name: str) -> None:
        """Update `nodes`: a node joined, changed or left."""
        node = self._nodes.get(name)
        if node is not None and node.batching:
            self.nodes.add(name)
        else:
            self.nodes.discard(name)

    def running(self, task_id: str) -> Placement | None:
        """The placement of a task if it runs."""
        task = self._region.tasks.get(task_id)
        if task is None or task.state is not TaskState.RUNNING or task.placed is None:
            return None
        return task.placed.placement

    def on_edge(self, edge: str, row: PlatformRow, each: int, own: Placement | None) -> BatchLoad | None:
        """The load of an edge; None if it does not compute this model in batches.

        `own`: the placement of the task itself if it runs. It does not count beside itself.
        """
        profile = self._profile(edge, row)
        if profile is None:
            return None
        others = self._region.under_way.on_edge(edge, row.model)
        if own is not None and own.edge == edge and own.uses_slot:
            others -= 1
        slots = max(1, self._edges[edge].slots)
        return batch_load(profile, min(others + 1, slots), each)

    def in_cloud(self, edge: str, row: PlatformRow, each: int, own: Placement | None) -> BatchLoad | None:
        """The same of the cloud node that the prediction for an edge uses."""
        cloud = self._clouds.predicted(edge, row.model, row.sha256)
        profile = self._profile(cloud, row)
        if profile is None:
            return None
        sender = own.edge if own is not None and own.uses_cloud else None
        others = sum(
            count - (edge == sender)
            for edge, count in self._region.under_way.in_cloud(row.model)
            if self._clouds.predicted(edge, row.model, row.sha256) == cloud
        )
        return batch_load(profile, others + 1, each)

    def averaged(self, placed: Placed) -> Placed:
        """The placement of a task that ends, with the mean of the loads of its batches at its placement and now."""
        placement = placed.placement
        edge = placement.edge
        if edge is None or (placement.edge_batch is None and placement.cloud_batch is None):
            return placed
        row = self._nodes[placed.device].rows[placed.model]
        each = samples_each(placed.samples, row.cut_bytes)
        loads = {
            "edge_batch": _mean(placement.edge_batch, self.on_edge(edge, row, each, placement)),
            "cloud_batch": _mean(placement.cloud_batch, self.in_cloud(edge, row, each, placement)),
        }
        return placed.model_copy(update={"placement": placement.model_copy(update=loads)})

    def _profile(self, node: str | None, row: PlatformRow) -> ModelProfile | None:
        return self._nodes[node].batching.get(row.model) if node is not None and node in self.nodes else None


def _mean(before: BatchLoad | None, now: BatchLoad | None) -> BatchLoad | None:
    if before is None or now is None:
        return before
    return before.model_copy(update={"apart": (before.apart + now.apart) / 2})
