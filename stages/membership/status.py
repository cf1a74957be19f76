"""The readiness and the counters of a node, for `/readyz`, `/metrics` and tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from bus.values import Role

ALARMED = ("dead_letters", "decisions_missed", "declared_lost", "stalled_attempts", "wrong_identity")
"""Counters that alarms use. They and the busy times start at 0, because Prometheus sees no increase in a series that begins
with its first event.
"""
MEASURED = {Role.DEVICE: ("device", "link1"), Role.EDGE: ("edge", "link2", "result"), Role.CLOUD: ("cloud", "result")}
"""The parts of a delay that each role measures."""


@dataclass(slots=True)
class NodeStatus:
    """State of a node. Counters that a node always has start at 0."""

    caught_up: bool = False  # has read the decisions to their end
    warm: bool = False  # its models are ready
    receiving: bool = False  # its partitions are assigned
    joined: bool = False  # the planner has accepted it
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALARMED, 0.0))

    @property
    def ready(self) -> bool:
        """Whether the node can receive work."""
        return self.caught_up and self.warm and self.receiving

    def count(self, name: str, by: float = 1) -> None:
        """Add to a counter."""
        self.counters[name] = self.counters.get(name, 0) + by
