"""Batch benchmark: a cloud stage that computes the tail of AlexNet for several tasks at once, in batches and one by one.

Two stages in this process share the loaded model and take turns: one with batches, one without. Their bus is in memory, and
this module plays the edge and the devices of the tasks: it sends the activations, each task's samples within the task's
window, and waits for the results.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

from bus import messages, topics
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import EpochOpened
from bus.port import Reader
from bus.tensors import to_pieces
from bus.topics import Partitions
from bus.values import Execution, Kind, ModelProfile, Placement, Role
from loadgen.bench.cpu_load import BusynessWatch
from stages.hops.hop import hop_of
from stages.litert_batches import UNCHECKED
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.litert_stations import WORKERS
from stages.membership.settings import NodeSettings
from stages.models.compute_options import BatchMode
from stages.models.model import Model
from stages.models.random_samples import random_input
from stages.models.segments.store import SegmentStore, StoreLimits
from stages.node import Node
from stages.window import window_of
from stages.zoo.registry import load_model

MODEL, CUT = "alexnet", "maxpool_3"
TASKS = 8
"""Tasks at once in a round under load."""

ROUND_S, ROUNDS = 2.5, 5
QUICK_ROUND_S, QUICK_ROUNDS = 0.6, 2

TURNS = 6
"""Turns of each stage with a single task in a round."""

FASTER, NO_SLOWER = 2.5, 1.03
"""Aims: samples a second of eight tasks with batches over those without, and the median delay of a single task's samples."""

RATE_BPS = 1 << 36
"""A rate high enough that no link limits the stage."""

CHECKED_S = 120.0
"""Time limit for the checks of segments."""


class _Stage:
    """One cloud stage, and the tasks that are sent to it."""

    def __init__(self, bus: MemoryBus, results: Reader, runner: LitertRunner, model: Model, cut: int) -> None:
        self._bus, self._results, self.runner = bus, results, runner
        self._model, self._cut = model, cut
        self._profile = runner.profiles()[0]
        self._numbers = count()
        self._arrived: dict[str, asyncio.Queue[int]] = {}
        specs = model.manifest.cuts[cut].tensors
        self._inputs = [[random_input(spec, 1, sample) for spec in specs] for sample in range(8)]

    async def collect(self) -> None:
        """Hand the results to the tasks that wait for them, until cancelled."""
        while True:
            for record in await self._results.fetch():
                frame = decode_frame(record.value)
                if frame.kind == "result" and frame.task_id in self._arrived:
                    for piece in frame.pieces:
                        self._arrived[frame.task_id].put_nowait(piece.sample)

    async def round(self, tasks: int, window: int | None, seconds: float) -> dict[str, Any]:
        """Samples a second of `tasks` tasks at once, and the delay of each sample. `window` None: the window of a device."""
        until_s = perf_counter() + seconds
        begin_s = perf_counter()
        delays = await asyncio.gather(*(self._task(window, until_s) for _ in range(tasks)))
        took_s = perf_counter() - begin_s
        return {"per_s": sum(map(len, delays)) / took_s, "delays_s": [delay for one in delays for delay in one]}

    async def _task(self, window: int | None, until_s: float) -> list[float]:
        """Play one task until the time is over; the delay of each sample."""
        plan = self._plan(f"t{next(self._numbers)}")
        window = window or window_of(plan, self._profile.cut_bytes)
        arrived = self._arrived[plan.task_id] = asyncio.Queue()
        sent: dict[int, float] = {}
        delays: list[float] = []
        samples = count()
        try:
            while True:
                while len(sent) < window and perf_counter() < until_s:
                    sample = next(samples)
                    sent[sample] = perf_counter()
                    await self._send(plan, sample)
                if not sent:
                    return delays
                sample = await arrived.get()
                delays.append(perf_counter() - sent.pop(sample))
        finally:
            del self._arrived[plan.task_id]

    async def _send(self, plan: AttemptPlan, sample: int) -> None:
        pieces = tuple(to_pieces(sample, self._inputs[sample % len(self._inputs)], 1 << 20))
        frame = Frame("activations", plan.task_id, 1, plan.device, pieces, plan if sample == 0 else None)
        await self._bus.send(topics.ACTIVATIONS_CLOUD, encode_frame(frame), key=plan.task_id)

    def _plan(self, task_id: str) -> AttemptPlan:
        """A task with far more samples than the benchmark sends."""
        placement = Placement(
            kind=Kind.EDGE_CLOUD, edge="e", cut1=0, cut2=self._cut, cut1_name="input", cut2_name=CUT,
            link1_bps=RATE_BPS, link2_bps=RATE_BPS,
        )  # fmt: skip
        return AttemptPlan(
            task_id=task_id, attempt=1, region=0, device="d", model=self._model.name, sha256=self._model.sha256,
            samples=1 << 20, todo=1 << 20, execution=Execution.STREAMING, placement=placement,
        )  # fmt: skip


