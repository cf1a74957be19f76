"""A task of several routes on a device, an edge and two cloud stages, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from bus import topics
from bus.frames import Frame
from bus.messages import Admitted, Placed, Rerouted, Retried, SeedInput, Start, TaskCompleted, TaskFailed, TaskSubmitted
from bus.routes.interleave import LEAST_WINDOW
from bus.routes.shares import solve_shares
from bus.tensors import Array, Piece, to_pieces
from bus.values import (
    BITS_PER_BYTE,
    Execution,
    Kind,
    ModelProfile,
    Objective,
    Parts,
    Placement,
    Role,
    Route,
    StationSeconds,
)
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.device_steps import device_steps
from stages.hops.edge_stage import EdgeStage
from stages.membership.settings import NodeSettings
from tests.numbered_frames import NumberingRunner, answers, frame
from tests.unit.stages.scripted_region import ScriptedRegion, scripted_region

LAYER_S = (0.01, 0.02, 0.005)
CUT_BYTES = (4_000, 1_000, 2_000, 64)
LINK1_BPS, LINK2_BPS = 4_000_000, 2_000_000
PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a", "b", "c"), layer_s=LAYER_S, cut_bytes=CUT_BYTES
)
LAYERS = 3
ALONE = (LAYERS, LAYERS)


class NumberedRunner(NumberingRunner):
    """Its inputs carry the number of their sample."""

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        return lambda sample: frame(sample, CUT_BYTES[0])


def stations(cut1: int, cut2: int) -> StationSeconds:
    """What a sample of these cuts takes at each station."""
    layers_s = (sum(LAYER_S[:cut1]), sum(LAYER_S[cut1:cut2]), sum(LAYER_S[cut2:]))
    if cut1 == LAYERS:
        return (layers_s[0], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    up = (CUT_BYTES[cut1] * BITS_PER_BYTE / LINK1_BPS, CUT_BYTES[cut2] * BITS_PER_BYTE / LINK2_BPS)
    down = (CUT_BYTES[-1] * BITS_PER_BYTE / LINK1_BPS, CUT_BYTES[-1] * BITS_PER_BYTE / LINK2_BPS)
    if cut2 == LAYERS:
        return (layers_s[0], up[0], layers_s[1], 0.0, 0.0, 0.0, down[0])
    return (layers_s[0], up[0], layers_s[1], up[1], layers_s[2], down[1], down[0])


def mix(*routes: tuple[int, int, float]) -> Placement:
    """A placement with these routes: cuts and share."""
    cut1, cut2, _ = max((route for route in routes if route[:2] != ALONE), key=lambda route: route[2])
    names = ("input", *PROFILE.layer_names)
    cloud = any(cut2 < LAYERS for _, cut2, _ in routes)
    return Placement(
        kind=Kind.DEVICE_EDGE_CLOUD if cloud else Kind.DEVICE_EDGE, edge="e", cut1=cut1, cut2=cut2,
        cut1_name=names[cut1], cut2_name=names[cut2], link1_bps=LINK1_BPS, link2_bps=LINK2_BPS if cloud else 0,
        routes=tuple(Route(cut1=a, cut2=b, share=share, stations_s=stations(a, b)) for a, b, share in routes),
    )  # fmt: skip


def slowest_s(placement: Placement) -> float:
    """P: the mean time of a sample at the slowest station."""
    assert placement.routes is not None
    return max(sum(route.share * route.stations_s[k] for route in placement.routes) for k in range(7))


@dataclass
class Task:
    """A task under way, and the results that its device has shown."""

    region: ScriptedRegion
    samples: int
    shown: dict[int, list[Array]]

    async def place(self, placement: Placement, attempt: int = 1) -> None:
        task = TaskSubmitted(task_id="t", device="d", model="toy", samples=self.samples, input=SeedInput(seed=1))
        placed = Placed(
            task_id="t", attempt=attempt, device="d", model="toy", sha256="0" * 64, samples=self.samples, policy="p",
            objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement, start_s=0.0, wait_s=0.0,
            delay_s=1.0, parts=Parts(device_s=0.01 * self.samples),
        )  # fmt: skip
        before = (Retried(task_id="t", attempt=attempt, cause="node_lost"),) if attempt > 1 else (Admitted(task=task),)
        await self.region.decide(*before, placed, Start(task_id="t", attempt=attempt, device="d", at_s=0.0))

    async def reroute(self, placement: Placement) -> None:
        """Let the task go on under another placement."""
        await self.region.decide(
            Rerouted(
                task_id="t", attempt=1, device="d", placement=placement, from_s=1.0, samples=100, delay_s=1.0,
                parts=Parts(),
            )
        )  # fmt: skip

    async def completed(self) -> TaskCompleted:
        """What the device reports at the end; every result is right and was shown once."""
        async with asyncio.timeout(600.0):
            while not (events := self.region.events()):
                await asyncio.sleep(0.01)
        assert not any(isinstance(event, TaskFailed) for event in events), events
        assert sorted(self.shown) == list(range(self.samples))
        assert all(answers(number, outputs) for number, outputs in self.shown.items())
        completed = events[-1]
        assert isinstance(completed, TaskCompleted)
        return completed

    def first_routes(self, count: int) -> Counter[int]:
        """The routes of the first samples that the device sends."""
        pieces = [piece for one in self.region.frames(topics.activations_topic("e")) for piece in one.pieces]
        return Counter(piece.route for piece in pieces[:count])

    def routes_taken(self) -> Counter[int]:
        """The distinct samples of each route at the edge."""
        pieces = {
            (piece.sample, piece.route)
            for one in self.region.frames(topics.activations_topic("e"))
            for piece in one.pieces
        }
        return Counter(route for _, route in pieces)


@contextlib.asynccontextmanager
async def started(
    placement: Placement, samples: int = 200, came_s: list[float] | None = None, **more: Any
) -> AsyncIterator[Task]:
    """`came_s` gets the times of the results."""
    shown: dict[int, list[Array]] = {}

    def show(task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        assert sample not in shown, f"sample {sample} was shown twice"
        shown[sample] = outputs
        if came_s is not None:
            came_s.append(asyncio.get_running_loop().time())

    async with scripted_region(runner=NumberedRunner([PROFILE]), on_result=show, **more) as region:
        task = Task(region, samples, shown)
        await task.place(placement)
        yield task


EVERY_KIND = mix((1, 2, 0.25), (0, 0, 0.15), (1, 3, 0.2), (0, 3, 0.1), (1, 1, 0.1), (*ALONE, 0.2))
BEST = mix((1, 1, 0.4667), (1, 3, 0.4667), (*ALONE, 0.0666))


@pytest.mark.parametrize(
    "placement",
    [
        EVERY_KIND,
        mix((0, 1, 0.5), (0, 2, 0.5)),
        mix((1, 3, 0.7), (2, 3, 0.3)),
        mix((0, 0, 0.6), (1, 1, 0.4)),
        mix((1, 3, 0.8), (*ALONE, 0.2)),
        mix((1, 2, 1.0), (0, 0, 0.0)),
        mix((1, 2, 1.0)),
    ],
    ids=lambda placement: "+".join(f"{a}-{b}" for a, b in placement.cut_pairs),
)
def test_each_sample_takes_its_route_and_every_layer_computes_it_once(placement: Placement) -> None:
    async def run() -> None:
        async with started(placement) as task:
            completed = await task.completed()
            taken, shares = task.routes_taken(), [route.share for route in placement.routes or ()]
            alone = [route for route, cuts in enumerate(placement.cut_pairs) if cuts == ALONE]
            assert not any(taken[route] for route in alone)
            assert sum(taken.values()) < 200 if alone else sum(taken.values()) == 200
            sent = sum(share for route, share in enumerate(shares) if route not in alone)
            first = task.first_routes(LEAST_WINDOW)  # later the shares change as measured
            for route, share in enumerate(shares):
                expected = 0 if route in alone else LEAST_WINDOW * share / sent
                assert first[route] == pytest.approx(expected, abs=1)
            check_parts(completed, placement, taken)

    run_virtual(run())


def check_parts(completed: TaskCompleted, placement: Placement, taken: Counter[int]) -> None:
    """The measured parts are sums over the samples of all routes."""
    counts = taken | Counter(
        {route: 200 - sum(taken.values()) for route, c in enumerate(placement.cut_pairs) if c == ALONE}
    )
    sums = [sum(counts[r] * route.stations_s[k] for r, route in enumerate(placement.routes or ())) for k in range(7)]
    told = tuple(counts[route] for route in range(len(placement.routes or ())))
    assert completed.route_samples == (told if len(told) > 1 else None)
    measured = completed.measured
    assert measured.device_s == pytest.approx(sums[0])
    assert measured.edge_s == pytest.approx(sums[2])
    assert measured.cloud_s == pytest.approx(sums[4])
    assert sums[1] <= measured.link1_s <= 1.15 * sums[1]  # frames have heads
    assert sums[3] <= measured.link2_s <= 1.15 * sums[3]
    assert measured.result_s > 0


def test_a_mix_is_as_fast_as_its_slowest_station_and_faster_than_one_route() -> None:
    async def run() -> None:
        async with started(BEST, 1_000) as task:
            completed = await task.completed()
            assert completed.delay_s == pytest.approx(1_000 * slowest_s(BEST), rel=0.03)
            one = min(max(stations(cut1, cut2)) for cut1 in range(4) for cut2 in range(cut1, 4))
            assert completed.delay_s < 0.65 * 1_000 * one

    run_virtual(run())


def test_the_device_only_route_ends_before_the_others_and_uses_idle_time_only() -> None:
    """Of a task that the edge bounds, the device-only route takes the device's idle time and does not delay the end."""
    beside = mix((1, 3, 0.999), (*ALONE, 0.001))

    async def run(placement: Placement) -> float:
        async with started(placement, 300) as task:
            return (await task.completed()).delay_s

    alone, mixed = run_virtual(run(mix((1, 3, 1.0)))), run_virtual(run(beside))
    edge_s, device_s = sum(LAYER_S[1:]), LAYER_S[0]
    assert alone == pytest.approx(300 * edge_s, rel=0.02)
    # In the time of one sample on the edge the device computes layer a, and is idle for the rest.
    rate = 1 / edge_s + (1 - device_s / edge_s) / sum(LAYER_S)
    assert mixed == pytest.approx(300 / rate, rel=0.03)


