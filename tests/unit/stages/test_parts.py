"""What the parts of a completed task mean: each station's own time, without overlap, waiting or the bus's latency."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from bus import messages, topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import TaskCompleted
from bus.tensors import Array
from bus.values import Execution, ModelProfile, Role
from loadgen.bench.fixed_placement import Staged
from loadgen.sim.virtual_loop import run_virtual
from stages.network.frame_sender import Outgoing, sending
from stages.runner import ModelledRunner, PaceClock, Station

from .network.test_frame_sender import frame_sender_of

PROFILE = ModelProfile(
    model="toy",
    sha256="0" * 64,
    platform="p",
    layer_names=("a", "b", "c"),
    layer_s=(0.010, 0.020, 0.030),
    cut_bytes=(100, 60_000, 30_000, 4_000),
)
RATES_BPS = (4_000_000, 2_000_000)
SAMPLES = 6
LINK1_S, LINK2_S = 60_000 * 8 / RATES_BPS[0], 30_000 * 8 / RATES_BPS[1]  # of one sample
RESULT_S = 4_000 * 8 / RATES_BPS[0] + 4_000 * 8 / RATES_BPS[1]
HEADS = 0.05  # share of link time that heads of frames may add
LATENCY_S = 0.05  # of one record
HOPS = 3  # device -> edge -> cloud -> device


def completed(
    execution: Execution, runner: type[ModelledRunner] = ModelledRunner, latency_s: float = LATENCY_S
) -> TaskCompleted:
    """The report of one task that device, edge and cloud computed in virtual time."""

    async def run() -> TaskCompleted:
        broker = MemoryBroker(latency_s=latency_s)
        runners = {role: runner([PROFILE]) for role in Role}
        async with Staged(
            lambda name: MemoryBus(broker, name), runners, PROFILE, cuts=(1, 2), rates_bps=RATES_BPS
        ) as staged:
            await staged.play(SAMPLES, execution)
        log = broker.logs(topics.EVENTS)[0]
        events = [messages.decode(topics.EVENTS, record.value) for record in log.read(0, log.end)]
        (found,) = [event for event in events if isinstance(event, TaskCompleted)]
        return found

    return run_virtual(run(), horizon_s=1000.0)


def check_parts(found: TaskCompleted) -> None:
    """Every part is what the profile and the granted rates say, whatever the bus adds."""
    measured = found.measured
    assert found.cloud is not None
    assert found.cloud.endswith("-c")
    computing = pytest.approx
    assert measured.device_s == computing(SAMPLES * 0.010, rel=1e-6)
    assert measured.edge_s == computing(SAMPLES * 0.020, rel=1e-6)
    assert measured.cloud_s == computing(SAMPLES * 0.030, rel=1e-6)
    for part_s, sample_s in ((measured.link1_s, LINK1_S), (measured.link2_s, LINK2_S), (measured.result_s, RESULT_S)):
        assert SAMPLES * sample_s <= part_s <= SAMPLES * sample_s * (1 + HEADS)


@pytest.mark.parametrize("latency_s", [0.0, LATENCY_S])
def test_sequential_parts_and_latencies_add_up_to_the_delay(latency_s: float) -> None:
    found = completed(Execution.SEQUENTIAL, latency_s=latency_s)
    check_parts(found)
    explained_s = found.measured.total_s + SAMPLES * HOPS * latency_s
    assert found.delay_s == pytest.approx(explained_s, rel=1e-3)


def test_parts_of_a_pipeline_are_the_same() -> None:
    found = completed(Execution.STREAMING)
    measured = found.measured
    assert measured.edge_s == pytest.approx(SAMPLES * 0.020, rel=1e-6)
    assert SAMPLES * LINK1_S <= measured.link1_s <= SAMPLES * LINK1_S * (1 + HEADS)
    assert SAMPLES * LINK2_S <= measured.link2_s <= SAMPLES * LINK2_S * (1 + HEADS)


PREPARE_S = 1.0


class SlowToPrepare(ModelledRunner):
    """A runner that needs a second to prepare layers, once."""

    def __init__(self, profiles: Sequence[ModelProfile]) -> None:
        super().__init__(profiles)
        self._ready_s: dict[tuple[int, int], float] = {}

    async def prepare(self, plan: object, first: int, last: int) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(self._ready_s.setdefault((first, last), now + PREPARE_S) - now)


def test_preparing_is_no_computing_and_the_stages_prepare_at_once() -> None:
    found = completed(Execution.SEQUENTIAL, SlowToPrepare)
    check_parts(found)
    explained_s = found.measured.total_s + SAMPLES * HOPS * LATENCY_S
    # Edge and cloud prepare when the placement is published, while the device does: the task pays one time, not three.
    assert found.delay_s - explained_s == pytest.approx(PREPARE_S, rel=0.01)


WAIT_S = 0.5


class CrowdedStation:
    """A station whose samples wait for other tasks before they are computed."""

    def __init__(self, inner: Station) -> None:
        self._inner = inner
        self.waited_s = 0.0

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        await asyncio.sleep(WAIT_S)
        self.waited_s += WAIT_S
        return await self._inner.run(sample, inputs, asyncio.get_running_loop().time())

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        self._inner.close()


class Crowded(ModelledRunner):
    def station(self, plan: object, first: int, last: int, pace: PaceClock) -> Station:
        return CrowdedStation(super().station(plan, first, last, pace))  # type: ignore[arg-type]


def test_waiting_for_other_tasks_is_no_computing() -> None:
    found = completed(Execution.SEQUENTIAL, Crowded)
    check_parts(found)
    assert found.delay_s > SAMPLES * 3 * WAIT_S


@pytest.mark.parametrize("latency_s", [0.0, 3.0])
def test_link_time_ends_when_the_bytes_have_crossed(latency_s: float) -> None:
    """The bus acknowledges after seconds, and the frames that follow cross meanwhile."""
    sizes = [25_000, 25_000, 50_000]

    async def run() -> tuple[float, float | None, float]:
        broker = MemoryBroker(latency_s=latency_s)
        async with MemoryBus(broker) as bus:
            await bus.create_topics([topics.TopicSpec("out", 1)])
            acknowledged: list[int] = []
            sender = frame_sender_of(bus, acknowledged.extend)
            begin_s = asyncio.get_running_loop().time()
            async with sending(sender):
                for sample, size in enumerate(sizes):
                    sender.put(Outgoing(sample, [np.zeros(size, np.uint8)], begin_s))
                while len(acknowledged) < len(sizes):
                    await asyncio.sleep(0.01)
            began_s = None if sender.began_s is None else sender.began_s - begin_s
            return sender.busy_s, began_s, sender.busy_until_s - begin_s

    busy_s, began_s, until_s = run_virtual(run(), horizon_s=100.0)
    crossing_s = sum(sizes) * 8 / 1_000_000
    assert crossing_s <= busy_s <= crossing_s * (1 + HEADS)
    assert began_s == 0.0
    assert until_s == pytest.approx(busy_s)
