"""Who may start after a change: the cheap way and the thorough way agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from bus.values import Objective
from planner import core
from planner.core import PlannerCore
from planner.ledger import Ledger, Reservation
from planner.walk import pull, walk
from tests.unit.planner.scenes import World


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", ["deepar", "edge-only", "device-only"])
def test_pulling_forward_equals_walking_everything(
    objective: Objective, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = moved = skipped = 0

    def both(
        ledger: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float
    ) -> Iterator[tuple[Reservation, float]]:
        """The cheap way, held against the thorough one."""
        nonlocal compared, moved
        wanted = [(r.task_id, start) for r, start in walk(ledger, list(ledger.edges), list(ledger.devices), now)]
        found = []
        for r, start in pull(ledger, edges, devices, now):
            found.append((r.task_id, start))
            yield r, start
        assert found == wanted
        compared += 1
        moved += len(found)

    def concerned(self: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> float | None:
        """Where nobody is concerned, the thorough way moves nobody."""
        nonlocal skipped
        earliest = find(self, edges, devices, now)
        if earliest is None:
            assert walk(self, list(self.edges), list(self.devices), now) == []
            skipped += 1
        return earliest

    find = Ledger.concerned
    monkeypatch.setattr(Ledger, "concerned", concerned)
    monkeypatch.setattr(core, "pull", both)
    for seed in range(8):
        World(
            PlannerCore(0, policy, objective),
            seed,
            tasks=80,
            rate=(1.0, 4.0, 10.0)[seed % 3],
            edges=2 + seed % 3,
            devices=(8, 20, 40)[seed % 3],
            validate=False,
        ).run()
    assert compared > 100
    assert compared + skipped > 200
    assert moved > 100


def test_an_overrun_that_takes_nothing_from_anybody_moves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step nobody could start earlier, and nobody is promised what another holds."""

    class Settled(World):
        def step(self, event, now):  # type: ignore[no-untyped-def]
            changes = super().step(event, now)
            ledger = self.core.ledger
            if changes:
                assert walk(ledger, list(ledger.edges), list(ledger.devices), self.core.now_s) == []
            return changes

    for seed in range(6):
        Settled(PlannerCore(0), seed, tasks=80, rate=6.0, edges=2, devices=20).run()