def test_two_samples_of_a_mix_do_not_wait_for_the_device() -> None:
    async def run(samples: int) -> float:
        async with started(mix((1, 3, 0.5), (*ALONE, 0.5)), samples) as task:
            completed = await task.completed()
            assert sum(task.routes_taken().values()) == samples
            return completed.delay_s

    assert run_virtual(run(1)) < 0.05
    assert run_virtual(run(2)) < 0.08


def test_an_attempt_that_follows_sends_only_what_has_no_result() -> None:
    async def run() -> None:
        async with started(EVERY_KIND, 300) as task:
            await asyncio.sleep(1.0)
            before = len(task.shown)
            assert 30 < before < 200
            await task.place(BEST, attempt=2)
            await task.completed()
            second = [one for one in task.region.frames(topics.activations_topic("e")) if one.attempt == 2]
            assert 0 < sum(len(one.pieces) for one in second) <= 300 - before

    run_virtual(run())


@pytest.mark.parametrize("stage", ["e", "c"])
def test_a_stage_that_is_killed_computes_again_what_was_not_sent_on(stage: str) -> None:
    async def run() -> None:
        async with started(EVERY_KIND, 300) as task:
            await asyncio.sleep(1.0)
            names = [name for name in ("e", "c1", "c2") if name.startswith(stage)]
            for name in names:
                await task.region.kill(name)
            for name in names:
                role = Role.EDGE if stage == "e" else Role.CLOUD
                link_bps = 10_000_000 if stage == "e" else 0
                settings = NodeSettings(
                    name=name,
                    role=role,
                    slots=int(stage == "e"),
                    link1_capacity_bps=link_bps,
                    link2_capacity_bps=link_bps,
                )
                task.region.start(settings, NumberedRunner([PROFILE]))
            await task.completed()

    run_virtual(run())


