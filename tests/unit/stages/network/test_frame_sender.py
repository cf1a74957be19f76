"""What leaves a stage: in order, shaped, sent again from the beginning where the bus failed, acknowledged once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from bus.errors import MessageTooLargeError, ProtocolError
from bus.frames import AttemptPlan, Frame, FrameKind, decode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.memory.faults import Faults
from bus.tensors import Assembler, Encoded, TensorHead
from bus.topics import TopicSpec
from bus.values import Codec, Execution, Kind, Placement
from loadgen.sim.virtual_loop import run_virtual
from stages.network.frame_sender import Destination, FrameSender, Outgoing, SenderHooks, sending
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.shaper import Link
from stages.network.trace import parse_trace

PLAN = AttemptPlan(
    task_id="t",
    attempt=1,
    region=0,
    device="d",
    model="m",
    sha256="0" * 64,
    samples=20,
    todo=20,
    execution=Execution.STREAMING,
    placement=Placement(
        kind=Kind.EDGE, edge="e", cut1=0, cut2=1, cut1_name="input", cut2_name="all", link1_bps=1_000_000
    ),
)


def frame_sender_of(
    bus: MemoryBus,
    on_acknowledged: Callable[[Sequence[int]], None],
    network: PlayedNetwork = NO_NETWORK,
    gate: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
    *,
    link: Link | None = None,
) -> FrameSender:
    link = link or Link(network=network)
    return FrameSender(
        bus,
        PLAN,
        Destination("link1", "out", "t", "activations", (link.grant(1_000_000),)),
        SenderHooks(gate=gate, on_busy=lambda begin_s, end_s: None, on_acknowledged=on_acknowledged),
        source="d",
    )


async def _send(
    sizes: list[int], faults: Faults | None = None, network: PlayedNetwork = NO_NETWORK
) -> tuple[Counter[int], dict[int, bytes], int, int]:
    """Acknowledgements by sample, what arrived, plans seen, samples sent again."""
    broker = MemoryBroker(latency_s=0.001)
    acknowledged: Counter[int] = Counter()
    async with MemoryBus(broker) as bus:
        await bus.create_topics([TopicSpec("out", 1)])
        sender = frame_sender_of(bus, acknowledged.update, network)  # the bus must hold all of a sample by then
        broker.faults = faults
        reader = await bus.reader([("out", 0)], start="start")
        arrived: dict[int, bytes] = {}
        plans = 0
        assembler = Assembler()

        async with asyncio.timeout(600.0), sending(sender):
            for sample, size in enumerate(sizes):
                sender.put(Outgoing(sample, [np.full(size, sample, np.uint8)], 0.0))
            while len(acknowledged) < len(sizes):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
        while await reader.lag():
            for record in await reader.fetch():
                frame = decode_frame(record.value)
                plans += frame.plan is not None
                for piece in frame.pieces:
                    if piece.sample in arrived:
                        continue
                    with contextlib.suppress(ProtocolError):  # a gap: the sample begins again further on
                        if isinstance(whole := assembler.add(piece), list):
                            arrived[piece.sample] = whole[0].tobytes()
        return acknowledged, arrived, plans, sender.resent


async def _frames_of(samples: Sequence[Outgoing], rate_bps: int) -> list[Frame]:
    """The frames in which samples leave that wait together."""
    async with MemoryBus(MemoryBroker()) as bus:
        await bus.create_topics([TopicSpec("out", 1)])
        reader = await bus.reader([("out", 0)], start="start")
        sender = FrameSender(
            bus,
            PLAN,
            Destination("link1", "out", "t", "activations", (Link().grant(rate_bps),)),
            SenderHooks(
                gate=lambda: asyncio.sleep(0), on_busy=lambda begin_s, end_s: None, on_acknowledged=lambda samples: None
            ),
            source="d",
        )
        for sample in samples:
            sender.put(sample)
        frames: list[Frame] = []
        async with sending(sender):
            while sum(piece.at + piece.data.nbytes == piece.size_bytes for one in frames for piece in one.pieces) < len(
                samples
            ):
                frames += [decode_frame(record.value) for record in await reader.fetch()]
        return frames


def encoded(sample: int, size: int) -> Outgoing:
    return Outgoing(sample, Encoded(Codec.Q8, (TensorHead("float32", (size,)),), memoryview(bytes(size))), 0.0)


def test_encoded_samples_of_other_sizes_than_the_first_leave_in_equal_pieces() -> None:
    async def run() -> None:
        sizes = [40_000, 49_000, 30_000, 150_000, 3_000, 0]
        samples = [encoded(number, size) for number, size in enumerate(sizes)]
        found: dict[int, list[int]] = {}
        for one in await _frames_of(samples, 20_000_000):
            for piece in one.pieces:
                found.setdefault(piece.sample, []).append(piece.data.nbytes)
        assert [sum(found[number]) for number in range(len(sizes))] == sizes
        assert [len(found[number]) for number in range(len(sizes))] == [2, 2, 2, 6, 1, 1]
        assert all(max(pieces) - min(pieces) < len(pieces) for pieces in found.values())

    run_virtual(run())


def test_frames_of_several_routes_have_room_for_the_descriptions_of_many_tensors() -> None:
    async def run() -> None:
        tensors = [np.zeros((1, 1, 1, 2), np.float32) for _ in range(12)]
        samples = [Outgoing(number, tensors, 0.0, number % 2) for number in range(1000)]
        frames = await _frames_of(samples, 10_000_000_000)
        assert len(frames) < 40

    run_virtual(run())


@pytest.mark.parametrize("seed", range(10))
def test_a_latency_changes_nothing_of_that(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([5, 900, 12_000]) for _ in range(20)]
    faults = Faults(random=random.Random(seed), lost_ack=0.1, lost_post=0.1, duplicate=0.05, late=0.2, late_s=0.05)
    acknowledged, arrived, plans, resent = run_virtual(_send(sizes, faults, PlayedNetwork(0.05)))
    assert acknowledged == Counter(dict.fromkeys(range(20), 1))
    assert arrived == {sample: bytes([sample]) * size for sample, size in enumerate(sizes)}
    assert resent > 0
    assert plans > 1


def test_frames_in_flight_overlap_and_keep_their_order() -> None:
    """A latency of 0.3 s delays twenty frames by 0.3 s, not by 6 s; no frame overtakes others where the latency falls."""

    async def run(network: PlayedNetwork) -> list[tuple[int, float]]:
        clock = asyncio.get_running_loop().time
        async with MemoryBus(MemoryBroker()) as bus:
            await bus.create_topics([TopicSpec("out", 1)])
            reader = await bus.reader([("out", 0)], start="start")
            came: list[tuple[int, float]] = []
            sender = frame_sender_of(bus, lambda samples: None, network)
            async with asyncio.timeout(60.0), sending(sender):
                for sample in range(20):
                    sender.put(Outgoing(sample, [np.zeros(1_250, np.uint8)], 0.0))
                while sum(1 for _ in came) < 20:
                    for record in await reader.fetch():
                        came += [(piece.sample, clock()) for piece in decode_frame(record.value).pieces]
            return came

    near, far = run_virtual(run(PlayedNetwork())), run_virtual(run(PlayedNetwork(0.3)))
    assert [sample for sample, _ in far] == [sample for sample, _ in near] == list(range(20))
    assert [late - early for (_, early), (_, late) in zip(near, far, strict=True)] == pytest.approx([0.3] * 20)
    falling = parse_trace("falling", ["t_s,bps,latency_s", "0,1000000,0.5", "0.1,1000000,0.01", "9,1000000,0.01"])
    overtaken = run_virtual(run(PlayedNetwork(trace=falling)))
    assert [sample for sample, _ in overtaken] == list(range(20))
    assert overtaken[0][1] == pytest.approx(near[0][1] + 0.5)
    assert overtaken[-1][1] < near[-1][1] + 0.5


def test_a_frame_in_flight_waits_for_the_gate_and_one_of_a_stopped_sender_never_arrives() -> None:
    async def run() -> tuple[int, int, int]:
        open_again = asyncio.Event()
        open_again.set()

        async def gate() -> None:
            await open_again.wait()

        async with MemoryBus(MemoryBroker()) as bus:
            await bus.create_topics([TopicSpec("out", 1)])
            sender = frame_sender_of(bus, lambda samples: None, PlayedNetwork(1.0), gate)
            posted = []

            async def count() -> None:
                posted.append((await bus.end_offsets("out"))[0])

            async with sending(sender):
                sender.put(Outgoing(0, [np.zeros(10, np.uint8)], 0.0))
                await asyncio.sleep(0.5)
                open_again.clear()
                await asyncio.sleep(1.0)
                await count()
                open_again.set()
                await asyncio.sleep(0.1)
                await count()
                sender.put(Outgoing(1, [np.zeros(10, np.uint8)], 0.0))
                assert sender.held_bytes >= 10
                await asyncio.sleep(0.5)
            await asyncio.sleep(5.0)
            await count()
            return posted[0], posted[1], posted[2]

    assert run_virtual(run()) == (0, 1, 1)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_sender_that_is_idle_or_stopped_leaves_a_traced_link_to_the_others(stopped: bool) -> None:
    """The link carries 80 kbit/s. The other sender has had a share of it, and now has nothing to send or has ended."""
    flat = parse_trace("flat", ["t_s,bps", "0,80000", "100,80000"])

    async def run() -> float:
        clock = asyncio.get_running_loop().time
        link = Link(network=PlayedNetwork(trace=flat))
        async with MemoryBus(MemoryBroker()) as bus, contextlib.AsyncExitStack() as stack:
            await bus.create_topics([TopicSpec("out", 1)])
            other = frame_sender_of(bus, lambda samples: None, link=link)
            async with contextlib.AsyncExitStack() as inner:
                await inner.enter_async_context(sending(other))
                other.put(Outgoing(0, [np.zeros(500_000 if stopped else 100, np.uint8)], 0.0))
                await asyncio.sleep(1.0)
                if not stopped:
                    stack.push_async_exit(inner.pop_all())
            acknowledged = asyncio.Event()
            sender = frame_sender_of(bus, lambda samples: acknowledged.set(), link=link)
            begin_s = clock()
            async with asyncio.timeout(60.0), sending(sender):
                sender.put(Outgoing(0, [np.zeros(10_000, np.uint8)], begin_s))
                await acknowledged.wait()
            return clock() - begin_s

    assert 1.0 < run_virtual(run()) < 1.2  # 10 kB and the heads of frames, at the full rate


def test_every_sample_is_acknowledged_once_and_whole() -> None:
    sizes = [10, 20_000, 500, 3, 40_000, 7]
    acknowledged, arrived, plans, resent = run_virtual(_send(sizes))
    assert acknowledged == Counter(dict.fromkeys(range(6), 1))
    assert arrived == {sample: bytes([sample]) * size for sample, size in enumerate(sizes)}
    assert (plans, resent) == (1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_failed_sends_begin_the_sample_again_and_nothing_is_acknowledged_twice_or_before_it_is_there(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([5, 900, 12_000]) for _ in range(20)]
    faults = Faults(random=random.Random(seed), lost_ack=0.1, lost_post=0.1, duplicate=0.05, late=0.2, late_s=0.05)
    acknowledged, arrived, plans, resent = run_virtual(_send(sizes, faults))
    assert acknowledged == Counter(dict.fromkeys(range(20), 1))
    assert arrived == {sample: bytes([sample]) * size for sample, size in enumerate(sizes)}
    assert resent > 0
    assert plans > 1, "who reads from here on must find the plan"


@pytest.mark.parametrize(("kind", "frames"), [("activations", [7, 6, 3, 2, 1, 1]), ("result", [7, 7, 6])])
def test_the_last_samples_leave_in_ever_smaller_frames_where_somebody_computes_next(
    kind: FrameKind, frames: list[int]
) -> None:
    async def run() -> list[int]:
        async with MemoryBus(MemoryBroker()) as bus:
            await bus.create_topics([TopicSpec("out", 1)])
            sender = FrameSender(
                bus,
                PLAN,
                Destination("link1", "out", "t", kind, (Link().grant(16_000_000),)),
                SenderHooks(
                    gate=lambda: asyncio.sleep(0),
                    on_busy=lambda begin_s, end_s: None,
                    on_acknowledged=lambda samples: None,
                ),
                source="d",
            )
            async with asyncio.timeout(10.0), sending(sender):
                for sample in range(PLAN.todo):
                    sender.put(Outgoing(sample, [np.zeros(4_000, np.uint8)], 0.0))
                await asyncio.sleep(1.0)
            reader = await bus.reader([("out", 0)], start="start")
            return [len(decode_frame(record.value).pieces) for record in await reader.fetch()]

    assert run_virtual(run()) == frames


def test_what_can_never_be_sent_ends_the_block_instead_of_hanging() -> None:
    async def run() -> None:
        async with MemoryBus(MemoryBroker(max_record_bytes=1_000)) as bus:
            await bus.create_topics([TopicSpec("out", 1)])
            sender = frame_sender_of(bus, lambda samples: None)
            async with asyncio.timeout(10.0), sending(sender):
                sender.put(Outgoing(0, [np.zeros(5_000, np.uint8)], 0.0))
                await asyncio.Event().wait()

    with pytest.raises(MessageTooLargeError):
        run_virtual(run())
