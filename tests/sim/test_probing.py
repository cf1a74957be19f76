"""Probes in a region: what nodes measure of their links and report, and what hostile probes do. Virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from bus import messages, topics
from bus.frames import Frame, decode_frame, encode_frame
from bus.identity.keys import Master
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import LinkMeasurement, NodeHeartbeat, TaskCompleted, TaskState
from bus.values import Objective, Role
from deploy.commands.kafka.dead_letter import read_dead_letters
from deploy.services import wiring as nodes
from loadgen.sim.virtual_loop import run_virtual
from stages.measuring.peers import LinkToPeers, ProbingNode
from stages.measuring.probes import FIRST_PROBES, REFRESH_S, Prober
from stages.membership.settings import NodeSettings
from stages.network.played import PlayedNetwork
from stages.network.shaper import Link
from stages.network.trace import parse_trace
from stages.node import Node
from stages.runner import ModelledRunner
from tests.sim.world import World, WorldOptions, profile, task, world

BUS_S = 0.002
"""What the bus takes for one record."""
LINK1_S, LINK2_S = 0.030, 0.020
NETWORKS = {
    "d1": PlayedNetwork(LINK1_S),
    **{name: PlayedNetwork(LINK2_S) for name in ("e1", "e2", "c1")},
}
FRAMES = Master(bytes(range(32)), frames=True)


def events(region: World) -> list[Any]:
    return [
        messages.decode(topics.EVENTS, record.value)
        for log in region.broker.logs(topics.EVENTS)
        for record in log.read(0, log.end)
    ]


def reported(region: World) -> dict[tuple[str, int, str], list[LinkMeasurement]]:
    """What each node has reported of each link, in order."""
    found: dict[tuple[str, int, str], list[LinkMeasurement]] = {}
    for heartbeat in events(region):
        for one in heartbeat.links if isinstance(heartbeat, NodeHeartbeat) else ():
            found.setdefault((heartbeat.node, one.link, one.edge), []).append(one)
    return found


def probes(region: World, topic: str) -> int:
    frames = [decode_frame(record.value) for log in region.broker.logs(topic) for record in log.read(0, log.end)]
    return sum(frame.kind == "probe" for frame in frames)


@pytest.mark.parametrize("master", [None, FRAMES], ids=["open", "proven"])
def test_latencies_are_reported_within_a_second_of_joining(master: Master | None) -> None:
    async def run() -> World:
        broker = MemoryBroker(latency_s=BUS_S)
        async with world(
            WorldOptions(devices=("d1", "d2"), networks=NETWORKS, probes=True, master=master), broker=broker
        ) as region:
            await asyncio.sleep(1.0)
            assert await read_dead_letters(region.bus) == []
            return region

    found = reported(run_virtual(run()))
    assert found.keys() == {
        *((device, 1, edge) for device in ("d1", "d2") for edge in ("e1", "e2")),
        *((edge, 2, edge) for edge in ("e1", "e2")),
    }
    for (node, link, _), measured in found.items():
        latency_s = BUS_S + (LINK2_S if link == 2 else LINK1_S if node == "d1" else 0.0)
        assert measured[-1].latency_s == pytest.approx(latency_s, abs=0.001)
        assert measured[-1].deviation_s < 0.001


def test_a_device_that_joins_brings_its_latencies() -> None:
    """Else its first task would go to an edge that seems to answer at once."""

    async def run() -> set[str]:
        broker = MemoryBroker(latency_s=BUS_S)
        async with world(WorldOptions(devices=(), networks=NETWORKS, probes=True), broker=broker) as region:
            settings = NodeSettings(name="d1", role=Role.DEVICE, probes=True, network=NETWORKS["d1"])
            node = Node(region.bus, settings, ModelledRunner([profile(Role.DEVICE)]))
            serving = asyncio.create_task(node.run(nodes.make_work(node)))
            async with asyncio.timeout(5.0):
                while not node.status.joined:
                    await asyncio.sleep(BUS_S / 4)
            await asyncio.sleep(2 * BUS_S)  # one heartbeat
            serving.cancel()
            await asyncio.wait([serving])
            return {edge for device, _, edge in reported(region) if device == "d1"}

    assert run_virtual(run()) == {"e1", "e2"}


def test_an_edge_that_does_not_answer_does_not_keep_a_device_away() -> None:
    async def run() -> float:
        begin_s = asyncio.get_running_loop().time()
        async with MemoryBus(MemoryBroker(), "d1") as bus:
            probed = ProbingNode(name="d1", bus=bus, gate=_free, count=lambda name: None)
            way = LinkToPeers(probed, Link(0), topics.activations_topic, idle=lambda: True)
            prober = Prober("d1", way, lambda: None)
            prober.aim(["silent"])
            await prober.measured(1.0)
        return asyncio.get_running_loop().time() - begin_s

    assert run_virtual(run()) == pytest.approx(1.0, abs=0.01)


async def _free() -> None:
    pass


def test_the_measured_latencies_explain_the_delay_of_a_sample() -> None:
    """Sequentially, a delay is its parts and, for every sample, the way there and back."""

    async def run() -> tuple[float, float, float]:
        broker = MemoryBroker(latency_s=BUS_S)
        networks = NETWORKS | {"e1": PlayedNetwork(0.0), "c1": PlayedNetwork(0.0)}
        async with world(
            WorldOptions(
                devices=("d1",),
                edges=("e1",),
                networks=networks,
                probes=True,
                policy="edge-only",
                objective=Objective.SEQUENTIAL,
            ),
            broker=broker,
        ) as region:
            await asyncio.sleep(1.0)
            await region.replay([task(1, samples=4)])
            (done,) = [event for event in events(region) if isinstance(event, TaskCompleted)]
            return done.delay_s, done.measured.total_s, reported(region)["d1", 1, "e1"][-1].latency_s

    delay_s, parts_s, one_way_s = run_virtual(run())
    assert delay_s == pytest.approx(parts_s + 4 * 2 * one_way_s, abs=0.001)


def test_probes_are_few_and_unchanged_latencies_are_reported_once() -> None:
    quiet_s = 60.0

    async def run() -> World:
        broker = MemoryBroker(latency_s=BUS_S)
        async with world(WorldOptions(devices=("d1",), networks=NETWORKS, probes=True), broker=broker) as region:
            await asyncio.sleep(quiet_s)
            return region

    region = run_virtual(run())
    edges = ("e1", "e2")
    sent = sum(probes(region, topics.activations_topic(edge)) for edge in edges)
    assert 2 * FIRST_PROBES < sent <= 4 * FIRST_PROBES + quiet_s / REFRESH_S
    assert {key: len(measured) for key, measured in reported(region).items()} == {
        ("d1", 1, "e1"): 1,
        ("d1", 1, "e2"): 1,
        ("e1", 2, "e1"): 1,
        ("e2", 2, "e2"): 1,
    }


def test_a_busy_device_is_probed_only_when_its_answers_are_old() -> None:
    async def run() -> tuple[int, int]:
        async with world(
            WorldOptions(devices=("d1",), edges=("e1",), probes=True, policy="edge-only", link1_bps=1_000_000)
        ) as region:
            await asyncio.sleep(2.0)
            topic = topics.activations_topic("e1")
            before = probes(region, topic)
            running = asyncio.create_task(region.replay([task(1, samples=80)]))  # 0.32 s of link time a sample
            await asyncio.sleep(24.0)
            idle = probes(region, topic) - before
            assert not running.done()
            await running
            await asyncio.sleep(11.0)
            return idle, probes(region, topic) - before - idle

    while_busy, after = run_virtual(run())
    assert while_busy == 0
    assert after >= 2


def test_a_latency_that_changes_is_noticed_and_reported() -> None:
    async def run() -> list[LinkMeasurement]:
        broker = MemoryBroker(latency_s=BUS_S)
        async with world(WorldOptions(devices=("d1",), edges=("e1",), probes=True), broker=broker) as region:
            await asyncio.sleep(60.0)
            broker.latency_s = 0.050
            await asyncio.sleep(2 * REFRESH_S)
            return reported(region)["d1", 1, "e1"]

    measured = run_virtual(run())
    assert measured[0].latency_s == pytest.approx(BUS_S, abs=0.001)
    assert measured[-1].latency_s == pytest.approx(0.050, abs=0.001)


def test_an_edge_that_joins_later_is_probed_and_one_that_left_is_not() -> None:
    async def run() -> tuple[int, int, int]:
        async with world(WorldOptions(devices=("d1",), edges=("e1", "e2"), probes=True)) as region:
            await asyncio.sleep(2.0)
            topic = topics.activations_topic("e2")
            first = probes(region, topic)
            await region.nodes["e2"].leave()
            await asyncio.sleep(1.0)
            left = probes(region, topic)
            await asyncio.sleep(0.5)
            await region.nodes["e2"].publish(topics.NODES, region.nodes["e2"].announcement(), "e2")
            await asyncio.sleep(1.0)
            return first, left, probes(region, topic)

    first, left, back = run_virtual(run())
    assert first >= FIRST_PROBES
    assert left == first
    assert back >= left + FIRST_PROBES


HOSTILE = {
    "with data": encode_frame(Frame("probe", "x", 1, "d1"))[:-5] + b"\xc4\x01x",
    "of no node": encode_frame(Frame("probe", "x", 1, "a b")),
    "for a task": encode_frame(Frame("probe", "t1", 1, "no node")),
    "of an unknown kind": encode_frame(Frame("prob", "x", 1, "d1")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("topic", [topics.activations_topic("e1"), topics.ACTIVATIONS_CLOUD])
def test_a_hostile_probe_is_a_dead_letter_and_harms_no_task(topic: str, payload: bytes) -> None:
    async def run() -> World:
        async with world(WorldOptions(devices=("d1",), edges=("e1",), probes=True)) as region:
            running = asyncio.create_task(region.replay([task(1)]))
            await asyncio.sleep(0.05)
            await region.bus.send(topic, payload, key="d1")
            (outcome,) = (await running).values()
            assert outcome.state is TaskState.COMPLETED
            letters = await read_dead_letters(region.bus)
            assert [letter.topic for letter in letters] == [topic]
            return region

    run_virtual(run())


def test_forged_late_and_doubled_answers_are_dropped() -> None:
    async def run() -> tuple[World, int]:
        async with world(WorldOptions(devices=("d1",), edges=("e1",), probes=True)) as region:
            await asyncio.sleep(1.5)
            before = await region.bus.end_offsets(topics.DEAD_LETTER)
            for echo in (Frame("echo", "x", 1, "e1"), Frame("echo", region.nodes["d1"].incarnation, 1, "e1")):
                await region.bus.send(topics.RESULTS, encode_frame(echo), key="d1")
            for number in range(1, 30):  # of probes that were answered or never sent, and to another edge
                echo = Frame("echo", region.nodes["d1"].incarnation, number, "e7")
                await region.bus.send(topics.RESULTS, encode_frame(echo), key="d1")
            await asyncio.sleep(3.0)
            after = await region.bus.end_offsets(topics.DEAD_LETTER)
            return region, sum(after.values()) - sum(before.values())

    region, letters = run_virtual(run())
    assert letters == 0
    assert all(one.latency_s < 0.001 for measured in reported(region).values() for one in measured)


def test_where_proofs_are_required_a_probe_of_another_name_is_refused() -> None:
    async def run() -> Counter[str]:
        async with world(WorldOptions(devices=("d1", "d2"), edges=("e1", "e2"), probes=True, master=FRAMES)) as region:
            probe = encode_frame(Frame("probe", "x", 1, "d1"))
            await region.bus_of("device", "d2").send(topics.activations_topic("e1"), probe, key="d1")
            await region.bus_of("edge", "e2").send(
                topics.ACTIVATIONS_CLOUD, encode_frame(Frame("probe", "x", 1, "e1")), key="e1"
            )
            echo = encode_frame(Frame("echo", region.nodes["d1"].incarnation, 1, "e1"))
            await region.bus_of("edge", "e2").send(topics.RESULTS, echo, key="d1")
            await region.bus.send(topics.RESULTS, echo, key="d1")
            await asyncio.sleep(2.0)
            assert not any(
                node.status.counters["probes_dropped"]
                for node in region.nodes.values()
                if "probes_dropped" in node.status.counters
            )
            return Counter({name: int(node.status.counters["wrong_identity"]) for name, node in region.nodes.items()})

    assert +run_virtual(run()) == Counter({"e1": 1, "c1": 1, "d1": 2})


def test_a_flood_of_probes_is_answered_within_a_bound() -> None:
    async def run() -> tuple[int, float]:
        networks = {"c1": PlayedNetwork(0.5)}  # answers take half a second
        async with world(WorldOptions(devices=("d1",), edges=("e1",), probes=True, networks=networks)) as region:
            probe = encode_frame(Frame("probe", "x", 1, "e1"))
            for _ in range(500):
                await region.bus.send(topics.ACTIVATIONS_CLOUD, probe, key="e1")
            await asyncio.sleep(1.0)
            log = region.broker.logs(topics.activations_topic("e1"))[0]
            echoes = sum(decode_frame(record.value).task_id == "x" for record in log.read(0, log.end))
            return echoes, region.nodes["c1"].status.counters["probes_dropped"]

    echoes, dropped = run_virtual(run())
    assert echoes <= 70
    assert dropped >= 430


def test_a_played_link_that_falls_to_a_third_is_reported_and_so_is_its_recovery() -> None:
    trace = parse_trace("t", ["t_s,bps", "0,100000000", "10,3000000", "40,100000000", "1000,100000000"])

    async def run() -> list[tuple[float, int | None]]:
        networks = {"d1": PlayedNetwork(trace=trace)}
        async with world(
            WorldOptions(
                devices=("d1",), edges=("e1",), probes=True, policy="edge-only", link1_bps=10_000_000, networks=networks
            )
        ) as region:
            found: list[tuple[float, int | None]] = []
            clock = asyncio.get_running_loop().time
            for number in range(40):
                await region.replay([task(number, samples=20)])
                found.append((clock(), reported(region)["d1", 1, "e1"][-1].bps))
                await asyncio.sleep(1.0)
            return found

    found = run_virtual(run(), horizon_s=1000.0)
    assert all(bps is None for at_s, bps in found if at_s < 10)
    fallen = [bps for at_s, bps in found if 16 < at_s < 40]
    assert fallen
    assert fallen[0] == pytest.approx(3_000_000, rel=0.1)
    assert found[-1][1] is None