def test_flows_close_and_the_slot_is_free_when_the_samples_of_all_routes_have_passed() -> None:
    async def run() -> None:
        async with started(EVERY_KIND) as task:
            await task.completed()
            await asyncio.sleep(0.2)
            flows = [flow for name in ("e", "c1", "c2") for flow in task.region.hop(name).flows.values()]
            assert len(flows) == 2
            assert all(flow.closed for flow in flows)

    run_virtual(run())


@pytest.mark.parametrize(
    ("pieces", "totals"),
    [
        (to_pieces(900, frame(900, CUT_BYTES[1]), 1 << 20, 5), ()),  # the device-only route does not pass the edge
        (to_pieces(900, frame(900, CUT_BYTES[1]), 1 << 20, 7), ()),  # the plan has six routes
        (to_pieces(900, frame(900, CUT_BYTES[1]), 1 << 20, 1), ()),  # the input of route 1 is larger
        (to_pieces(1_000, frame(1_000, CUT_BYTES[0]), 1 << 20, 1), ()),  # the task has 1,000 samples, from 0
        ([], (1, 2)),
    ],
)
def test_a_frame_that_does_not_fit_the_routes_of_its_plan_is_a_dead_letter(
    pieces: list[Piece], totals: tuple[int, ...]
) -> None:
    async def run() -> None:
        async with started(EVERY_KIND, 1_000) as task:
            await asyncio.sleep(0.5)
            await task.region.send(
                topics.activations_topic("e"), Frame("activations", "t", 1, "d", pieces, totals=totals)
            )
            await asyncio.sleep(0.5)
            (failed,) = task.region.events()
            assert isinstance(failed, TaskFailed)
            assert failed.cause == "wrong_shape"
            assert task.region.hop("e").node.status.counters["dead_letters"] == 1

    run_virtual(run())


