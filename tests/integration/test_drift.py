"""Changes of speed, live on Kafka: an edge takes three times as long, a link falls to a third of its bandwidth, both recover.

Modelled machines wait for the times of a profile, so the change is exact and the machine's own load matters little. A second
region has the same machines, links and tasks under fixed policies that do not learn. The limits are wide, since the machine
may be busy; a planner that does not follow takes half as long again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from statistics import median

from bus import topics
from bus.frames import AttemptPlan
from bus.messages import SeedInput, TaskState, TaskSubmitted
from bus.values import ModelProfile, Role
from deploy.services import wiring
from loadgen.bench.choices.policy_by_name import task_name
from loadgen.replay.outcome import Outcome
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from stages.membership.settings import NodeSettings
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.trace import parse_trace
from stages.node import Node
from stages.runner import ModelledRunner, PaceClock, Station
from tests.kafka_broker import OwnBroker
from tests.known import known

SAMPLES = 10
DEVICE_S, EDGE_S = 0.032, 0.016  # of one sample
SLOWER = 3.0
LINK_BPS = 50_000_000
INPUT_BYTES = {"small": 4_000, "large": 100_000}  # of one sample; 16 ms of link time for the large one
CUT_BYTES = 400_000  # between the layers; 64 ms of link time for one sample
BEGIN_S, EACH_S = 10.0, 1.2  # of the tasks, after the nodes were made
BEFORE, WHILE, AFTER = 8, 11, 11  # tasks of each device
SLOW_S = BEGIN_S + (BEFORE - 0.5) * EACH_S
AGAIN_S = SLOW_S + WHILE * EACH_S
FIXED = ("device-only", "edge-only")
LEARNING, REFERENCE = 0, 1
"""The two regions."""
REGRET, REGRET_S = 1.1, 0.04
"""A delay may be this many times that of the best fixed policy, or this much longer."""


def profile(role: Role, model: str, factor: float = 1.0) -> ModelProfile:
    """A model of two layers; so much crosses between them that no task is cut there."""
    layer_s = (DEVICE_S if role is Role.DEVICE else EDGE_S) / 2 * factor
    size_bytes = INPUT_BYTES[model]
    return ModelProfile(
        model=model,
        sha256="0" * 64,
        platform=role.value,
        layer_names=("a", "b"),
        layer_s=(layer_s, layer_s),
        cut_bytes=(size_bytes, CUT_BYTES, 40),
    )


class Machine(ModelledRunner):
    """Takes `SLOWER` times the announced times while it is `slow`."""

    def __init__(self, role: Role) -> None:
        super().__init__([profile(role, model) for model in INPUT_BYTES])
        self._slower = ModelledRunner([profile(role, model, SLOWER) for model in INPUT_BYTES])
        self.slow = False

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        return self._slower.station(plan, first, last, pace) if self.slow else super().station(plan, first, last, pace)


def test_the_choice_follows_an_edge_that_becomes_slow_and_a_link_that_falls(kafka_own: OwnBroker) -> None:
    ours, reference = asyncio.run(play(kafka_own.bootstrap))
    for outcomes in (ours, reference):
        assert {outcome.state for outcome in outcomes} == {TaskState.COMPLETED}
    # From the fifth task after a change on. The limit of a link rises only after 10 s, so its recovery is not judged.
    slow, again = slice(BEFORE + 5, BEFORE + WHILE), slice(BEFORE + WHILE + 5, None)
    for device, judged in (("1", slow), ("2", slow), ("1", again)):
        delay_s = median_s(tasks_of(ours, device, "deepar")[judged])
        best_s, worse_s = sorted(median_s(tasks_of(reference, device, policy)[judged]) for policy in FIXED)
        assert worse_s > 1.3 * best_s, "the policies differ by so much that a wrong choice shows"
        assert 0.7 * best_s < delay_s <= max(REGRET * best_s, best_s + REGRET_S), (device, judged, delay_s, best_s)
    for device in ("1", "2"):
        assert alternations(tasks_of(ours, device, "deepar")) <= 2
    on_edge = [known(one.placement).edge is not None for one in tasks_of(ours, "1", "deepar")]
    assert any(on_edge[:BEFORE]), "the edge is best before the change"
    assert not all(on_edge[slow]), "the device is best while the edge is slow"
    assert any(on_edge[again]), "the edge is best after the recovery"


def tasks_of(outcomes: Sequence[Outcome], device: str, policy: str) -> list[Outcome]:
    """The tasks of one device under one policy, in order of their arrival."""
    found = [one for one in outcomes if one.device.endswith(device) and one.task_id.endswith(f".{policy}")]
    return sorted(found, key=lambda one: one.scheduled_s)


def median_s(outcomes: Sequence[Outcome]) -> float:
    return median(known(one.device_delay_s) for one in outcomes)


def alternations(outcomes: Sequence[Outcome]) -> int:
    """How often the place changes, without single tasks that try a place again."""
    lasting = [edge for edge, run in groupby(known(one.placement).edge for one in outcomes) if len(list(run)) > 1]
    return len(list(groupby(lasting))) - 1


async def play(bootstrap: str) -> tuple[Sequence[Outcome], Sequence[Outcome]]:
    """The outcomes of the region that learns, and of the region with the fixed policies."""
    async with wiring.kafka_bus(bootstrap) as bus:
        edges = [f"e{region}{number}" for region in (LEARNING, REFERENCE) for number in (1, 2)]
        await wiring.create_missing_topics(bus, edges, topics.Partitions(regions=2))
        async with wiring.embedded() as group:
            clock = asyncio.get_running_loop().time
            made_s = clock()
            slowed, nodes = [], []
            for region in (LEARNING, REFERENCE):
                policy = "deepar" if region == LEARNING else "loadgen.bench.choices.policy_by_name:PolicyByName"
                setup = wiring.PlannerSetup(region=region, policy=policy, learning=region == LEARNING)
                group.create_task(wiring.make_planner(bus, setup).run())
                for settings in cast(region):
                    machine = Machine(settings.role)
                    node = Node(bus, settings, machine)
                    group.create_task(node.run(wiring.make_work(node)))
                    nodes.append(node)
                    if settings.name.startswith("e") and settings.name.endswith("1"):
                        slowed.append(machine)
            async with asyncio.timeout(BEGIN_S + 10.0):
                while not all(node.status.joined for node in nodes):
                    await asyncio.sleep(0.05)
            assert clock() < made_s + BEGIN_S, "the nodes joined too late for the times of the trace"
            await asyncio.sleep(made_s + BEGIN_S - clock())
            group.create_task(change(slowed, made_s))
            played = [
                replay(bus, schedule(("deepar",), LEARNING), region=LEARNING),
                replay(bus, schedule(FIXED, REFERENCE), region=REFERENCE),
            ]
            ours, reference = await asyncio.gather(*played)
        return ours.outcomes, reference.outcomes


def cast(region: int) -> list[NodeSettings]:
    """Two devices with an edge each; the first edge becomes slow, the link of the second device falls to a third."""
    falls = parse_trace(
        "falls", ["t_s,bps", f"0,{LINK_BPS}", f"{SLOW_S},{LINK_BPS // 3}", f"{AGAIN_S},{LINK_BPS}", "600,1"]
    )
    found = []
    for number, network in ((1, NO_NETWORK), (2, PlayedNetwork(trace=falls))):
        edge = f"e{region}{number}"
        device = NodeSettings(
            name=f"d{region}{number}",
            role=Role.DEVICE,
            region=region,
            link1_capacity_bps=LINK_BPS,
            network=network,
            reachable_edges=(edge,),
            probes=True,
            rehearses=True,
        )
        found += [
            replace(
                device,
                name=edge,
                role=Role.EDGE,
                slots=4,
                link2_capacity_bps=LINK_BPS,
                network=NO_NETWORK,
                reachable_edges=None,
            ),
            device,
        ]
    return found


async def change(slowed: Sequence[Machine], made_s: float) -> None:
    """Slow the machines down and let them recover."""
    clock = asyncio.get_running_loop().time
    for at_s, slow in ((SLOW_S, True), (AGAIN_S, False)):
        await asyncio.sleep(made_s + at_s - clock())
        for machine in slowed:
            machine.slow = slow


def schedule(policies: Sequence[str], region: int) -> Schedule:
    """The tasks of both devices under each policy; those of different policies are half a gap apart."""
    entries = []
    for number in range(BEFORE + WHILE + AFTER):
        for turn, policy in enumerate(policies):
            for device, model in ((1, "small"), (2, "large")):
                task = TaskSubmitted(
                    task_id=task_name(f"d{device}-{number}", policy),
                    device=f"d{region}{device}",
                    model=model,
                    samples=SAMPLES,
                    input=SeedInput(seed=number),
                )
                entries.append(Entry(at_s=number * EACH_S + turn * EACH_S / 2, task=task))
    return Schedule(entries=tuple(entries), seed=0)
