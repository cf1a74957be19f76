"""`deepar loadgen bench serve`: the benchmark's broker, its region and its peers, and what it measures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bus.errors import ConfigError, DeeparError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.tensors import Array
from deepar.client import AsyncClient
from deploy.kafka_local.broker import KafkaBroker
from deploy.kafka_local.ports import free_port
from deploy.services.live_region import LiveRegion
from deploy.services.process import run_on_uvloop
from deploy.services.serving_peers import Peer, has, kserve, mlserver
from deploy.services.wiring import create_missing_topics
from loadgen.bench.cpu_load import BusynessWatch
from loadgen.bench.serving.callers import GrpcCaller, InterpreterCaller, MakeCaller, Question, RestCaller
from loadgen.bench.serving.report import LARGE, SMALL, aims, rows
from loadgen.bench.serving.rounds import Case, play
from loadgen.bench.serving.streams import Stream, stream
from loadgen.bench.serving.wide_model import write_wide_model
from loadgen.chaos.live.faults import Target
from loadgen.replay.readiness import await_nodes, await_planner
from stages.models.model import Model
from stages.zoo.registry import load_model

RATE_HZ = 30.0
READY_S = 90.0
CONCURRENCIES = (1, 4)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured."""

    rounds: int = 5
    seconds: float = 3.0  # of each case in each round
    stream_s: float = 60.0


QUICK = Effort(rounds=2, seconds=1.0, stream_s=10.0)
"""The effort of `--quick`."""


@dataclass(frozen=True, slots=True)
class ServingRegion:
    """One device that answers alone, and one whose frames an edge and the cloud compute."""

    wide: Path  # the file of the model with the large input
    alone_rest: int  # ports
    alone_grpc: int
    far_rest: int

    def commands(self, folder: Path) -> dict[str, tuple[Target, list[str]]]:
        """Process name -> its role and the arguments of `deepar`."""
        alone = ["--model", SMALL, "--model", str(self.wide), "--serve", f"127.0.0.1:{self.alone_rest}"]
        if find_spec("grpc") is not None:
            alone += ["--serve-grpc", f"127.0.0.1:{self.alone_grpc}"]
        far = ["--model", SMALL, "--serve", f"127.0.0.1:{self.far_rest}"]
        edge = ["--model", SMALL, "--link1", "1Gbps", "--link2", "100Mbps"]
        return {
            "p1": (Target.PLANNER, ["planner", "--name", "p1"]),
            "c1": (Target.CLOUD, ["stage", "cloud", "--name", "c1", "--model", SMALL]),
            "e1": (Target.EDGE, ["stage", "edge", "--name", "e1", *edge]),
            "d1": (Target.DEVICE, ["stage", "device", "--name", "d1", *alone]),
            "d2": (Target.DEVICE, ["stage", "device", "--name", "d2", *far]),
        }


def run(*, quick: bool = False, peer_python: Path | None = None, seed: int = 0, progress: Progress) -> dict[str, Any]:
    """Measure on a broker of its own. `peer_python` is a Python with mlserver or kserve. Raises `DeeparError`."""
    effort = QUICK if quick else Effort()
    folder = Path(tempfile.mkdtemp(prefix="deepar-serve-"))
    progress(f"logs of the processes, kept if something fails: {folder}")
    write_wide_model(wide := folder / f"{LARGE}.tflite")
    with contextlib.ExitStack() as stack:
        peers = _started_peers(stack, peer_python, load_model(SMALL), folder, progress)
        broker = KafkaBroker(folder / "kafka", started_by="started by deepar loadgen bench serve", progress=progress)
        stack.callback(broker.kill)
        progress(f"{broker.kind} is ready after {broker.start():.1f} s")
        found = run_on_uvloop(_measure(effort, seed, folder, wide, broker, peers, progress))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _started_peers(
    stack: contextlib.ExitStack, python: Path | None, model: Model, folder: Path, progress: Progress
) -> list[Peer]:
    if python is None:
        progress("no peers: pass --peer-python, a Python with mlserver or kserve and ai-edge-litert")
        return []
    packages = [name for name in ("mlserver", "kserve") if has(python, name)]
    if not packages:
        raise ConfigError(f"--peer-python {python}: it has neither mlserver nor kserve")
    known: dict[str, Callable[..., contextlib.AbstractContextManager[Peer]]] = {
        "mlserver": partial(mlserver, workers=None),
        "mlserver-inline": partial(mlserver, name="mlserver-inline", workers=0),
        "kserve": kserve,
    }
    started = []
    for name, start in known.items():
        if name.partition("-")[0] in packages:
            progress(f"starting {name}")
            started.append(stack.enter_context(start(python, model.name, model.path, folder / name)))
    return started