def test_the_steps_of_the_device_only_route_are_no_longer_than_the_longest_layer() -> None:
    profile = ModelProfile(
        model="m", sha256="0" * 64, platform="p", layer_names=tuple("abcdefgh"), cut_bytes=(1,) * 9, forbidden=(5,),
        layer_s=(0.1, 0.2, 0.3, 1.0, 0.4, 0.5, 0.2, 0.8),
    )  # fmt: skip
    assert [step[:2] for step in device_steps(profile)] == [(0, 3), (3, 4), (4, 6), (6, 8)]
    assert [step[:2] for step in device_steps(PROFILE)] == [(0, 1), (1, 2), (2, 3)]


def scaled(stations_s: StationSeconds, device: float, edge: float, cloud: float) -> StationSeconds:
    """Station times of slower or faster platforms."""
    s1, s2, s3, s4, s5, s6b, s6a = stations_s
    return (s1 * device, s2, s3 * edge, s4, s5 * cloud, s6b, s6a)


@pytest.mark.parametrize(
    "factors", [(1.0, 2.0, 1.0), (0.5, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 0.4, 2.0), (1.3, 0.7, 1.3)]
)
def test_shares_follow_what_the_stages_measure(factors: tuple[float, float, float]) -> None:
    """The plan is wrong about the platforms; the delay is that of the best shares for the true ones all the same."""
    plan = mix((1, 1, 0.4667), (1, 3, 0.4667), (0, 3, 0.0), (2, 2, 0.0), (*ALONE, 0.0666))
    runners = {
        name: NumberedRunner([PROFILE.model_copy(update={"layer_s": tuple(factor * s for s in LAYER_S)})])
        for name, factor in {"d": factors[0], "e": factors[1], "c1": factors[2], "c2": factors[2]}.items()
    }

    async def run() -> float:
        async with started(plan, 1_000, runners=runners) as task:
            return (await task.completed()).delay_s

    true_s = [scaled(route.stations_s, *factors) for route in plan.routes or ()]
    best = solve_shares([sum(stations_s) for stations_s in true_s], true_s, 1_000)
    fixed_s = max(
        sum(route.share * stations_s[k] for route, stations_s in zip(plan.routes or (), true_s, strict=True))
        for k in range(7)
    )
    found_s = run_virtual(run())
    assert found_s == pytest.approx(1_000 * best.slowest_s, rel=0.1)  # the first samples show what is wrong
    assert found_s < 0.95 * 1_000 * fixed_s


ON_DEVICE = Placement(kind=Kind.DEVICE, cut1=3, cut2=3, cut1_name="c", cut2_name="c")
AT_EDGE = mix((1, 3, 1.0)).model_copy(update={"routes": None})


