"""Simulated client: submits the tasks of a seed and checks that every result arrives once with the right content."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from bus import messages, topics
from bus.errors import BusError
from bus.messages import HandleInput, SeedInput, TaskSubmitted
from bus.port import Bus
from bus.tensors import Array
from loadgen.chaos.simulated.oracle import Say
from loadgen.chaos.simulated.region import LAYER_S, ChaosScenario, same
from loadgen.sim.region import MODEL


class SimulatedClient:
    """Draws and sends the tasks, and stores the results that devices deliver; the store survives device crashes."""

    def __init__(
        self, draw: random.Random, scenario: ChaosScenario, *, hurry: float, say: Say, note: Callable[..., None]
    ) -> None:
        """`hurry` is the fraction of the fault period over which the tasks are spread."""
        self.tasks = [_task(number, draw, scenario) for number in range(scenario.tasks)]
        self.acknowledged: list[str] = []
        self._shown: dict[str, set[int]] = {}
        self._hurry = hurry
        self._scenario = scenario
        self._say = say
        self._note = note

    async def submit(self, bus: Bus, draw: random.Random) -> None:
        """Send each task until it is acknowledged; the planner must ignore duplicates."""
        for task in self.tasks:
            await asyncio.sleep(draw.random() * self._hurry * self._scenario.faults_s / self._scenario.tasks)
            while True:
                try:
                    await bus.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)
                    break
                except BusError:
                    await asyncio.sleep(0.2)
            self.acknowledged.append(task.task_id)

    def shown(self, task_id: str) -> set[int]:
        """The samples of a task that a device delivered."""
        return self._shown.get(task_id, set())

    def show(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        """Record and check a result that a device delivers."""
        shown = self._shown.setdefault(task.task_id, set())
        if sample in shown:
            self._say("G5", f"{task.task_id}/{sample} was delivered twice")
        if not same(outputs, task.task_id, sample, len(LAYER_S)):
            self._say("G5", f"{task.task_id}/{sample} was delivered with wrong content")
        shown.add(sample)
        self._note("shown", task.task_id, sample)


def _task(number: int, draw: random.Random, scenario: ChaosScenario) -> TaskSubmitted:
    return TaskSubmitted(
        task_id=f"t{number}",
        device=f"d{draw.randrange(scenario.devices) + 1}",
        model=MODEL,
        samples=draw.randint(*scenario.samples),
        input=HandleInput(handle="camera") if draw.random() < 0.1 else SeedInput(seed=number),
        max_link1_bps=draw.choice([None, 500_000]),
        deadline_s=draw.uniform(5.0, 40.0) if draw.random() < 0.1 else None,
    )
