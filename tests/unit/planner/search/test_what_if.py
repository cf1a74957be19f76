"""Plans of one task alone: constraints, the N best plans, and the bandwidths at which the best cuts change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bus.errors import ConfigError, CutError
from bus.values import Kind, Objective, Role
from planner.search.codec_search import CodecSearch
from planner.search.cost import PlatformRow
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.profiles import load_profile, with_codecs
from planner.search.route_search import RouteSearch
from planner.search.what_if import Constraints, Situation, WhatIfPlan, mixed, plans, position_of, stretches, sweep

PAPER = load_profile("paper")


def situation(model: str = "alexnet", objective: Objective = Objective.SEQUENTIAL, **limits: Any) -> Situation:
    return Situation(
        PAPER.device[model],
        PAPER.edge[model],
        PAPER.cloud[model],
        100_000_000,
        20_000_000,
        samples=10,
        objective=objective,
        constraints=Constraints(**limits),
    )


CODED = with_codecs(PAPER)


def coded(objective: Objective = Objective.SEQUENTIAL, min_agreement: float | None = None, **limits: Any) -> Situation:
    plain = situation("alexnet", objective, **limits)
    device, edge, cloud = (tier["alexnet"] for tier in (CODED.device, CODED.edge, CODED.cloud))
    return replace(plain, device=device, edge=edge, cloud=cloud, codecs=True, min_agreement=min_agreement)


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("consent", [None, 0.9, 0.995, 1.0])
def test_the_best_plan_with_codecs_is_what_the_search_finds(objective: Objective, consent: float | None) -> None:
    asked = coded(objective, consent)
    assert asked.edge is not None
    assert asked.cloud is not None
    search = CodecSearch((PlatformRow(asked.device), PlatformRow(asked.edge), PlatformRow(asked.cloud)), consent)
    found = [search.best(f, asked.link1_bps, asked.link2_bps, 10, objective) for f in range(4)]
    best = min(one for one in found if one is not None)
    first = plans(asked)[0]
    assert (first.delay_s, first.cut1, first.cut2, first.codecs) == best
    assert first.delay_s < plans(replace(asked, codecs=False))[0].delay_s
    assert all(codec.lossless for codec in first.codecs) == (consent is None)


@pytest.mark.parametrize("consent", [None, 0.995])
@pytest.mark.parametrize("samples", [200, 2000])
def test_the_best_plan_of_several_routes_is_what_the_search_finds(consent: float | None, samples: int) -> None:
    for asked in (situation(objective=Objective.PIPELINED), coded(Objective.PIPELINED, consent)):
        asked = replace(asked, samples=samples)
        assert asked.edge is not None
        assert asked.cloud is not None
        rows = PlatformRow(asked.device), PlatformRow(asked.edge), PlatformRow(asked.cloud)
        search = RouteSearch(CodecSearch(rows, consent) if asked.codecs else CutSearch(*rows))
        mixes = [
            search.best(f, asked.link1_bps, asked.link2_bps, samples) for f in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
        ]
        best = min((one for one in mixes if one is not None), key=lambda one: one.delay_s)
        plan = mixed(asked)
        assert plan is not None
        assert plan.delay_s == pytest.approx(best.delay_s)
        assert plan.delay_s < 0.98 * plans(asked)[0].delay_s
        assert sum(route.share for route in plan.routes) == pytest.approx(1.0)
        assert [route[:2] for route in plan.routes] == [route[:2] for route in best.routes]


def test_each_of_several_routes_meets_the_constraints() -> None:
    kept = mixed(replace(situation(objective=Objective.PIPELINED, keep_on_device=2), samples=200))
    assert kept is not None
    assert len(kept.routes) > 1
    assert all(route.cut1 >= 2 for route in kept.routes)
    near = mixed(replace(situation(objective=Objective.PIPELINED, forbidden=frozenset({Role.CLOUD})), samples=200))
    assert near is not None
    assert len(near.routes) > 1
    assert (near.kind, near.link2_bps) == (Kind.DEVICE_EDGE, 0)
    assert mixed(situation(objective=Objective.PIPELINED, max_delay_s=1e-6)) is None


def test_several_routes_may_be_in_time_where_no_single_one_is() -> None:
    free = replace(situation(objective=Objective.PIPELINED), samples=200)
    one_s, mix = plans(free)[0].delay_s, mixed(free)
    assert mix is not None
    assert mix.delay_s < one_s
    limited = replace(free, constraints=replace(free.constraints, max_delay_s=(mix.delay_s + one_s) / 2))
    assert plans(limited) == []
    assert mixed(limited) == mix
    assert mixed(replace(free, constraints=replace(free.constraints, max_delay_s=0.99 * mix.delay_s))) is None


@pytest.mark.parametrize("samples", [1, 3, 10, 30])
def test_several_routes_are_never_worse_than_one_however_few_samples(samples: int) -> None:
    asked = replace(situation(objective=Objective.PIPELINED), samples=samples)
    plan = mixed(asked)
    assert plan is not None
    assert plan.delay_s <= plans(asked)[0].delay_s


def test_with_codecs_the_limit_of_bytes_counts_what_the_links_carry() -> None:
    limited = coded(min_agreement=0.995, max_cut_bytes=100_000)
    raw = plans(replace(limited, codecs=False))[0]
    encoded = plans(limited)[0]
    assert encoded.cut1 < raw.cut1  # what crosses there is small enough only when encoded
    assert limited.device.cut_bytes[encoded.cut1] > 100_000


@pytest.mark.parametrize("objective", list(Objective))
def test_the_best_plan_is_what_the_search_finds(objective: Objective) -> None:
    for model in PAPER.models:
        asked = situation(model, objective)
        rows = [PlatformRow(tier[model]) for tier in (PAPER.device, PAPER.edge, PAPER.cloud)]
        search = CutSearch(rows[0], rows[1], rows[2])
        found = [search.best(f, asked.link1_bps, asked.link2_bps, 10, objective) for f in range(4)]
        best = plans(asked)[0]
        assert best.delay_s == min(one[0] for one in found if one is not None)


def test_top_is_in_order_and_complete() -> None:
    every = plans(situation(), 10_000)
    layers = PAPER.device["alexnet"].layers
    assert len(every) == (layers + 1) * (layers + 2) // 2
    assert [p.delay_s for p in every] == sorted(p.delay_s for p in every)
    assert plans(situation(), 3) == every[:3]
    assert every[0].parts.total_s == pytest.approx(every[0].delay_s)


def test_each_constraint_is_kept() -> None:
    profile = PAPER.device["alexnet"]

    def all_keep(keep: Callable[[WhatIfPlan], bool], **limits: Any) -> list[WhatIfPlan]:
        found = plans(situation(**limits), 10_000)
        assert found
        assert all(keep(p) for p in found)
        return found

    all_keep(lambda p: "cloud" not in p.kind, forbidden=frozenset({Role.CLOUD}))
    all_keep(lambda p: p.cut1 == p.cut2, forbidden=frozenset({Role.EDGE}))
    all_keep(lambda p: p.cut1 == 0, forbidden=frozenset({Role.DEVICE}))
    all_keep(lambda p: "edge" in p.kind, pinned=frozenset({Role.EDGE}))
    only = all_keep(
        lambda p: p.kind is Kind.DEVICE, pinned=frozenset({Role.DEVICE}), forbidden=frozenset({Role.EDGE, Role.CLOUD})
    )
    assert len(only) == 1
    kept = position_of(profile, "conv_2")
    all_keep(lambda p: p.cut1 >= kept, keep_on_device=kept)
    small = all_keep(lambda p: p.delay_s <= 5.0, max_cut_bytes=100_000, max_delay_s=5.0)
    sent = {profile.cut_bytes[cut] for p in small for cut in (p.cut1, p.cut2) if 0 < cut < profile.layers}
    assert max(sent) <= 100_000
    assert all(p.cut1 > 0 for p in small)  # the input is larger


def test_constraints_may_leave_nothing_and_may_not_contradict() -> None:
    assert plans(situation(max_delay_s=1e-6)) == []
    with pytest.raises(ConfigError, match="edge"):
        Constraints(frozenset({Role.EDGE}), frozenset({Role.EDGE}))


def test_the_tasks_own_input_counts_against_the_cap() -> None:
    from dataclasses import replace

    asked = replace(situation(max_cut_bytes=50_000), input_bytes=10_000)
    assert any(p.cut1 == 0 for p in plans(asked, 1000))


def test_layers_by_name_and_number() -> None:
    profile = PAPER.device["alexnet"]
    assert (position_of(profile, "input"), position_of(profile, "maxpool_1"), position_of(profile, "7")) == (0, 3, 7)
    for wrong in ("conv_9", "99", "-1"):
        with pytest.raises(CutError, match="conv_1"):
            position_of(profile, wrong)


def test_the_best_cuts_change_along_a_sweep() -> None:
    bandwidths = [10**k for k in range(4, 12)]
    best = sweep(situation(), 1, bandwidths)
    delays = [p.delay_s for p in best if p is not None]
    assert delays == sorted(delays, reverse=True)
    found = stretches(bandwidths, best)
    assert found[0].cut1 == PAPER.device["alexnet"].layers  # hardly any bandwidth: the device alone
    assert len(found) >= 3
    assert [s.from_bps for s in found] == sorted(s.from_bps for s in found)