@pytest.mark.parametrize(
    "placements",
    [
        (EVERY_KIND, BEST),
        (AT_EDGE, BEST),
        (BEST, AT_EDGE),
        (ON_DEVICE, BEST),
        (BEST, ON_DEVICE),
        (AT_EDGE, ON_DEVICE, EVERY_KIND, BEST, AT_EDGE),
    ],
    ids=lambda placements: f"{len(placements)} from {placements[0].kind} to {placements[-1].kind}",
)
def test_a_rerouted_task_goes_on_under_its_new_plan_without_a_stall(placements: tuple[Placement, ...]) -> None:
    async def run() -> None:
        came_s: list[float] = []
        async with started(placements[0], 800, came_s=came_s) as task:
            for placement in placements[1:]:
                await asyncio.sleep(1.0)
                await task.reroute(placement)
            await task.completed()
            frames = [one for one in task.region.frames(topics.activations_topic("e")) if one.pieces]
            revisions = [one.revision for one in frames]
            assert revisions == sorted(revisions)
            assert set(revisions) == {number for number, where in enumerate(placements) if where.edge is not None}
            for number, where in enumerate(placements):
                taken = {piece.route for one in frames if one.revision == number for piece in one.pieces}
                assert taken <= set(range(len(where.cut_pairs)))
            cuts = {cuts for where in placements for cuts in where.cut_pairs}
            # a sample begins again when its stations have ended what they are at: up to one more sample's time
            assert max(after - before for before, after in pairwise(came_s)) < 2.0 * max(
                sum(stations(cut1, cut2)) for cut1, cut2 in cuts
            )

    run_virtual(run())


def test_a_rerouted_task_is_as_fast_as_its_plans_and_sends_at_the_new_rate() -> None:
    slow = mix((0, 0, 1.0)).model_copy(update={"routes": None, "link1_bps": LINK1_BPS // 4})
    fast = slow.model_copy(update={"link1_bps": LINK1_BPS, "link2_bps": 4 * LINK2_BPS})

    async def run() -> None:
        async with started(slow, 400) as task:
            await asyncio.sleep(5.0)
            await task.reroute(fast)
            began = len(task.shown)
            assert began == pytest.approx(5.0 / (CUT_BYTES[0] * BITS_PER_BYTE / (LINK1_BPS // 4)), rel=0.1)
            completed = await task.completed()
            rest = 400 - began
            slowest_s = sum(LAYER_S)  # of the cloud
            assert completed.delay_s == pytest.approx(5.0 + rest * slowest_s, rel=0.1)

    run_virtual(run())


def test_an_edge_without_the_model_relays_beside_samples_on_the_device_alone() -> None:
    async def run() -> None:
        runners = {"e": NumberedRunner([])}
        async with started(mix((0, 0, 0.4), (1, 1, 0.4), (*ALONE, 0.2)), 200, runners=runners) as task:
            completed = await task.completed()
            assert completed.measured.link2_s > 0
            assert completed.route_samples is not None
            assert completed.route_samples[2] > 0
            (flow,) = task.region.hop("e").flows.values()
            assert flow.closed

    run_virtual(run())


@pytest.mark.parametrize("before", [AT_EDGE, ON_DEVICE], ids=lambda placement: str(placement.kind))
def test_what_was_measured_before_a_reroute_does_not_change_the_shares_of_the_new_plan(before: Placement) -> None:
    async def run() -> Counter[int]:
        async with started(before, 800) as task:
            await asyncio.sleep(5.0)
            await task.reroute(BEST)
            await task.completed()
            pieces = [
                piece
                for one in task.region.frames(topics.activations_topic("e"))
                if one.revision == 1
                for piece in one.pieces
            ]
            return Counter(piece.route for piece in pieces[:200])

    taken = run_virtual(run())
    assert [taken[0], taken[1]] == pytest.approx(
        [100, 100], abs=10
    )  # the plan is right, so its shares stay as they are


def test_a_stage_that_takes_over_knows_the_plans_of_an_attempt_that_was_rerouted() -> None:
    async def run() -> None:
        async with started(EVERY_KIND, 600) as task:
            await asyncio.sleep(1.0)
            await task.reroute(BEST)
            serving = next(name for name in ("c1", "c2") if task.region.hop(name).flows)
            await task.region.kill(serving)
            await task.completed()

    run_virtual(run())


def test_a_slot_is_held_by_one_plan_of_a_task_at_a_time() -> None:
    async def run() -> None:
        async with started(EVERY_KIND, 300) as task:
            await asyncio.sleep(1.0)
            await task.reroute(BEST)
            await task.completed()
            await asyncio.sleep(0.2)
            (flow,) = task.region.hop("e").flows.values()
            assert (flow.plan.number, flow.closed) == (1, True)
            edge = task.region.hop("e").stage
            assert isinstance(edge, EdgeStage)
            assert not edge.slots.locked()

    run_virtual(run())
