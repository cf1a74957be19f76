"""Pipeline benchmark (`deepar loadgen bench pipeline`): throughput of streams over the bottleneck's, and shaper accuracy.

The stages are the real shells with modelled machines of known speed. A director replaces the planner and fixes the placement
(`loadgen.bench.fixed_placement`). Each of the five stations is the bottleneck in turn; the others take 60 % of its time.
Throughput is the number of samples over the time from the start to the last result on the device's clock, including the time
to fill the pipeline. The bottleneck's throughput is one sample per station time; for a link it counts the sample's bytes at
the granted rate without frame headers, so headers show as a loss. The sequential run sends one sample at a time and uses a
tenth of the samples.

The shaper is measured at the sender: bytes of frames passed to the bus, divided by the time taken and by the granted rate.

Real LeNet runs through the same stages without shaping and is compared with bare aiokafka (`loadgen.bench.lenet`).

On Kafka the benchmark leads region 0 while it runs, and rejects a broker whose region 0 has a planner.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np
import uvloop

from bus.frames import AttemptPlan
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.port import Bus, Position, RecordValue
from bus.topics import TopicSpec
from bus.values import BITS_PER_BYTE, STATIONS, Execution, Kind, ModelProfile, Placement, Role
from loadgen.bench import lenet
from loadgen.bench.cpu_load import BusynessWatch
from loadgen.bench.fixed_placement import TIMEOUT_S, Staged
from stages.network.frame_sender import Destination, FrameSender, Outgoing, SenderHooks
from stages.network.shaper import Link
from stages.runner import ModelledRunner

Progress = Callable[[str], None]

OTHERS = 0.6
"""Time of the other stations as a share of the bottleneck's."""

RESULT_BYTES = 40
RATES_BPS = (1_000_000, 10_000_000, 100_000_000, 300_000_000, 1_000_000_000)
KAFKA_MAX_BPS = 300_000_000
SHAPED_S = 3.0
SHAPED_AIM = 0.985
LENET_AIM = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """One size of stream."""

    sample_s: float  # at the bottleneck
    sample_bytes: int  # at either cut
    samples: int
    aim: float  # minimum throughput over the bottleneck's
    sequential: bool = False  # whether the sequential run is measured, too


LOADS = (
    Load(0.020, 150_000, 200, 0.98, sequential=True),
    Load(0.002, 4_000, 200, 0.96),
    Load(0.002, 4_000, 2_000, 0.99),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Amount of work to measure; tests use smaller values."""

    rounds: int = 3
    loads: tuple[Load, ...] = LOADS
    lenet_samples: int = 10_000
    rates_bps: tuple[int, ...] = RATES_BPS
    shaped_s: float = SHAPED_S


def run(
    bus: Literal["memory", "kafka"] = "memory",
    bootstrap: str | None = None,
    *,
    sizes: Sizes | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure on uvloop and return the object that docs/json.md describes. Raises `BusError` if no broker answers."""
    connection = KafkaConnection.from_env(bootstrap_servers=bootstrap) if bus == "kafka" else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(bus, connection, sizes or Sizes(), progress or (lambda line: None)))


async def _measure(name: str, connection: KafkaConnection | None, sizes: Sizes, progress: Progress) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    aims: list[dict[str, Any]] = []
    watch = BusynessWatch()
    broker = MemoryBroker()

    def make(client: str) -> Bus:
        return MemoryBus(broker, client) if connection is None else KafkaBus(connection)

    async with watch:
        for load in sizes.loads:
            for station in STATIONS:
                progress(f"{station} as the bottleneck, {load.sample_s * 1000:g} ms per sample, {load.samples} samples")
                row = await _bottleneck(name, make, station, load, sizes.rounds)
                results.append(row)
                label = f"{row['case']}: throughput over the bottleneck's"
                aims.append(_aim(label, row["throughput"] / row["bottleneck_throughput"], load.aim))
        if sizes.lenet_samples:
            row = await lenet.measure(name, make, connection, sizes.lenet_samples, sizes.rounds, progress)
            results.append(row)
            if row["bare_samples_per_s"] is not None:
                ratio = row["samples_per_s"] / row["bare_samples_per_s"]
                aims.append(_aim("LeNet: samples over what bare aiokafka moves", ratio, LENET_AIM))
        for rate_bps in sizes.rates_bps:
            if name == "kafka" and rate_bps > KAFKA_MAX_BPS:
                continue
            progress(f"shaper at {rate_bps / 1e6:g} Mbit/s")
            row = await _shaped(make, rate_bps, sizes.shaped_s)
            results.append(row)
            ratio = row["shaped_bps"] / rate_bps
            worst = row["worst_second_bps"] / rate_bps
            aims.append(_aim(f"shaped over granted, {rate_bps / 1e6:g} Mbit/s", ratio, SHAPED_AIM))
            aims.append({"name": f"worst second over granted, {rate_bps / 1e6:g} Mbit/s", "value": round(worst, 4),
                         "aim": 1.0, "pass": worst <= 1.0})  # fmt: skip
    seen = watch.seen()
    return {
        "bench": "pipeline",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, uvloop",
        "results": results,
        "aims": aims,
        "busyness": seen.as_json(),
        "judgeable": not seen.too_busy,
        "note": "the machine was too busy to judge" if seen.too_busy else "",
    }


