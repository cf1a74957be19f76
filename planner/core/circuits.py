"""Circuit breakers: nodes whose attempts keep failing are given less, until an attempt succeeds there again.

A node's circuit opens after `OPENS_AFTER` failed attempts in a row. While it is open, tasks are placed elsewhere if they can
be. After `OPEN_S` it is half open: one task, the probe, may be placed there as on any other node. Its success closes the
circuit, its failure opens it for as long again. Circuits are part of the state: they change by recorded changes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

OPENS_AFTER: Final = 3
OPEN_S: Final = 60.0


class Circuit(NamedTuple):
    """What is remembered of a node at which the last attempt failed."""

    failures: int  # attempts in a row
    until_s: float | None = None  # ledger time until which it is open, half open from then on; None: closed
    probe: str | None = None  # the task that tries a half-open circuit

    def text(self, node: str) -> str:
        """Everything about it, for the hash."""
        return f"circuit|{node}|{self.failures}|{self.until_s!r}|{self.probe}"

    def avoided(self, now: float) -> bool:
        """Whether tasks are placed elsewhere if they can be."""
        return self.until_s is not None and (now < self.until_s or self.probe is not None)

    def wants_probe(self, now: float) -> bool:
        """Whether the next task that is placed there is the probe."""
        return self.until_s is not None and now >= self.until_s and self.probe is None

    def after_failure(self, now: float) -> Circuit:
        """The circuit when one more attempt has failed."""
        failures = self.failures + 1
        opens = self.until_s is not None or failures >= OPENS_AFTER
        return Circuit(failures, now + OPEN_S if opens else None)


def avoided(circuits: Mapping[str, Circuit], now: float) -> frozenset[str]:
    """The nodes whose circuits are open, or half open and tried already."""
    return frozenset(name for name, circuit in circuits.items() if circuit.avoided(now))
