"""The demonstration: one cloud, two edges and four devices inside this process, with real inference on the embedded bus.

The same dozen tasks run under DeePar and then under each policy that uses one tier only, so that the delays can be compared.
Machines are emulated: device, edge and cloud are this machine, slowed down by a fixed factor each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import DatasetInput, SeedInput, TaskSubmitted
from bus.tensors import Array
from bus.values import BITS_PER_BYTE, Execution, ModelProfile, Objective, Role
from deploy.services import wiring
from deploy.services.runners import scaled
from loadgen.replay.outcome import Outcome, Recorder
from loadgen.replay.replay import Observers, replay
from loadgen.replay.schedule import Entry, Schedule
from stages.devices.attempt import ResultSink
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.litert_stations import WORKERS
from stages.membership.settings import NodeSettings
from stages.models.model import Model
from stages.models.profiler import machine_profile
from stages.models.runtime.litert import SegmentRunner
from stages.models.segments.store import SegmentStore, StoreLimits
from stages.node import Node
from stages.zoo.registry import digits, load_model

POLICIES = ("deepar", "edge-only", "cloud-only", "device-only")
MODELS = ("lenet", "alexnet")
SLOWDOWN = {Role.DEVICE: 9.0, Role.EDGE: 7.5, Role.CLOUD: 4.5}
"""Slowdown of each emulated tier. The factors are high, so that two cores can emulate seven machines and other load on this
machine has little effect: all nodes together compute for a tenth of the time."""

LENET_S = 0.0035
"""Emulated time of LeNet for one digit at slowdown 1, as on a small chip; the real time is about 40 microseconds."""

LINK1_SHARE, LINK2_SHARE = 2.1, 2.85
"""Emulated link speeds: AlexNet's input crosses link 1, and its `maxpool_2` link 2, in these multiples of AlexNet's time on
this machine. The demonstration therefore looks the same on fast and slow machines."""

DIGITS_LINK1_BPS, DIGITS_LINK2_BPS = 800_000, 1_000_000
"""Bandwidth limits of a digits task, as for a sensor with a radio link."""

SLOTS = 2
DEVICES = ("d1", "d2", "d3", "d4")
EDGES = ("e1", "e2")
DIGITS_A_TASK = 40
PICTURES_A_TASK = 4
GAP_S = 0.75


@dataclass(frozen=True, slots=True)
class BusyInterval:
    """An interval in which a node was busy with a task."""

    node: str
    part: str  # device_s, link1_s, ...
    task_id: str
    begin_s: float  # since the run began
    end_s: float


@dataclass(slots=True)
class Run:
    """The run of all tasks under one policy."""

    policy: str
    outcomes: tuple[Outcome, ...] = ()
    stretches: list[BusyInterval] = field(default_factory=list)
    answers: dict[tuple[str, int], int] = field(default_factory=dict)  # (task, sample) -> digit recognised
    equal: bool = True  # every LeNet output equals the whole model's, bit for bit

    @property
    def mean_delay_s(self) -> float:
        """Mean delay of the completed tasks, counted from their scheduled arrival."""
        delays = [outcome.delay_s for outcome in self.outcomes if outcome.delay_s is not None]
        return sum(delays) / len(delays) if delays else float("nan")


def schedule(seed: int, link2_bps: int) -> Schedule:
    """A dozen tasks over nine seconds, from the devices in turn: digits for LeNet, random pictures for AlexNet."""
    rng = np.random.default_rng(seed)
    entries = []
    for index in range(12):
        model = "lenet" if index % 3 == 1 else "alexnet"
        device = DEVICES[index % len(DEVICES)]
        name = f"{'digits' if model == 'lenet' else 'photos'}-{index + 1}"
        task = TaskSubmitted(
            task_id=name,
            device=device,
            model=model,
            samples=DIGITS_A_TASK if model == "lenet" else PICTURES_A_TASK,
            input=DatasetInput(name="digits", start=(index // 3) * DIGITS_A_TASK)
            if model == "lenet"
            else SeedInput(seed=int(rng.integers(1 << 31))),
            max_link1_bps=DIGITS_LINK1_BPS if model == "lenet" else None,
            max_link2_bps=DIGITS_LINK2_BPS if model == "lenet" else link2_bps,
        )
        entries.append(Entry(at_s=index * GAP_S, task=task))
    return Schedule(entries=tuple(entries), seed=seed)


class Demo:
    """The models, measured times and worker threads that all runs share."""

    def __init__(self, seed: int, say: Callable[[str], None], progress: Callable[[str, int, int], None] | None) -> None:
        self._models: Sequence[Model] = [load_model(name, progress) for name in MODELS]
        measured = {model.name: machine_profile(model, num_threads=1, say=say) for model in self._models}
        lenet, alexnet = measured["lenet"], measured["alexnet"]
        chips = scaled(lenet, LENET_S / sum(lenet.layer_s), lenet.platform)
        self._profiles: Mapping[str, ModelProfile] = {"lenet": chips, "alexnet": alexnet}
        alexnet_s = sum(alexnet.layer_s)
        crossing2_bytes = alexnet.cut_bytes[alexnet.layer_names.index("maxpool_2") + 1]
        self.link1_bps = round(BITS_PER_BYTE * alexnet.cut_bytes[0] / (LINK1_SHARE * alexnet_s))
        self.link2_bps = round(BITS_PER_BYTE * crossing2_bytes / (LINK2_SHARE * alexnet_s))
        self.schedule = schedule(seed, self.link2_bps)
        self._stores = {model.name: SegmentStore(model, limits=StoreLimits(replicas=WORKERS)) for model in self._models}
        for store in self._stores.values():
            store.warm(say)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self._whole = self._whole_answers()

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, policy: str, watch: Callable[[Recorder], None]) -> Run:
        """Run all tasks under one policy, on a new bus."""
        run = Run(policy)
        broker = MemoryBroker()
        clock = asyncio.get_running_loop().time
        bus = MemoryBus(broker, "deepar-demo")
        began_s = clock()

        def on_busy(node: str, part: str, task_id: str, begin_s: float, end_s: float) -> None:
            run.stretches.append(BusyInterval(node, part, task_id, begin_s - began_s, end_s - began_s))

        async with bus:
            await wiring.create_missing_topics(bus, EDGES)
            async with wiring.embedded() as group:
                setup = wiring.PlannerSetup(policy=policy, objective=Objective.PIPELINED, execution=Execution.STREAMING)
                service = wiring.make_planner(bus, setup)
                group.create_task(service.run(), name="planner")
                members = [self._node(bus, settings, on_busy) for settings in self._node_settings()]
                for node in members:
                    work = wiring.make_work(node, self._result_sink(run))
                    group.create_task(node.run(work), name=node.settings.name)
                async with asyncio.timeout(30.0):
                    while not all(node.status.joined for node in members):
                        await asyncio.sleep(0.01)
                began_s = clock()
                result = await replay(bus, self.schedule, drain_timeout_s=60.0, observers=Observers(progress=watch))
            run.outcomes = result.outcomes
        return run

    def _node(self, bus: MemoryBus, settings: NodeSettings, on_busy: Callable[..., None]) -> Node:
        runner = LitertRunner(
            self._models,
            RunnerOptions(slowdown=SLOWDOWN[settings.role], platform=f"{settings.role.value} {settings.name}"),
            prepared=Prepared(stores=self._stores, profiles=self._profiles, pool=self._pool),
        )
        return Node(bus, settings, runner, on_busy=on_busy)

    def _node_settings(self) -> list[NodeSettings]:
        """The settings of all nodes. The links of an edge have capacity for one full-rate task per slot."""
        cloud = [NodeSettings(name="c1", role=Role.CLOUD)]
        edges = [
            NodeSettings(
                name=name,
                role=Role.EDGE,
                slots=SLOTS,
                link1_capacity_bps=self.link1_bps * SLOTS,
                link2_capacity_bps=self.link2_bps * SLOTS,
            )
            for name in EDGES
        ]
        devices = [NodeSettings(name=name, role=Role.DEVICE, link1_capacity_bps=self.link1_bps) for name in DEVICES]
        return [*cloud, *edges, *devices]

    def _result_sink(self, run: Run) -> ResultSink:
        def keep(task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
            if isinstance(task.input, DatasetInput):
                picture = (task.input.start + sample) % len(self._whole)
                run.answers[task.task_id, sample] = int(np.argmax(outputs[0]))
                run.equal &= outputs[0].tobytes() == self._whole[picture].tobytes()

        return keep

    def _whole_answers(self) -> list[Array]:
        """The output of the uncut LeNet for every digit."""
        lenet = next(model for model in self._models if model.name == "lenet")
        whole = SegmentRunner(lenet.source)
        return [whole.run([image[np.newaxis]])[0] for image in digits()[0]]


def digits_right(schedule: Schedule, run: Run) -> tuple[int, int]:
    """Number of digits that a run recognised correctly, and the total."""
    _, labels = digits()
    tasks = {entry.task.task_id: entry.task for entry in schedule.entries}
    correct = 0
    for (task_id, sample), answer in run.answers.items():
        source = tasks[task_id].input
        assert isinstance(source, DatasetInput)
        correct += answer == int(labels[(source.start + sample) % len(labels)])
    return correct, len(run.answers)
