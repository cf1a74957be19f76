"""Placements with codecs: what they may use, what they are worth, what they teach, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bus.messages import Ended, NodeAnnounced, NodeHeartbeat, Placed, SessionTerms, TaskCompleted
from bus.values import Codec, Objective, Placement
from planner.core.core import PlannerCore, Tick
from planner.core.options import CoreOptions
from planner.explain import explain
from planner.search.algorithm1 import Algorithm
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN
from planner.search.route_search import MixedRoute
from tests.unit.planner.core.test_routes import tried_one_by_one
from tests.unit.planner.scenes import (
    MBPS,
    RandomRegion,
    Traffic,
    cloud,
    device,
    edge,
    faster,
    only,
    profile,
    task,
    with_codecs,
)

PLAIN = profile()
CODED = with_codecs(PLAIN, random.Random(1))


class Asked:
    """A policy that keeps what it answered, and the best of all starts."""

    name = "asked"

    def __init__(self, policy: str) -> None:
        self.policy = BUILT_IN[policy]
        self.values: list[tuple[float, float]] = []

    def place(self, algorithm: Algorithm) -> Choice | None:
        choice = self.policy.place(algorithm)
        if choice is not None:
            self.values.append((algorithm.value_s(choice), tried_one_by_one(algorithm)))
        return choice


@pytest.mark.parametrize("objective", list(Objective))
def test_with_codecs_the_choice_is_the_best_of_all_starts(objective: Objective) -> None:
    coded = 0
    for seed in range(4):
        policy = Asked("deepar")
        traffic = Traffic(rate=(0.5, 2.0, 5.0)[seed % 3], codecs=True, own_links=seed % 2 == 0)
        world = RandomRegion(PlannerCore(0, policy, objective), seed, traffic).run()
        for value, least in policy.values:
            assert value == pytest.approx(least, rel=1e-12)
        coded += sum(placed.placement.routes is not None for placed in world.placed.values())
    assert coded > 15


@pytest.mark.parametrize("policy", ["deepar", "routes"])
def test_what_is_placed_has_consent_and_is_replayed_and_restored(policy: str) -> None:
    core = PlannerCore(0, policy, Objective.PIPELINED)
    world = RandomRegion(core, 5, Traffic(tasks=150, rate=3.0, edges=4, devices=10, codecs=True)).run()
    profiles = {name: node.announced.models for name, node in core.nodes.items()}
    lossy = 0
    for placed in world.placed.values():
        for route in placed.placement.routes or ():
            one = next(one for one in profiles[placed.device] if one.model == placed.model)
            agreement = one.agreement((route.cut1, route.codec1), (route.cut2, route.codec2))
            assert agreement is not None
            consent = (None, 0.9, 0.995, 1.0)[int(placed.task_id[1:]) % 4]
            assert agreement >= (consent or 1.0)
            assert consent is not None or (route.codec1.lossless and route.codec2.lossless)
            assert route.codec1 is route.codec2 or route.cut1 != route.cut2
            lossy += not (route.codec1.lossless and route.codec2.lossless)
        assert Placed.model_validate_json(placed.model_dump_json()) == placed
    assert lossy > 20
    other = PlannerCore(0, policy, Objective.PIPELINED)
    for decision in world.log:
        other.fold(type(decision).model_validate_json(decision.model_dump_json()))
        assert other.state_hash == decision.ledger_hash


def test_explain_shows_what_was_placed() -> None:
    world = RandomRegion(PlannerCore(0), 1, Traffic(rate=3.0, codecs=True), validate=False).run()
    coded = [placed for placed in world.placed.values() if placed.placement.routes is not None]
    for placed in coded[::5]:
        first = explain(world.log, placed.task_id).candidates[0]
        assert first.chosen
        assert first.placement == placed.placement
    assert coded


def region(*nodes: NodeAnnounced, policy: Any = "deepar", **options: Any) -> PlannerCore:
    core = PlannerCore(0, policy, options=CoreOptions(**options))
    for node in nodes or (
        edge(models=(faster(CODED, 4.0),)),
        cloud(models=(faster(CODED, 20.0),)),
        device(models=(CODED,)),
    ):
        core.handle(node, 0.0)
    return core


SLOW: dict[str, Any] = {"max_link1_bps": 2 * MBPS, "max_link2_bps": MBPS, "tiers": ("edge", "cloud")}


def codecs_of(placement: Placement) -> set[Codec]:
    return {codec for route in placement.routes or () for codec in (route.codec1, route.codec2)} or {Codec.RAW}


def test_lossy_codecs_need_the_consent_of_the_task() -> None:
    core = region()
    placed = {
        consent: only(core.handle(task(f"t{i}", min_agreement=consent, **SLOW), 1000.0 * i), Placed)
        for i, consent in enumerate((None, 0.8, 1.0))
    }
    assert codecs_of(placed[None].placement) <= {Codec.RAW, Codec.ZSTD}
    assert Codec.ZSTD in codecs_of(placed[None].placement)
    assert codecs_of(placed[0.8].placement) & {Codec.Q8, Codec.Q4}
    assert placed[0.8].delay_s < placed[None].delay_s


@pytest.mark.parametrize("without", ["edge", "cloud", "device"])
def test_a_node_that_has_measured_no_codecs_gets_raw_activations(without: str) -> None:
    models = {role: (PLAIN if role == without else CODED) for role in ("edge", "cloud", "device")}
    core = region(
        edge(models=(faster(models["edge"], 4.0),)),
        cloud(models=(faster(models["cloud"], 20.0),)),
        device(models=(models["device"],)),
    )
    tiers = {"edge": ("edge",), "cloud": ("cloud",), "device": ("edge", "cloud")}[without]
    terms = {**SLOW, "min_agreement": 0.8, "tiers": tiers}
    assert only(core.handle(task(**terms), 0.0), Placed).placement.routes is None


def test_a_task_with_inputs_of_its_own_size_sends_them_raw() -> None:
    terms = {**SLOW, "min_agreement": 0.8, "tiers": ("edge",)}
    assert only(region().handle(task(**terms), 0.0), Placed).placement.routes is not None
    assert only(region().handle(task(**terms, input_bytes=5_000), 0.0), Placed).placement.routes is None
    same = only(region().handle(task(**terms, input_bytes=CODED.cut_bytes[0]), 0.0), Placed)
    assert same.placement.routes is not None


def test_tasks_whose_consent_allows_the_same_share_a_search() -> None:
    core = region()
    core.handle(task("t0", min_agreement=0.9961, **SLOW), 0.0)
    held_bytes = core.search_bytes
    for i in range(1, 10):
        core.handle(task(f"t{i}", min_agreement=0.9961 + i * 1e-5, **SLOW), 1000.0 * i)
    assert core.search_bytes == held_bytes
    core.handle(task("t10", min_agreement=0.9, **SLOW), 20_000.0)
    assert core.search_bytes > held_bytes


@pytest.mark.parametrize("codecs", [(Codec.Q8, Codec.Q8), (Codec.ZSTD, Codec.RAW), ("q8", None)])
def test_a_users_choice_of_codecs_without_consent_or_at_one_end_is_rejected(codecs: Any) -> None:
    class Careless:
        name = "careless"

        def place(self, algorithm: Algorithm) -> Choice | None:
            choice = algorithm.best()
            assert choice is not None
            assert choice.cut1 == choice.cut2  # one crossing of both links has one codec
            return choice._replace(routes=(MixedRoute(choice.cut1, choice.cut2, 1.0, codecs),))

    core = region(policy=Careless())
    ended = only(core.handle(task(**{**SLOW, "tiers": ("cloud",)}), 0.0), Ended)
    assert ended.cause == "policy_error"


@pytest.mark.parametrize(
    "tiers", [("device", "edge"), ("device", "cloud"), ("edge", "cloud"), ("device", "edge", "cloud")]
)
def test_times_of_codecs_are_not_taken_for_slow_nodes(tiers: tuple[str, ...]) -> None:
    """A task that went as predicted, encoding and decoding included, teaches nothing about the nodes' speed."""
    codecs = tuple(one.model_copy(update={"encode_s": 0.02, "decode_s": 0.02}) for one in CODED.codecs or ())
    slow = faster(CODED.model_copy(update={"codecs": codecs}), 0.05)
    core = region(
        edge(models=(faster(slow, 20.0),)), cloud(models=(faster(slow, 40.0),)), device(models=(slow,)), learning=True
    )
    terms = {**SLOW, "min_agreement": 0.8, "tiers": tiers}
    placed = only(core.handle(task(**terms), 0.0), Placed)
    assert codecs_of(placed.placement) != {Codec.RAW}
    done = TaskCompleted(task_id="t1", attempt=1, node="d1", measured=placed.parts, delay_s=placed.delay_s)
    core.handle(done, placed.delay_s)
    for node in ("d1", "e1", "c1"):
        assert core.estimates.node(node, "m").a == pytest.approx(1.0, rel=0.03)
    again = only(core.handle(task("t2", **terms), placed.delay_s + 1.0), Placed)
    assert again.delay_s == pytest.approx(placed.delay_s, rel=0.03)


def test_a_session_uses_codecs_with_consent_and_keeps_them_when_it_is_reviewed() -> None:
    """A session that finds nothing better at a review stays where it is: what it has is judged with its codecs."""
    terms = SessionTerms(rate_hz=20.0)
    slow: dict[str, Any] = {"samples": 1, "session": terms, "max_link1_bps": 4 * MBPS, "tiers": ("edge", "cloud")}
    raw = only(region().handle(task(**slow), 0.0), Placed)
    core = region()
    coded = only(core.handle(task(**slow, min_agreement=0.8), 0.0), Placed)
    assert codecs_of(coded.placement) & {Codec.Q8, Codec.Q4}
    assert raw.session is not None
    assert coded.session is not None
    assert coded.session.rate_hz > raw.session.rate_hz
    assert Placed.model_validate_json(coded.model_dump_json()) == coded
    for node in ("d1", "e1", "c1"):
        core.handle(NodeHeartbeat(node=node, incarnation="i1"), 100.0)
    assert core.handle(Tick(), 100.0) == []
    core.validate()
