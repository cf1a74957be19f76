"""The tasks whose ends another task's start waits for, in words."""

from __future__ import annotations

from bus.messages import Placed
from bus.region_tasks import KnownTask, RegionTasks

_SAME_S = 1e-6  # largest difference at which a start counts as the end of another task
_NAMED = 3  # maximum number of awaited tasks that are named


def awaited(region: RegionTasks, task: KnownTask) -> str:
    """`t3 (slot of e1), t4 (d2)`: the tasks at whose ends a task starts, and what it shares with them; "" for none."""
    if task.placed is None or task.start_s is None:
        return ""
    found = []
    for other in region.placed.values():
        if other is task or other.placed is None or other.end_s is None:
            continue
        # Times are compared first: that is quick, and excludes nearly all of thousands of tasks.
        if abs(other.end_s - task.start_s) <= _SAME_S and (shared := _shared(task.placed, other.placed)):
            found.append(f"{other.task_id} ({shared})")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _shared(one: Placed, other: Placed) -> str:
    """The resources that two placements both use, in words."""
    computing = one.session is None and other.session is None  # a session holds bandwidth, but no slot and no device
    if computing and one.device == other.device and one.placement.uses_device and other.placement.uses_device:
        return one.device
    a, b = one.placement, other.placement
    if a.edge is None or a.edge != b.edge:
        return ""
    both = [
        name
        for name, shared in (
            ("slot", computing and a.uses_slot and b.uses_slot),
            ("link 1", a.link1_bps and b.link1_bps),
            ("link 2", a.link2_bps and b.link2_bps),
        )
        if shared
    ]
    return f"{', '.join(both)} of {a.edge}" if both else ""
