"""Fault injector for simulated regions: draws faults from the seed; consecutive faults often overlap."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import zstandard

from bus import messages, topics
from bus.errors import BusError, ProtocolError
from bus.frames import Frame, decode_frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.memory.faults import Faults
from bus.memory.partition_log import PartitionLog
from bus.messages import Snapshot, SnapshotPart, TaskCancelled, TaskSubmitted
from bus.snapshots import PLACES, key_of
from bus.tensors import Piece
from loadgen.chaos.simulated.region import LEASE_S, ChaosScenario
from loadgen.sim.process import Process
from planner.core.core import PlannerCore

NO_MESSAGE = b"\xc1 no message"
GARBAGE = (b"\x80", b"", b"{}", b"\xc1" * 100, b'{"type":"task_submitted","v":9}', b"\x81\xa1v\x02")
BOMBS = 3
BOMB = zstandard.ZstdCompressor().compress(bytes(4 << 20))
"""A few hundred bytes that decompress to 4 MiB."""
RARER = {"rebalance": 0.2, "redelivery": 0.2}
"""Factors of the probabilities of faults that strike fetches: more of them than records would leave no time for work."""
CLOCK_S = 600.0
"""Maximum initial skew and maximum jump of a wall clock."""
CONTROL = (topics.TASKS, topics.EVENTS, topics.NODES, topics.DECISIONS, topics.SNAPSHOTS)


class Breaker:
    """Injects the faults of a seed into a region and counts them by kind."""

    def __init__(
        self,
        draw: random.Random,
        scenario: ChaosScenario,
        broker: MemoryBroker,
        processes: list[Process],
        note: Callable[..., None],
        sessions: Sequence[TaskSubmitted] = (),
    ) -> None:
        """`sessions` grows while the region runs."""
        self._sessions = sessions
        self.counted: Counter[str] = Counter()
        self.poisoned: set[str] = set()  # tasks that may fail because of injected records
        self.forged: Counter[str] = Counter()  # task -> samples that were written beside its own
        self.missed: set[str] = set()  # tasks that permanently lost a record
        self.cancelled: set[str] = set()
        self.dead_letters: list[str] = []  # origins of the records that must be dead-lettered
        self.last_dead_letters = 0  # how many of them were produced after healing
        self.lossy = False  # whether sends failed at any time; dead letters may be missing then
        self._draw = draw
        self._scenario = scenario
        self._broker = broker
        self._processes = processes
        self._note = note
        self._healed = False
        self._to_damage = 0
        self._spent: Counter[str] = Counter()  # fault counts of replaced `Faults` values
        self._clock_draw = random.Random(draw.random())
        self._off_s: dict[str, float] = {}
        self._busy: set[asyncio.Task[None]] = set()

    # --- clocks ------------------------------------------------------------------------------------------------------

    def wall_clock(self, name: str) -> Callable[[], float]:
        """The skewed wall clock of a node; no decision may depend on it."""
        time = asyncio.get_running_loop().time
        if not self._scenario.clocks:
            return lambda: 1e9 + time()
        if name not in self._off_s:
            self._off_s[name] = self._clock_draw.uniform(-CLOCK_S, CLOCK_S)
        return lambda: 1e9 + time() + self._off_s[name]

    # --- the schedule ------------------------------------------------------------------------------------------------

    async def play(self, client: MemoryBus) -> None:
        """Inject all faults and return after the last pause."""
        draw, scenario = self._draw, self._scenario
        count = draw.randint(*scenario.faults)
        kinds = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
        for _ in range(count):
            await asyncio.sleep(draw.expovariate(count / scenario.faults_s))
            kind = draw.choice(kinds)
            process = draw.choice(self._processes)
            self._note("fault", kind, process.name if kind in ("crash", "freeze", "cut", "terminate", "clock") else "")
            await getattr(self, f"_{kind}")(process, client)
        await asyncio.sleep(draw.random() * 5.0)

    def heal(self) -> None:
        """End all faults and restart dead processes."""
        self._note("heal")
        self._healed = True
        self._spend()
        self._broker.faults = None
        self._broker.resume()
        for process in self._processes:
            process.spare()
            if process.bus is not None:
                process.bus.reconnect()
            process.thaw()
            process.start()

    @property
    def stopping(self) -> bool:
        """Whether a process that received SIGTERM is still stopping."""
        return bool(self._busy)

    def faults(self) -> Counter[str]:
        """Number of injected faults by kind; call it after `heal`."""
        return self.counted + Counter({f"bus {kind}": times for kind, times in self._spent.items()})

    def harmed(self, task_id: str) -> bool:
        """Whether a record of this task was corrupted or permanently lost."""
        return task_id in self.poisoned or task_id in self.missed

    def _count(self, kind: str, process: Process | None = None) -> None:
        self.counted[kind if process is None else f"{kind} {role_of(process.name)}"] += 1

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _crash(self, process: Process, client: MemoryBus) -> None:
        self._count("crash", process)
        away_s = self._draw.choice([0.05, 1.0, 2.0 * LEASE_S])
        self._crash_in(process, self._draw.randrange(1, 150), away_s)

    def kill_in_batch(self, process: Process, draw: random.Random) -> None:
        """Kill a process a few steps after it began to compute a batch."""
        if not self._healed:
            self._count("crash in a batch:", process)
            self._note("fault", "crash in a batch", process.name)
            self._crash_in(process, draw.randrange(1, 8), draw.choice([0.05, 1.0, 2.0 * LEASE_S]))

    def _crash_in(self, process: Process, steps: int, away_s: float) -> None:
        loop = asyncio.get_running_loop()

        def restart() -> None:
            self._note("dead", process.name)
            loop.call_later(away_s, process.start)

        process.crash_in(steps, restart)

    async def _freeze(self, process: Process, client: MemoryBus) -> None:
        pause_s = self._draw.uniform(0.2, 2.5 * LEASE_S)
        self._count("freeze" if pause_s <= LEASE_S else "freeze beyond a lease:", process)
        process.freeze()
        asyncio.get_running_loop().call_later(pause_s, process.thaw)

    async def _cut(self, process: Process, client: MemoryBus) -> None:
        if self._cut_off(process, self._draw.uniform(0.2, 2.5 * LEASE_S)):
            self._count("cut", process)

    async def _split(self, process: Process, client: MemoryBus) -> None:
        """Partition several processes from the broker at the same time."""
        self._count("split")
        away_s = self._draw.uniform(0.2, 2.5 * LEASE_S)
        for other in self._draw.sample(self._processes, len(self._processes) // 2):
            self._cut_off(other, away_s)

    def _cut_off(self, process: Process, away_s: float) -> bool:
        bus = process.bus
        if bus is None or process.dead or process.frozen:
            return False
        bus.disconnect()
        asyncio.get_running_loop().call_later(away_s, bus.reconnect)
        return True

    async def _terminate(self, process: Process, client: MemoryBus) -> None:
        self._count("terminate", process)
        loop = asyncio.get_running_loop()
        away_s = self._draw.choice([0.5, 6.0])

        async def stop() -> None:
            await process.stop()
            loop.call_later(away_s, process.start)

        task = loop.create_task(stop())
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)

    async def _clock(self, process: Process, client: MemoryBus) -> None:
        self._count("clock jumps")
        self._off_s[process.name] = self._off_s.get(process.name, 0.0) + self._clock_draw.uniform(-CLOCK_S, CLOCK_S)

    # --- the bus -----------------------------------------------------------------------------------------------------

    async def _broker_stop(self, process: Process, client: MemoryBus) -> None:
        self._count("broker stop")
        self._broker.pause()
        asyncio.get_running_loop().call_later(self._draw.uniform(0.2, 9.0), self._broker.resume)

    async def _bus(self, process: Process, client: MemoryBus) -> None:
        draw = self._draw
        kinds = ("lost_ack", "lost_post", "duplicate", "rebalance", "redelivery", "stale_commit", "late")
        chosen: dict[str, Any] = {
            kind: draw.choice([0.02, 0.1, 0.3]) * RARER.get(kind, 1.0)
            for kind in draw.sample(kinds, draw.randint(1, 4))
        }
        self.lossy = self.lossy or "lost_ack" in chosen or "lost_post" in chosen
        self._spend()
        self._broker.faults = Faults(
            random=random.Random(draw.random()),
            late_s=0.05,
            damages=self._damages,
            on_damage=self._damaged,
            **chosen,
        )

    async def _missing(self, process: Process, client: MemoryBus) -> None:
        """Lose a few activation or result records permanently."""
        self._damage(missing=0.3)

    async def _corrupt(self, process: Process, client: MemoryBus) -> None:
        """Corrupt an activation or result record."""
        self._damage(corrupt=0.3)

    def _damage(self, **chance: float) -> None:
        faults = self._broker.faults
        if faults is None:
            faults = Faults(random=random.Random(self._draw.random()), damages=self._damages, on_damage=self._damaged)
        self._to_damage = self._draw.choice([1, 1, 2])
        self._broker.faults = replace(faults, **{"missing": 0.0, "corrupt": 0.0} | chance)  # type: ignore[arg-type]

    def _damages(self, topic: str, key: str | None, data: bytes) -> bool:
        if data in (*GARBAGE, NO_MESSAGE):  # a lost record cannot be dead-lettered
            return False
        return self._to_damage > 0 and (topic == topics.RESULTS or topic.startswith("deepar.activations."))

    def _damaged(self, kind: str, topic: str, key: str | None, data: bytes) -> None:
        self._to_damage -= 1
        task_id = key or ""
        with contextlib.suppress(ProtocolError):
            task_id = decode_frame(data).task_id
        self.missed.add(task_id)
        if kind == "corrupt" and topic != topics.RESULTS:
            self.poisoned.add(task_id)
        self._note(kind, topic, task_id)

    def _spend(self) -> None:
        if self._broker.faults is not None:
            self._spent += self._broker.faults.times
            self._broker.faults.times.clear()

    def _any_task(self) -> str:
        """A task of the client, or the latest session of a camera."""
        number = self._draw.randrange(self._scenario.tasks)
        return self._sessions[-1].task_id if self._sessions and number % 3 == 0 else f"t{number}"

    # --- records -----------------------------------------------------------------------------------------------------

    async def _poison(self, process: Process, client: MemoryBus) -> None:
        """Put an unreadable record on a topic; if its key is a task id, that task may fail because of it."""
        draw = self._draw
        task_id = self._any_task()
        topic = draw.choice([*CONTROL, topics.RESULTS, *self._data_topics()])
        key = f"d{draw.randrange(self._scenario.devices) + 1}" if topic == topics.RESULTS else task_id
        if topic in self._data_topics():
            self.poisoned.add(task_id)
        await self._put(client, topic, draw.choice(GARBAGE), key, "poison")

    async def bomb(self, client: MemoryBus, draw: random.Random) -> None:
        """Write, a few times, a sample whose payload claims to be small and decompresses to a lot.

        It copies the head of an encoded sample that was sent; the task may fail because of it.
        """
        for _ in range(BOMBS):
            await asyncio.sleep(draw.random() * self._scenario.faults_s / BOMBS)
            found = [(log.tp[0], frame, piece) for log in self._data_logs() for frame, piece in _encoded_in(log)]
            if not found:
                continue
            topic, frame, piece = found[-1]
            sample = max(one.sample for _, other, one in found if other.task_id == frame.task_id) + draw.randint(1, 2)
            data = memoryview(b"\0" + BOMB)
            forged = piece._replace(sample=sample, size_bytes=data.nbytes, data=data, arrays=None)
            self.poisoned.add(frame.task_id)
            self.forged[frame.task_id] += 1
            self._count("codec bomb")
            self._note("fault", "codec bomb", topic, frame.task_id, sample)
            with contextlib.suppress(BusError):
                value = encode_frame(frame._replace(pieces=(forged,), plan=None, totals=()))
                await client.send(topic, value, key=frame.task_id)

    def _data_logs(self) -> list[PartitionLog]:
        return [log for topic in self._data_topics() for log in self._broker.logs(topic)]

    async def _forge(self, process: Process, client: MemoryBus) -> None:
        """Write a well-formed snapshot, or part of one, of a false state; it replaces a genuine one or is added."""
        draw = self._draw
        self._count("forged snapshot")
        empty = PlannerCore(0)  # a state that matches its hash but is not this region's state
        snapshot = Snapshot(
            region=0,
            epoch=draw.choice([1, 2, 900]),
            nonce="nobody",
            seq=draw.choice([1, 5, 10_000]),
            offset=draw.choice([0, 7, 10_000]),
            now_s=draw.choice([0.0, 1e6]),
            inputs={topics.TASKS: draw.choice([0, 10_000])},
            ledger_hash=draw.choice(["0" * 32, empty.state_hash]),
            parts=draw.choice([(), (), (), ("0" * 32,)]),
            state=draw.choice([{}, {"version": 1, "region": 0}, empty.to_state()]),
        )
        part = SnapshotPart(region=0, seq=snapshot.seq, part=1, state={"tasks": [{}]})
        place = draw.randrange(PLACES)
        places = [(snapshot, key_of(0, place)), (snapshot, "x"), (snapshot, "0"), (part, key_of(0, place, 1))]
        forged, key = draw.choice(places)
        with contextlib.suppress(BusError):
            await client.send(topics.SNAPSHOTS, messages.encode(forged), key=key, partition=0)

    async def _stale(self, process: Process, client: MemoryBus) -> None:
        """Repeat old records in a different order."""
        draw = self._draw
        topic = draw.choice([topics.TASKS, topics.RESULTS, *self._data_topics()])
        logs = self._broker.logs(topic)
        log = logs[draw.randrange(len(logs))]
        old = log.read(0, 1 << 30)
        for record in draw.sample(old, min(len(old), draw.randint(1, 6))):
            self._count("stale record")
            with contextlib.suppress(BusError):
                await client.send(topic, record.value, key=record.key, partition=record.partition)

    async def _cancel(self, process: Process, client: MemoryBus) -> None:
        task_id = self._any_task()
        self._count("cancelled")
        self.cancelled.add(task_id)
        with contextlib.suppress(BusError):
            cancelled = messages.encode(TaskCancelled(task_id=task_id))
            await client.send(topics.TASKS, cancelled, key=task_id, partition=0)

    async def garbage_everywhere(self, client: MemoryBus) -> None:
        """After healing, put one garbage record on each topic; each must be dead-lettered exactly once."""
        before = len(self.dead_letters)
        for topic in (*CONTROL, topics.RESULTS, *self._data_topics()):
            await self._put(client, topic, NO_MESSAGE, "d1" if topic == topics.RESULTS else "nobody", "garbage")
        self.last_dead_letters = len(self.dead_letters) - before

    async def _put(self, client: MemoryBus, topic: str, value: bytes, key: str, kind: str) -> None:
        self._count(f"{kind} on {topic.removeprefix('deepar.')}")
        partition = 0 if topic in CONTROL else None
        with contextlib.suppress(BusError):
            position = await client.send(topic, value, key=key, partition=partition)
            if kind == "garbage" or topic != topics.RESULTS:  # a device skips results that arrive while it is down
                self.dead_letters.append(f"{position.topic}/{position.partition}/{position.offset}")

    def _data_topics(self) -> list[str]:
        return [topics.ACTIVATIONS_CLOUD, *(topics.activations_topic(edge) for edge in self._scenario.edge_names)]


def _encoded_in(log: PartitionLog) -> Iterator[tuple[Frame, Piece]]:
    """The encoded samples on a partition whose heads are known, with their frames."""
    for record in log.read(0, 1 << 30):
        with contextlib.suppress(ProtocolError):
            frame = decode_frame(record.value)
            yield from ((frame, piece) for piece in frame.pieces if piece.encoded is not None and piece.at == 0)


WEIGHTS = {
    "crash": 6,
    "freeze": 4,
    "cut": 2,
    "split": 1,
    "broker_stop": 2,
    "terminate": 2,
    "bus": 6,
    "missing": 2,
    "corrupt": 1,
    "stale": 2,
    "poison": 3,
    "forge": 2,
    "cancel": 1,
    "clock": 1,
}
"""Relative weight of each fault kind."""


def role_of(name: str) -> str:
    """Role of a process, derived from the first letter of its name."""
    return {"p": "planner", "d": "device", "e": "edge", "c": "cloud"}[name[0]]
