"""Circuit breakers for nodes at which attempts keep failing.

A node's circuit opens after `OPENS_AFTER` consecutive failed attempts. While it is open, tasks are placed on other nodes
where possible. After `OPEN_S` the circuit is half open: one task, the probe, may be placed on the node. If the probe
succeeds, the circuit closes; if it fails, the circuit opens for another `OPEN_S`. Circuits are part of the state: only
recorded changes alter them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

OPENS_AFTER: Final = 3
"""Number of consecutive failed attempts that opens a circuit."""
OPEN_S: Final = 60.0
"""Time for which a circuit stays open."""


class Circuit(NamedTuple):
    """The circuit breaker of a node at which the last attempt failed."""

    failures: int  # consecutive failed attempts
    until_s: float | None = None  # ledger time at which it turns from open to half open; None: closed
    probe: str | None = None  # task id of the probe of a half-open circuit

    def text(self, node: str) -> str:
        """The text that enters the state hash."""
        return f"circuit|{node}|{self.failures}|{self.until_s!r}|{self.probe}"

    def avoided(self, now: float) -> bool:
        """Whether tasks are placed on other nodes where possible."""
        return self.until_s is not None and (now < self.until_s or self.probe is not None)

    def wants_probe(self, now: float) -> bool:
        """Whether the next task placed on this node becomes the probe."""
        return self.until_s is not None and now >= self.until_s and self.probe is None

    def after_failure(self, now: float) -> Circuit:
        """The circuit after one more failed attempt."""
        failures = self.failures + 1
        opens = self.until_s is not None or failures >= OPENS_AFTER
        return Circuit(failures, now + OPEN_S if opens else None)


def avoided(circuits: Mapping[str, Circuit], now: float) -> frozenset[str]:
    """The nodes whose circuits are open, or half open with a probe under way."""
    return frozenset(name for name, circuit in circuits.items() if circuit.avoided(now))
