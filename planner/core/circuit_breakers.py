"""The circuit breakers of a region: they count failed attempts and name the nodes to avoid."""

from __future__ import annotations

from bus.messages import CircuitChanged, Placed
from bus.unchecked_constructors import maker
from planner.core.change_recorder import ChangeRecorder
from planner.core.region.circuits import Circuit, avoided
from planner.core.region.state import RegionState

_circuit = maker(CircuitChanged)  # built without validation, from values computed here


class CircuitBreakers:
    """Opens and closes the circuits of a region's nodes."""

    def __init__(self, region: RegionState, recorder: ChangeRecorder) -> None:
        self._region = region
        self._recorder = recorder

    def suspects(self, now: float) -> frozenset[str]:
        """Nodes with open circuits. All clouds form one consumer group, so they are avoided all together or not at all."""
        region = self._region
        found = avoided(region.circuits, now)
        return found if found.issuperset(region.cloud_names) else found.difference(region.cloud_names)

    def count_failure(self, node: str, now: float) -> None:
        """Count a failed attempt at a node. If its circuit opens, retry the tasks that are scheduled there."""
        region, recorder = self._region, self._recorder
        old = region.circuits.get(node, Circuit(0))
        new = old.after_failure(now)
        recorder.do(_circuit(node=node, failures=new.failures, until_s=new.until_s), now)
        if node in region.ledger.edges and new.until_s is not None and not old.avoided(now):
            for _, _, r in list(region.ledger.edges[node].queue):
                recorder.retry(region.tasks[r.task_id], "circuit_open", now, node)

    def count_success(self, placed: Placed, now: float) -> None:
        """Close the circuits of all nodes that a successful attempt used."""
        region = self._region
        for node in region.places(placed):
            if node in region.circuits:
                self._recorder.do(_circuit(node=node, failures=0), now)
