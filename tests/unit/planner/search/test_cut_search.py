"""The search finds what trying every pair finds."""

import gc
import random
import tracemalloc

import pytest

from bus.messages import Change
from bus.values import MAX_LAYERS, ModelProfile, Objective
from planner.core.core import CoreComponents, PlannerCore
from planner.search.cost import Costs, Overheads, PlatformRow
from planner.search.cut_search import CutSearch, exhaustive, search_bytes
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from tests.unit.planner.scenes import cloud, completed, device, edge, profile, random_overheads, random_rows, task

FAMILIES = (DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
CASES = 10_000


def _bandwidth(rng: random.Random, exact: bool) -> int:
    return 1 << rng.randrange(14, 23) if exact else rng.randrange(10_000, 1_000_000_000)


@pytest.mark.parametrize("objective", list(Objective))
def test_search_equals_brute_force_on_ten_thousand_random_cases(objective: Objective) -> None:
    """Tiers in any order of speed, forbidden positions, constraints on each cut, inputs of their own size.

    Most cases are of few binary fractions and powers of two, so that the arithmetic is exact and ties abound: there the cuts
    must be the very same. In the others two cuts may differ by rounding only.
    """
    ties = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        exact = rng.random() < 0.7
        layers = rng.randrange(1, 15)
        rows = random_rows(rng, layers, exact=exact)
        allowed = [p for p in range(layers + 1) if p not in rows[0].forbidden]
        allowed1 = [p for p in allowed if rng.random() < 0.8]
        allowed2 = [p for p in allowed if rng.random() < 0.8]
        search = CutSearch(*rows, allowed1, allowed2)
        b1, b2 = _bandwidth(rng, exact), _bandwidth(rng, exact)
        samples, input_bytes = rng.randrange(1, 100), rng.choice((None, rng.randrange(1, 100) * 128))
        device_free = rng.random() < 0.8
        family = rng.choice(FAMILIES)
        ones = allowed1 if device_free else [p for p in allowed1 if p == 0]
        overheads = random_overheads(rng)
        found = search.best(family, b1, b2, samples, objective, input_bytes, device_free, overheads)
        wanted = exhaustive(search.costs, family, b1, b2, samples, objective, input_bytes, ones, allowed2, overheads)
        if exact or found is None or wanted is None:
            assert found == wanted, f"seed {seed}"
            if wanted is not None:
                pairs = [(a, b) for a in ones for b in allowed2 if a <= b and family_of(a, b, layers) == family]
                delays = [
                    search.costs.delay_s(*pair, b1, b2, samples, objective, input_bytes, overheads) for pair in pairs
                ]
                ties += delays.count(wanted[0]) > 1
        else:
            assert found[0] == pytest.approx(wanted[0], rel=1e-13), f"seed {seed}"
            assert family_of(found[1], found[2], layers) == family
            assert found[1] in ones
            assert found[2] in allowed2
    assert ties > CASES / 50, "the cases must contain ties"


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize(
    ("family", "cuts", "computes", "latency_s"),
    [
        (DEVICE, (2, 2), (True, False, False), 0.0),
        (DEVICE_EDGE, (1, 2), (True, True, False), 2.0),
        (DEVICE_EDGE, (0, 2), (False, True, False), 2.0),
        (DEVICE_CLOUD, (1, 1), (True, False, True), 10.0),
        (ALL_THREE, (0, 1), (False, True, True), 10.0),
    ],
)
def test_latencies_factors_and_overheads_add_to_the_delay_of_the_paper(
    objective: Objective, family: int, cuts: tuple[int, int], computes: tuple[bool, bool, bool], latency_s: float
) -> None:
    """Three platforms of half a second a layer, twice as slow, with overheads of 1/8, 1/4 and 1/2 s a sample.

    The numbers are binary fractions, so floats hold every sum exactly.
    """
    samples = 8
    plain = profile("m", (0.5, 0.5), (128, 128, 128))
    overheads = Overheads(1.0, 4.0, (16.0, 32.0, 64.0, 128.0), (1024.0, 2048.0, 4096.0, 8192.0))
    costs = Costs(*(PlatformRow(plain, 2.0, overhead_s) for overhead_s in (0.125, 0.25, 0.5)))
    delay_s = costs.delay_s(*cuts, 1024, 1024, samples, objective, None, overheads)
    layers = (cuts[0], cuts[1] - cuts[0], 2 - cuts[1])
    stations = [
        n * 1.0 + o_s if used else 0.0 for n, o_s, used in zip(layers, (0.125, 0.25, 0.5), computes, strict=True)
    ]
    uses1, uses2 = family != DEVICE, family in (DEVICE_CLOUD, ALL_THREE)
    stations += [1.0 * uses1, 1.0 * uses1, 1.0 * uses2, 1.0 * uses2]  # 128 bytes at 1,024 bit/s, there and back
    fixed_s = overheads.task_s[family] + samples * overheads.sample_s[family]
    if objective is Objective.SEQUENTIAL:
        assert delay_s == samples * (sum(stations) + latency_s) + fixed_s
    else:
        assert delay_s == sum(stations) + latency_s + (samples - 1) * max(stations) + fixed_s
    device, edge, cloud = (PlatformRow(plain, 2.0, overhead_s) for overhead_s in (0.125, 0.25, 0.5))
    search = CutSearch(device, edge, cloud)
    best = search.best(family, 1024, 1024, samples, objective, overheads=overheads)
    assert best is not None
    assert best[0] <= delay_s


@pytest.mark.parametrize("layers", [22, 66, 92])
@pytest.mark.parametrize("objective", list(Objective))
def test_search_equals_brute_force_on_deep_models(layers: int, objective: Objective) -> None:
    rng = random.Random(layers)
    for _ in range(5):
        rows = random_rows(rng, layers, exact=True)
        search = CutSearch(*rows)
        allowed = [p for p in range(layers + 1) if p not in rows[0].forbidden]
        for _ in range(4):
            b1, b2 = _bandwidth(rng, True), _bandwidth(rng, True)
            for family in FAMILIES:
                found = search.best(family, b1, b2, 10, objective)
                assert found == exhaustive(search.costs, family, b1, b2, 10, objective, None, allowed, allowed)


def test_a_family_without_allowed_cuts_is_none() -> None:
    rows = random_rows(random.Random(1), 6, exact=True)
    nothing = CutSearch(*rows, [], [])
    for family in FAMILIES:
        for objective in Objective:
            assert nothing.best(family, 1000, 1000, 1, objective) is None
    single = CutSearch(*random_rows(random.Random(1), 1, exact=True))
    assert single.best(ALL_THREE, 1000, 1000, 1, Objective.SEQUENTIAL) is None  # no layer is left for a middle
    assert single.best(ALL_THREE, 1000, 1000, 1, Objective.PIPELINED) is None


def test_tiers_that_do_not_run_the_model_are_not_used() -> None:
    device, edge, cloud = random_rows(random.Random(2), 6, exact=True)
    for objective in Objective:
        assert CutSearch(device, None, cloud).best(DEVICE_EDGE, 1000, 1000, 1, objective) is None
        assert CutSearch(device, None, cloud).best(ALL_THREE, 1000, 1000, 1, objective) is None
        assert CutSearch(device, None, cloud).best(DEVICE_CLOUD, 1000, 1000, 1, objective) is not None
        assert CutSearch(device, edge, None).best(DEVICE_CLOUD, 1000, 1000, 1, objective) is None
        assert CutSearch(device, edge, None).best(ALL_THREE, 1000, 1000, 1, objective) is None
        assert CutSearch(device, edge, None).best(DEVICE_EDGE, 1000, 1000, 1, objective) is not None


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("layers", [1, 10, 97, 300, MAX_LAYERS])
@pytest.mark.parametrize("alike", [False, True])
def test_a_search_holds_no_more_than_it_is_said_to(objective: Objective, layers: int, alike: bool) -> None:
    """`alike`: every layer costs the same and sends less than the one before, so that no cut is worse than another."""
    if alike:
        sizes = tuple(10**6 - 100 * j for j in range(layers + 1))
        slow, middle, fast = (PlatformRow(profile("m", (0.001 * speed,) * layers, sizes)) for speed in (3, 2, 1))
    else:
        slow, middle, fast = random_rows(random.Random(layers), layers, exact=False)
    tracemalloc.start()
    try:
        search = CutSearch(slow, middle, fast)
        for family in range(4):
            search.best(family, 1e8, 1e7, 100, objective)
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held_bytes <= search_bytes(layers, objective)


@pytest.mark.parametrize("objective", list(Objective))
def test_the_searches_of_many_devices_of_their_own_make_are_bounded_in_bytes(objective: Objective) -> None:
    layers, devices = 40, 30
    sizes = tuple(1000 + j for j in range(layers + 1))

    def made(name: str) -> ModelProfile:
        rng = random.Random(name)
        return profile("m", tuple(rng.random() for _ in range(layers)), sizes)

    def region(max_search_bytes: int) -> tuple[list[Change], int, int]:
        core = PlannerCore(0, "deepar", objective, components=CoreComponents(max_search_bytes=max_search_bytes))
        for name in ("e1", "e2"):
            core.handle(edge(name, slots=4, models=(made(name),)), 0.0)
        core.handle(cloud(models=(made("c1"),)), 0.0)
        for i in range(devices):
            core.handle(device(f"d{i}", models=(made(f"d{i}"),)), 0.0)
        gc.collect()
        tracemalloc.start()
        try:
            changes, most = [], 0
            for i in range(2 * devices):
                changes += core.handle(task(f"t{i}", f"d{i % devices}", samples=3), 1.0)
                core.handle(completed(f"t{i}", f"d{i % devices}"), 1.0)
                most = max(most, core.search_bytes)
            gc.collect()
            held = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(IN_SEARCH).traces)
        finally:
            tracemalloc.stop()
        return changes, most, held

    few = 8 * search_bytes(layers, objective)
    bounded, most, held = region(few)
    assert most <= few
    assert held <= few
    unbounded, all_of_them, held_then = region(1 << 40)
    assert all_of_them >= 2 * devices * search_bytes(layers, objective)
    assert held_then > 2 * held
    assert bounded == unbounded  # it costs time, not another decision


IN_SEARCH = [tracemalloc.Filter(True, "*/planner/search/cut_search.py", all_frames=False)]


@pytest.mark.parametrize("objective", list(Objective))
def test_overheads_that_were_learned_with_a_higher_latency_take_nothing_from_the_stations(objective: Objective) -> None:
    """A bus that was away for seconds leaves a large latency, and overheads that make up for it."""
    learned = Overheads(0.001, 0.001, (-20.0,) * 4, (-1.0,) * 4)
    assert [learned.total_s(family, 10, objective) for family in range(4)] == [0.0] * 4
    small = Overheads(0.1, 0.1, (-0.05,) * 4, (0.0,) * 4)
    assert small.total_s(2, 1, objective) == pytest.approx(0.35)  # others still reduce the latency
