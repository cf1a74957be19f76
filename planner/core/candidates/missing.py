"""The nodes that a waiting task needs, in words."""

from __future__ import annotations

from bus.messages import TaskSubmitted
from planner.core.candidates.clouds import Clouds
from planner.core.region.state import RegionState


def missing_nodes(region: RegionState, clouds: Clouds, submitted: TaskSubmitted) -> tuple[str, ...]:
    """The nodes that a waiting task needs. If there are several entries, any of them may be enough."""
    name, model = submitted.device, submitted.model
    device = region.nodes.get(name)
    if device is None:
        return (f"device {name} to join",)
    if device.draining:
        return (f"device {name}, which drains, to join again",)
    row = device.rows.get(model)
    if row is None:
        return ()
    found = []
    staying = [cloud for cloud in region.cloud_names if not region.nodes[cloud].draining]
    if not staying:
        found.append("a cloud to join")
    elif clouds.fastest_row(model, row.sha256) is None:
        found.append(f"a cloud that runs {model} ({', '.join(staying)} {'do' if staying[1:] else 'does'} not)")
    reachable = device.announced.reachable_edges
    names = region.edge_names if reachable is None else sorted(set(reachable))
    there = [edge for edge in names if edge in region.edge_names and not region.nodes[edge].draining]
    if not there:
        found.append("an edge to join" if reachable is None else f"one of the edges {', '.join(names)} to join")
    elif all(clouds.row(edge, model, row.sha256) is None for edge in there):
        found.append(f"an edge that runs {model} ({', '.join(there)} {'do' if there[1:] else 'does'} not)")
    return tuple(found)
