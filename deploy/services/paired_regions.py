"""The regions of the regret benchmark as real processes on a broker of their own (`loadgen.bench.choices.rounds.Testbed`).

Each cell gets two new regions with the same processes: in one the planner learns and decides as `deepar`, in the other it
runs the fixed policies. The nodes are slowed down, so that three machines of different speeds share this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import BusUnavailableError
from bus.kafka.bus import KafkaBus
from bus.messages import Decision, Learned
from bus.port import Bus
from deploy.kafka_local.broker import KafkaBroker
from deploy.services.live_region import LiveRegion
from loadgen.bench.choices.regret import Cell, Network
from loadgen.bench.choices.rounds import Site, Sites
from loadgen.chaos.live.faults import Target
from loadgen.replay.readiness import FETCH_S, await_nodes, await_planner

SLOWDOWN = {"device": 8.0, "edge": 4.0, "cloud": 2.0}
"""Each is slower than this machine, so that the delays follow the emulated pace instead of this machine's other load."""

READY_S = 90.0  # for all processes of a cell, model files and first measurement included
LINKS_S = 8.0  # for the first measurement of the links; without it the tasks begin anyhow
SETTLE_S = 1.0  # before the first task, so that the load of the starts is over
STOP_S = 10.0  # for a clean stop; a cloud worker that is killed keeps its partitions until its session expires


@dataclass(frozen=True, slots=True)
class RegionPair:
    """The processes of one cell: regions `first` and `first + 1`."""

    network: Network
    model: str
    first: int  # the learning region; the fixed policies' region is the next one

    @property
    def nodes(self) -> dict[int, tuple[str, str, str]]:
        """Region -> its device, edge and cloud worker. Edges name topics, so names are unique on the broker."""
        return {region: (f"d{region}", f"e{region}", f"c{region}") for region in (self.first, self.first + 1)}

    def commands(self, folder: Path) -> dict[str, tuple[Target, list[str]]]:
        """Process name -> its role and the arguments of `deepar`."""
        found: dict[str, tuple[Target, list[str]]] = {}
        for region, (device, edge, cloud) in self.nodes.items():
            where = ["--region", str(region)]
            by_name = ["--no-learn", "--policy", "loadgen.bench.choices.policy_by_name:PolicyByName"]
            policy = [] if region == self.first else by_name
            planner = ["planner", "--name", f"p{region}", *policy, *where]
            found[f"p{region}"] = (Target.PLANNER, planner)
            link1, link2 = self.network.link1, self.network.link2
            far1, far2 = (
                ["--link1-latency", self.network.link1_latency],
                ["--link2-latency", self.network.link2_latency],
            )
            words = [*self._stage("device", device), "--edge", edge, "--link", link1, *far1, *where]
            found[device] = (Target.DEVICE, words)
            words = [*self._stage("edge", edge), "--link1", link1, "--link2", link2, *far2, *where]
            found[edge] = (Target.EDGE, words)
            found[cloud] = (Target.CLOUD, [*self._stage("cloud", cloud), *far2, *where])
        return found

    def _stage(self, role: str, name: str) -> list[str]:
        return ["stage", role, "--name", name, "--model", self.model, "--slowdown", str(SLOWDOWN[role])]


class PairedRegions:
    """Starts the processes of one cell after another."""

    def __init__(self, bus: KafkaBus, broker: KafkaBroker, folder: Path) -> None:
        self._bus = bus
        self._broker = broker
        self._folder = folder
        self._next = 0  # number of the next new region

    @contextlib.asynccontextmanager
    async def regions(self, cell: Cell) -> AsyncIterator[Sites]:
        """New regions whose nodes have joined; they end with the block. Raises `BusUnavailableError` if a node is missing."""
        pair = RegionPair(cell.network, cell.model, self._next)
        self._next += 2
        async with LiveRegion(pair, self._folder, self._broker.bootstrap, self._broker) as region:
            try:
                await asyncio.gather(*(self._ready(number, names) for number, names in pair.nodes.items()))
                region.check()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINKS_S):
                        await _links_learned(self._bus, pair.first)
                await asyncio.sleep(SETTLE_S)
                learning, fixed = (Site(self._bus, number, names[0]) for number, names in pair.nodes.items())
                yield Sites(learning, fixed)
                region.check()
            finally:
                await _stop(region, list(pair.commands(self._folder)))

    async def _ready(self, number: int, names: tuple[str, ...]) -> None:
        until_s = time.monotonic() + READY_S
        while True:
            try:
                await await_planner(self._bus, number, timeout_s=READY_S)
                return await await_nodes(self._bus, number, names, timeout_s=READY_S)
            except BusUnavailableError:  # a broker that makes hundreds of partitions does not answer for a while
                if time.monotonic() > until_s:
                    raise


async def _links_learned(bus: Bus, region: int) -> None:
    """Wait until the planner knows the latency of both links, as in a region that has run for some seconds."""
    log = DecisionLog()
    seen: set[int] = set()
    reader = await bus.reader([(topics.DECISIONS, region)], start="start")
    try:
        while len(seen) < 2:
            for record in await reader.fetch(timeout_s=FETCH_S):
                message = log.read(record)
                if isinstance(message, Decision):
                    learned = (change for change in message.changes if isinstance(change, Learned))
                    seen |= {link.link for change in learned for link in change.links}
    finally:
        await reader.close()


async def _stop(region: LiveRegion, names: list[str]) -> None:
    """Ask all processes to stop and wait for them; the region kills those that remain."""
    for name in names:
        with contextlib.suppress(ProcessLookupError):
            region.signal(name, signal.SIGTERM)
    await asyncio.gather(*(region.gone(name, STOP_S) for name in names))