async def _measure(
    effort: Effort,
    seed: int,
    folder: Path,
    wide: Path,
    broker: KafkaBroker,
    peers: Sequence[Peer],
    progress: Progress,
) -> dict[str, Any]:
    region = ServingRegion(wide, free_port(), free_port(), free_port())
    watch = BusynessWatch()
    # Our own broker needs no password, so the connection settings of the environment are ignored.
    async with KafkaBus(KafkaConnection.from_env({}, bootstrap_servers=broker.bootstrap)) as bus:
        await create_missing_topics(bus, ["e1"])
        async with LiveRegion(region, folder, broker.bootstrap, broker) as live:
            await await_planner(bus, 0, timeout_s=READY_S)
            await await_nodes(bus, 0, ("d1", "d2", "e1", "c1"), timeout_s=READY_S)
            live.check()
            await _endpoints_ready(region)
            rng = np.random.default_rng(seed)
            models = {name: load_model(name) for name in (SMALL,)} | {LARGE: load_model(str(wide))}
            inputs = {name: _sample(model, rng) for name, model in models.items()}
            cases = _cases(region, peers, models, inputs, live.pid("d1"))
            progress(f"{len(cases)} cases, {effort.rounds} rounds of {effort.seconds:g} s each")
            async with watch:
                await asyncio.to_thread(play, cases, rounds=effort.rounds, seconds=effort.seconds, progress=progress)
                streams = await _streams(region, inputs[SMALL], effort.stream_s, live.pid("d2"), progress)
            live.check()
            for name in ("d1", "d2", "e1", "c1", "p1"):
                live.signal(name, signal.SIGTERM)
            await asyncio.gather(*(live.gone(name, 10.0) for name in ("d1", "d2", "e1", "c1", "p1")))
    seen = watch.seen()
    streamed = [one.as_row(SMALL, inputs[SMALL].nbytes) for one in streams]
    return {
        "bench": "serve",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": rows(cases),
        "streams": streamed,
        "aims": aims(cases, streams),
        "seed": seed,
        "busyness": seen.as_json(),
        "judgeable": not seen.too_busy,
        "note": "the machine was too busy to judge" if seen.too_busy else "",
    }


async def _endpoints_ready(region: ServingRegion) -> None:
    for port in (region.alone_rest, region.far_rest):
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            until_s = time.monotonic() + READY_S
            while not await client.ready():
                if time.monotonic() > until_s:
                    raise DeeparError(f"the endpoint at port {port} did not become ready within {READY_S:g} s")
                await asyncio.sleep(0.1)


def _sample(model: Model, rng: np.random.Generator) -> Array:
    spec = model.manifest.cuts[0].tensors[0]
    return rng.random(spec.shape, dtype=np.float32)


def _cases(
    region: ServingRegion, peers: Sequence[Peer], models: dict[str, Model], inputs: dict[str, Array], pid: int
) -> list[Case]:
    return [
        *_our_cases(region, models, inputs, pid),
        *(case for peer in peers for case in _peer_cases(peer, models[SMALL], inputs[SMALL])),
        *(_interpreter_case(models[name], inputs[name]) for name in (SMALL, LARGE)),
    ]


def _our_cases(region: ServingRegion, models: dict[str, Model], inputs: dict[str, Array], pid: int) -> Iterator[Case]:
    rest, grpc = ("127.0.0.1", region.alone_rest), ("127.0.0.1", region.alone_grpc)
    for name, model in ((name, models[name]) for name in (SMALL, LARGE)):
        question = _question(model, inputs[name], {"placement": "device"})
        makers: dict[str, MakeCaller] = {"rest-binary": partial(RestCaller, rest, question, binary=True)}
        if find_spec("grpc") is not None:
            makers["grpc"] = partial(GrpcCaller, grpc, question)
        if name == SMALL:
            makers["rest-json"] = partial(RestCaller, rest, question, binary=False)
        for protocol, make in makers.items():
            for concurrency in CONCURRENCIES if protocol != "rest-json" else (1,):
                size = inputs[name].nbytes
                yield Case(
                    protocol, "deepar", name, "device", "session", concurrency, size, make, partial(process_cpu_s, pid)
                )


def _question(model: Model, array: Array, parameters: dict[str, Any]) -> Question:
    return Question(model.name, model.manifest.cuts[0].tensors[0].name, array, parameters)


def _peer_cases(peer: Peer, model: Model, array: Array) -> Iterator[Case]:
    question = _question(model, array, {})
    makers: dict[str, MakeCaller] = {"rest-json": partial(RestCaller, peer.rest, question, binary=False)}
    if find_spec("grpc") is not None:
        makers["grpc"] = partial(GrpcCaller, peer.grpc, question)
    for protocol, make in makers.items():
        for concurrency in CONCURRENCIES:
            cpu_s = partial(process_cpu_s, peer.pid)
            yield Case(protocol, peer.name, model.name, "", "request", concurrency, array.nbytes, make, cpu_s)


def _interpreter_case(model: Model, array: Array) -> Case:
    make = partial(InterpreterCaller, model, array)
    return Case(
        "in-process", "interpreter", model.name, "", "request", 1, array.nbytes, make, partial(process_cpu_s, None)
    )


def process_cpu_s(pid: int | None) -> float:
    """Processor time of a process and the processes that it started; of this process alone for None."""
    if pid is None:
        return time.process_time()
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S + sum(process_cpu_s(int(child)) for child in started)


async def _streams(region: ServingRegion, array: Array, seconds: float, pid: int, progress: Progress) -> list[Stream]:
    found = []
    for mode in ("session", "request"):
        progress(f"{RATE_HZ:g} frames a second for {seconds:g} s: mode {mode}")
        found.append(
            await stream(
                f"http://127.0.0.1:{region.far_rest}",
                SMALL,
                array,
                mode=mode,
                rate_hz=RATE_HZ,
                seconds=seconds,
                cpu_s=partial(process_cpu_s, pid),
            )
        )
    return found