@asynccontextmanager
async def _stage(model: Model, cut: int, batches: BatchMode, prepared: Prepared) -> AsyncIterator[_Stage]:
    runner = LitertRunner([model], RunnerOptions(batches=batches), prepared=prepared)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.close)
        bus = await stack.enter_async_context(MemoryBus(MemoryBroker(), "bench"))
        await bus.create_topics(topics.specs(["e"], Partitions(cloud=1, results=1)))
        opened = EpochOpened(region=0, epoch=1, nonce="bench", planner="bench", lease_s=3600.0)
        await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        node = Node(bus, NodeSettings(name="c", role=Role.CLOUD), runner)
        results = await bus.reader([(topics.RESULTS, 0)], start="end")
        stack.push_async_callback(results.close)
        stage = _Stage(bus, results, runner, model, cut)
        work = [asyncio.create_task(node.run(hop_of(node))), asyncio.create_task(stage.collect())]
        stack.push_async_callback(_ended, work)
        await node.serving.wait()
        yield stage


def run(*, quick: bool = False, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes."""
    seconds, rounds = (QUICK_ROUND_S, QUICK_ROUNDS) if quick else (ROUND_S, ROUNDS)
    return asyncio.run(measure(load_model(MODEL), CUT, seconds, rounds, progress))


async def measure(
    model: Model, cut_name: str, seconds: float, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the layers of a model after a cut. In each round each stage computes twice, for `seconds` each time."""
    cut = next(point.position for point in model.manifest.cuts if point.name == cut_name)
    store = SegmentStore(model, limits=StoreLimits(replicas=WORKERS))
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
    prepared = Prepared(stores={model.name: store}, profiles={model.name: _profile(model)}, pool=pool)
    rows: list[dict[str, Any]] = []
    watch = BusynessWatch()
    try:
        async with _stage(model, cut, "off", prepared) as alone, _stage(model, cut, "exact", prepared) as together:
            for stage in (alone, together):
                await stage.round(1, 1, 0.2)
            await _checked(together)
            pair = (("off", alone), ("exact", together))
            async with watch:
                for number in range(rounds):
                    for turn in range(TURNS):  # short turns, because other load changes more than what is compared
                        for batches, stage in pair if turn % 2 else pair[::-1]:
                            rows.append({"batches": batches, "tasks": 1} | await stage.round(1, 1, seconds / TURNS))
                    for batches, stage in pair if number % 2 else pair[::-1]:
                        rows.append({"batches": batches, "tasks": TASKS} | await stage.round(TASKS, None, seconds))
                        progress(f"round {number + 1}, batches {batches}: {rows[-1]['per_s']:.1f} samples/s")
    finally:
        pool.shutdown(wait=False)
    results = [_row(rows, batches, tasks) for tasks in (1, TASKS) for batches in ("off", "exact")]
    return {
        "bench": "batches",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": [{"model": model.name, "segment": f"{cut + 1}..{model.graph.depth}"} | row for row in results],
        "aims": aims(results),
        "busyness": watch.seen().as_json(),
    }


async def _ended(work: Sequence[asyncio.Task[None]]) -> None:
    for task in work:
        task.cancel()
    await asyncio.wait(work)


async def _checked(stage: _Stage) -> None:
    """Wait until the stage knows which segments it computes in batches, and does nothing in the background."""
    async with asyncio.timeout(CHECKED_S):
        while UNCHECKED in (stage.runner.batch_segments() or {}).values():
            await asyncio.sleep(0.02)


def _profile(model: Model) -> ModelProfile:
    """A profile that need not be right: it only says that the layers are too long for the event loop."""
    cuts = model.manifest.cuts
    return ModelProfile(
        model=model.name, sha256=model.sha256, platform="bench", layer_names=tuple(cut.name for cut in cuts[1:]),
        layer_s=(0.01,) * model.manifest.layers, cut_bytes=tuple(cut.cut_bytes for cut in cuts),
    )  # fmt: skip


def _row(rows: Sequence[dict[str, Any]], batches: str, tasks: int) -> dict[str, Any]:
    """The medians over the rounds of one case."""
    own = [row for row in rows if (row["batches"], row["tasks"]) == (batches, tasks)]
    return {
        "tasks": tasks,
        "batches": batches,
        "samples_per_s": median(row["per_s"] for row in own),
        "p50_s": median(delay for row in own for delay in row["delays_s"]),
    }


def aims(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What batches shall gain under load, and what they may cost without."""
    found = {(row["batches"], row["tasks"]): row for row in results}
    gain = found["exact", TASKS]["samples_per_s"] / found["off", TASKS]["samples_per_s"]
    cost = found["exact", 1]["p50_s"] / found["off", 1]["p50_s"]
    return [
        {
            "name": f"{TASKS} tasks at once: samples a second in batches over one by one",
            "value": gain,
            "aim": f">= {FASTER}",
            "pass": gain >= FASTER,
        },
        {
            "name": "one task: median delay of a sample with batches over that without",
            "value": cost,
            "aim": f"<= {NO_SLOWER}",
            "pass": cost <= NO_SLOWER,
        },
    ]
