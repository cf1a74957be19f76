"""The search finds what trying every pair finds."""

import random

import pytest

from bus.values import Objective
from planner.search import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, CutSearch, exhaustive, family_of
from tests.unit.planner.scenes import random_rows

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
        found = search.best(family, b1, b2, samples, objective, input_bytes, device_free)
        wanted = exhaustive(search.costs, family, b1, b2, samples, objective, input_bytes, ones, allowed2)
        if exact or found is None or wanted is None:
            assert found == wanted, f"seed {seed}"
            if wanted is not None:
                pairs = [(a, b) for a in ones for b in allowed2 if a <= b and family_of(a, b, layers) == family]
                delays = [search.costs.delay_s(*pair, b1, b2, samples, objective, input_bytes) for pair in pairs]
                ties += delays.count(wanted[0]) > 1
        else:
            assert found[0] == pytest.approx(wanted[0], rel=1e-13), f"seed {seed}"
            assert family_of(found[1], found[2], layers) == family
            assert found[1] in ones
            assert found[2] in allowed2
    assert ties > CASES / 50, "the cases must contain ties"


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