def _aim(name: str, value: float, aim: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "aim": aim, "pass": value >= aim}


# --- streams ---------------------------------------------------------------------------------------------------------


async def _bottleneck(name: str, make: Callable[[str], Bus], station: str, load: Load, rounds: int) -> dict[str, Any]:
    """Measure with one station as the bottleneck: medians over the rounds; an extra first round is dropped."""
    takes_s = {other: load.sample_s * (1.0 if other == station else OTHERS) for other in STATIONS}
    rates_bps = [round(load.sample_bytes * BITS_PER_BYTE / takes_s[link]) for link in ("link1", "link2")]
    profile = ModelProfile(
        model="bench",
        sha256="0" * 64,
        platform="bench",
        layer_names=("front", "middle", "rest"),
        layer_s=(takes_s["device"], takes_s["edge"], takes_s["cloud"]),
        cut_bytes=(load.sample_bytes, load.sample_bytes, load.sample_bytes, RESULT_BYTES),
    )
    runners = {role: ModelledRunner([profile]) for role in Role}
    async with Staged(make, runners, profile, cuts=(1, 2), rates_bps=(rates_bps[0], rates_bps[1])) as stages:
        await stages.play(min(load.samples, 20), Execution.STREAMING)
        streamed_s = median([await stages.play(load.samples, Execution.STREAMING) for _ in range(rounds)])
        row = {
            "bus": name,
            "case": f"{station} {load.sample_s * 1000:g} ms, {load.sample_bytes:,} bytes, {load.samples:,} samples",
            "throughput": load.samples / streamed_s,
            "bottleneck_throughput": 1.0 / load.sample_s,
            "streamed_s": streamed_s,
            "sequential_s": None,
        }
        if load.sequential:
            few = max(1, load.samples // 10)
            row["sequential_s"] = await stages.play(few, Execution.SEQUENTIAL) * load.samples / few
    return row


# --- the shaper ------------------------------------------------------------------------------------------------------


class _Watched:
    """A bus that records the time and size of every send."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.seen: list[tuple[float, int]] = []

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> Awaitable[Position]:
        """Record the send and pass it to the bus."""
        self.seen.append((perf_counter(), len(value or b"")))
        return await self._bus.post(topic, value, **more)


async def _shaped(make: Callable[[str], Bus], rate_bps: int, for_s: float) -> dict[str, Any]:
    """Measure the shaper with one task that always has data to send."""
    topic = f"deepar.bench.shaper.{os.getpid()}"
    sample_bytes = max(20_000, min(1_000_000, rate_bps // 80))
    count = max(2, round(rate_bps * for_s / BITS_PER_BYTE / sample_bytes))
    left = asyncio.Semaphore(8)
    over = asyncio.Event()
    acknowledged = 0

    def done(samples: Sequence[int]) -> None:
        nonlocal acknowledged
        acknowledged += len(samples)
        for _ in samples:
            left.release()
        if acknowledged == count:
            over.set()

    async with make("shaper") as bus:
        await bus.create_topics([TopicSpec(topic, 1, retention_bytes=64 << 20)])
        watched = _Watched(bus)
        sender = FrameSender(
            watched,  # type: ignore[arg-type]
            _plan(rate_bps),
            Destination("result", topic, "bench", "result", (Link(rate_bps).grant(rate_bps),)),
            SenderHooks(gate=_open, on_busy=lambda begin_s, end_s: None, on_acknowledged=done),
            source="bench",
        )
        payload = [np.zeros(sample_bytes, np.uint8)]
        sending = asyncio.create_task(sender.run())
        begun_s = perf_counter()
        loop = asyncio.get_running_loop()
        for sample in range(count):
            await left.acquire()
            sender.put(Outgoing(sample, payload, loop.time()))
        async with asyncio.timeout(TIMEOUT_S):
            await over.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    took_s = watched.seen[-1][0] - begun_s
    total = sum(size for _, size in watched.seen)
    return {
        "granted_bps": rate_bps,
        "shaped_bps": total * BITS_PER_BYTE / took_s,
        "worst_second_bps": worst_second_bytes(watched.seen) * BITS_PER_BYTE,
    }


def worst_second_bytes(seen: list[tuple[float, int]]) -> int:
    """Maximum bytes in any half-open second that begins with a frame; `seen` has (time, bytes) in ascending order."""
    worst = within = first = 0
    for when_s, size in seen:
        within += size
        while seen[first][0] <= when_s - 1.0:
            within -= seen[first][1]
            first += 1
        worst = max(worst, within)
    return worst


async def _open() -> None:
    """The send gate of a live node: always open."""


def _plan(rate_bps: int) -> AttemptPlan:
    placement = Placement(
        kind=Kind.EDGE, edge="bench", cut1=0, cut2=1, cut1_name="input", cut2_name="all", link1_bps=rate_bps
    )
    return AttemptPlan(
        task_id="bench",
        attempt=1,
        region=0,
        device="bench",
        model="bench",
        sha256="0" * 64,
        samples=1,
        todo=1,
        execution=Execution.STREAMING,
        placement=placement,
    )
