"""Crash-point sweep: kills a process before and after every await in the planner and the stages.

A seed runs once to collect the awaits (innermost planner or stages frame), then once per await and side: the process is
killed when it begins to wait there, or just before it resumes. The seed selects which visit to the await is the fatal
one. Every bus call gets one extra await before and one after it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadgen.chaos.simulated.campaign import run_seed
from loadgen.chaos.simulated.faults import role_of
from loadgen.chaos.simulated.oracle import Violation
from loadgen.chaos.simulated.region import ChaosScenario

SMALL = ChaosScenario(
    devices=1,
    edges=1,
    clouds=1,
    planners=1,
    tasks=2,
    samples=(2, 6),
    faults=(0, 0),
    faults_s=4.0,
    cameras=1.0,
    batches=1.0,
)
"""A region without other faults."""

Await = tuple[str, str, bool]
"""Role, source location of the await, whether the wait is over."""


@dataclass(slots=True)
class _Seen:
    """Counts the visits to each await, and selects the one at which to kill the process."""

    visits: Counter[Await] = field(default_factory=Counter)
    target: Await | None = None
    visit: int = 0  # of the target, counted from 1
    died: bool = False

    def __call__(self, name: str, place: str, over: bool) -> bool:
        if not place or self.died:
            return False
        here = (role_of(name), place, over)
        self.visits[here] += 1
        self.died = here == self.target and self.visits[here] == self.visit
        return self.died


def sweep(
    seed: int = 0, *, scenario: ChaosScenario = SMALL, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Kill at every await of one seed, before and after; returns `awaits` by role and `violations` with crash points."""
    first = _Seen()
    run_seed(seed, scenario=scenario, sites=first)
    found: Counter[str] = Counter()
    violations = []
    draw = random.Random(seed)
    for done, target in enumerate(sorted(first.visits), 1):
        seen = _Seen(target=target, visit=draw.randint(1, first.visits[target]))
        run = run_seed(seed, scenario=scenario, sites=seen)
        if seen.died:
            found[target[0]] += 1
        role, place, over = target
        where = f"{role} killed {'after' if over else 'before'} the await at {place}, visit {seen.visit}"
        violations += [
            Violation(violation.guarantee, f"{violation.what}; {where}").as_object(
                seed, f"deepar simulate chaos --awaits --seed {seed}"
            )
            for violation in run.violations
        ]
        if progress is not None:
            progress(done, len(first.visits))
    return {"seeds": 1, "awaits": dict(sorted(found.items())), "violations": violations}
