"""The rounds of the regret benchmark: the tasks of a cell, one after another, under each policy in turn.

The learning planner and the fixed policies have a region each on the same broker and the same machine: a planner, a device,
an edge and a cloud worker, all separate processes with the same settings. Two regions are needed because the learning planner
would learn from the tasks of the other policies in a region that they share. The regions are new in every cell, so that every
cell begins without anything learned, and both begin cold. One task runs at a time, so the idle region disturbs little.

`Testbed` starts the processes; its implementation is `deploy.services.paired_regions`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from bus.errors import DeeparError
from bus.messages import SeedInput, TaskState, TaskSubmitted
from bus.port import Bus
from loadgen.bench.choices import regret
from loadgen.bench.choices.policy_by_name import task_name
from loadgen.bench.choices.regret import FIRST, FIXED, LEARNING, Cell, Run
from loadgen.replay.outcome import Outcome
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule

Progress = Callable[[str], None]


class TaskNotCompletedError(DeeparError):
    """A task of the benchmark did not complete."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where the tasks of some policies go."""

    bus: Bus
    region: int
    device: str


@dataclass(frozen=True, slots=True)
class Sites:
    """The two regions of a cell."""

    learning: Site
    fixed: Site


class Testbed(Protocol):
    """Starts the regions of a cell."""

    def regions(self, cell: Cell) -> AbstractAsyncContextManager[Sites]:
        """New regions whose nodes have joined; they end with the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured in a cell."""

    tasks: int = 15  # of each policy
    most_tasks: int = 40  # of each policy, if the first `tasks` do not show whether the aim of regret is reached
    least_tasks: int = FIRST + 2  # of each policy, in cells that reach the time limit
    limit_s: float = 40.0  # no further round begins after this time
    hopeless: float = 1.5  # a fixed policy that is this much slower than the best is not run again
    hopeless_after: int = 2  # rounds before a policy can be hopeless


async def measure(
    testbed: Testbed, cells: Sequence[Cell], effort: Effort, seed: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Run all cells; returns `results`, `policies`, `tasks` and `aims`. Raises `TaskNotCompletedError` and `BusError`."""
    results: list[dict[str, Any]] = []
    policies: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, start=1):
        async with testbed.regions(cell) as sites:
            runs = await play_rounds(partial(_play, sites, cell, seed), effort)
        row = regret.judge(cell, runs)
        results.append(row)
        policies += regret.policy_rows(cell, runs)
        tasks += regret.task_rows(cell, runs)
        progress(f"{number}/{len(cells)} {cell}: {_in_words(row)}")
    return {"results": results, "policies": policies, "tasks": tasks, "aims": regret.aims(results)}


def _in_words(row: dict[str, Any]) -> str:
    return (
        f"{row['tasks']} tasks each, regret {row['regret']:.2f}±{row['regret_se']:.2f} "
        f"({row['regret_s'] * 1000:+.1f} ms, first {row['regret_first']:.2f}±{row['regret_first_se']:.2f}), "
        f"error {row['error']:.0%} ({row['error_s'] * 1000:.1f} ms, first {row['error_first']:.0%}), "
        f"best fixed policy {row['best_policy']}"
    )


async def play_rounds(
    play: Callable[[str, int], Awaitable[Run]], effort: Effort, clock: Callable[[], float] = time.monotonic
) -> dict[str, list[Run]]:
    """The tasks of a cell: each round plays one task under each policy, and the order rotates from round to round.

    More rounds than `effort.tasks` are played only while it is uncertain on which side of its aim the regret is.

    `play` runs a task under a policy; its second argument is the number of the round.
    """
    runs: dict[str, list[Run]] = {policy: [] for policy in (LEARNING, *FIXED)}
    hopeless: set[str] = set()
    begun_s = clock()
    for number in range(max(effort.tasks, effort.most_tasks)):
        if number >= effort.least_tasks and clock() - begun_s > effort.limit_s:
            break
        if number >= effort.tasks and regret.known(runs):
            break
        policies = [policy for policy in runs if policy not in hopeless]
        turn = number % len(policies)
        for policy in policies[turn:] + policies[:turn]:
            runs[policy].append(await play(policy, number))
        if number + 1 >= effort.hopeless_after:
            hopeless |= regret.drop_hopeless(runs, effort.hopeless)
    return runs


async def _play(sites: Sites, cell: Cell, seed: int, policy: str, number: int) -> Run:
    site = sites.learning if policy == LEARNING else sites.fixed
    task = TaskSubmitted(
        task_id=task_name(f"{cell}-{number}".replace(" ", "-"), policy),
        device=site.device,
        model=cell.model,
        samples=cell.samples,
        input=SeedInput(seed=seed + number),
    )
    played = await replay(site.bus, Schedule(entries=(Entry(at_s=0.0, task=task),), seed=seed), region=site.region)
    return run_of(played.outcomes[0])


def run_of(outcome: Outcome) -> Run:
    """What is kept of a task. Raises `TaskNotCompletedError`."""
    if outcome.state is not TaskState.COMPLETED or outcome.device_delay_s is None:
        raise TaskNotCompletedError(
            f"task {outcome.task_id} did not complete: {outcome.state or 'no answer'} {outcome.cause}".rstrip(),
            remedy="see the logs of the processes in the folder that is printed above",
        )
    assert outcome.placement is not None
    assert outcome.predicted_delay_s is not None
    assert outcome.delay_s is not None
    place = outcome.placement
    where = f"{place.kind} {place.cut1}/{place.cut2}"
    return Run(outcome.device_delay_s, outcome.delay_s, outcome.predicted_delay_s, where)
