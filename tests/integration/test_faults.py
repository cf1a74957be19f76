"""Real processes on Kafka: each is killed while tasks run; nothing is lost, nothing shows twice (G1, G2, G5, G6)."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

from bus import messages, topics
from bus.errors import BusError
from bus.kafka import KafkaBus, KafkaConnection
from bus.messages import DatasetInput, TaskState, TaskSubmitted
from bus.values import Execution, Objective
from loadgen.chaos_check import Oracle
from planner.core import PlannerCore
from tests.integration.deepar_processes import Processes
from tests.kafka_broker import OwnBroker

NODES = {
    "planner": ("planner",),
    "cloud": ("stage", "cloud"),
    "e1": ("stage", "edge", "--name", "e1"),
    "d1": ("stage", "device", "--name", "d1", "--slowdown", "200", "--results", "d1.jsonl"),
    "d2": ("stage", "device", "--name", "d2", "--slowdown", "200", "--results", "d2.jsonl"),
}
TASKS, SAMPLES = 12, 60
VICTIMS = ("e1", "cloud", "d1", "planner")
APART_S = 1.0
WITHIN_S = 100.0


def tasks() -> list[TaskSubmitted]:
    return [
        TaskSubmitted(
            task_id=f"fault-{number}",
            device=f"d{1 + number % 2}",
            model="lenet",
            samples=SAMPLES,
            input=DatasetInput(name="digits", start=number * SAMPLES),
        )
        for number in range(TASKS)
    ]


async def submit(bootstrap: str) -> None:
    """Every task, until it is acknowledged."""
    async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
        for task in tasks():
            while True:
                try:
                    await bus.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)
                    break
                except BusError:
                    await asyncio.sleep(0.2)


async def judged(bootstrap: str) -> Oracle:
    """Wait until every task has ended, reading the decisions with a client of our own."""
    until_s = time.monotonic() + WITHIN_S
    oracle = Oracle(PlannerCore(0, objective=Objective.PIPELINED, execution=Execution.STREAMING))
    async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
        reader = await bus.reader([(topics.DECISIONS, 0)], start="start")
        while len(oracle.ends) < TASKS and time.monotonic() < until_s:
            oracle.read(await reader.fetch(timeout_s=0.5))
        await reader.close()
    return oracle


def shown(folder: Path) -> Counter[tuple[str, int]]:
    """What the devices' sinks hold."""
    counts: Counter[tuple[str, int]] = Counter()
    for name in ("d1", "d2"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by the kill, and written again
            counts[entry["task_id"], entry["sample"]] += 1
    return counts


def test_each_process_and_the_broker_is_killed_and_nothing_is_lost_or_shown_twice(
    kafka_own: OwnBroker, tmp_path: Path
) -> None:
    folder = tmp_path / "region"
    folder.mkdir()
    with Processes(kafka_own.bootstrap, folder) as processes:

        def start(name: str) -> None:
            running[name] = processes.start(name, *NODES[name], DEEPAR_MODELS="lenet", DEEPAR_HTTP_HOST="127.0.0.1")

        running = {}
        for name in NODES:
            start(name)
        for one in running.values():
            one.wait_ready()
        asyncio.run(submit(kafka_own.bootstrap))
        for victim in VICTIMS:
            time.sleep(APART_S)
            running[victim].end(signal.SIGKILL)
            start(victim)
            running[victim].wait_ready()  # one at a time: a stage that starts without a broker ends, as it should
        kafka_own.kill()
        kafka_own.start()
        oracle = asyncio.run(judged(kafka_own.bootstrap))
        logs = "\n".join(f"--- {one.name}\n{one.text()[-3000:]}" for one in processes.all)

    states = {task_id: [str(end.state) for end in ends] for task_id, ends in oracle.ends.items()}
    assert states == {f"fault-{n}": [str(TaskState.COMPLETED)] for n in range(TASKS)}, logs
    assert not oracle.violations, oracle.violations
    assert sum(oracle.attempts.values()) > 0, "nobody was hit"
    counts = shown(folder)
    assert counts == {(f"fault-{n}", sample): 1 for n in range(TASKS) for sample in range(SAMPLES)}
