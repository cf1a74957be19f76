"""The mix of routes is optimal among all pairs of cuts, proved by prices, and never worse than one route."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from bus.values import MAX_ROUTES, Codec, CodecProfile, Objective, PairAgreement, StationSeconds
from planner.search.codec_search import CodecSearch
from planner.search.cost import NO_OVERHEADS, Overheads, PlatformRow
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from planner.search.route_search import Mix, RouteSearch, Way
from tests.unit.planner.scenes import profile, random_overheads, random_rows

FAMILIES = (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
CASES = 1_500
PIPELINED = Objective.PIPELINED


class _Case:
    """A model on three platforms, and one question to its searches."""

    def __init__(self, seed: int, *, exact: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        rows = random_rows(rng, rng.randrange(1, 12), exact=exact)
        self.cuts = CutSearch(*rows)
        self.search = RouteSearch(self.cuts)
        self.layers = rows[0].layers
        self.links = (rng.randrange(1_000_000, 10**9), rng.randrange(1_000_000, 10**9))
        if exact:
            self.links = (1 << rng.randrange(14, 23), 1 << rng.randrange(14, 23))
        self.samples = rng.choice((1, 2, 7, 50, 1_000))
        self.input_bytes = rng.choice((None, rng.randrange(1, 2_000_000)))
        self.device_free = rng.random() < 0.8
        self.alone = rng.random() < 0.8
        self.overheads = random_overheads(rng)

    def mix(self, family: int, links: tuple[int, int] | None = None) -> Mix | None:
        b1, b2 = links or self.links
        return self.search.best(
            family, b1, b2, self.samples, self.input_bytes, self.device_free, self.overheads, self.alone
        )

    def single_s(self, family: int) -> float | None:
        found = self.cuts.best(
            family, *self.links, self.samples, PIPELINED, self.input_bytes, self.device_free, self.overheads
        )
        return None if found is None else found[0]

    def ways(self, family: int) -> list[Way]:
        """Every route that a mix of this family may use, straight from the definition."""
        allowed = [cut for cut in range(self.layers + 1) if cut not in self.cuts.forbidden]
        ways = [Way(cut1, cut2) for cut1 in allowed for cut2 in allowed if cut1 <= cut2]
        return [
            way
            for way in ways
            if (way.cut1 == 0 or self.device_free)
            and (self.alone if way.cut1 == self.layers else family in (self.family(way), ALL_THREE))
        ]

    def family(self, way: Way) -> int:
        return family_of(way.cut1, way.cut2, self.layers)

    def times(self, way: Way) -> tuple[float, StationSeconds]:
        """F_r and the station times of a route."""
        parts = self.cuts.costs.sample_parts(way.cut1, way.cut2, *self.links, self.input_bytes, way.codecs)
        return sum(parts) + self.overheads.total_s(self.family(way), self.samples, PIPELINED), parts


def _check(case: _Case, mix: Mix, ways: list[Way]) -> None:
    """The mix is what it says, and its prices prove that no shares of any routes have a lower objective."""
    more = case.samples - 1
    assert min(mix.prices) >= 0
    assert sum(mix.prices) == pytest.approx(more, rel=1e-12)
    bound = min(
        fill + sum(price * time for price, time in zip(mix.prices, stations, strict=True))
        for fill, stations in map(case.times, ways)
    )
    assert mix.objective_s - bound <= 1e-11 * mix.objective_s
    assert 0 <= mix.gap <= 1e-11
    shares = [route.share for route in mix.routes]
    assert len(mix.routes) <= MAX_ROUTES
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1.0, rel=1e-12)
    assert shares == sorted(shares, reverse=True)
    used = [Way(route.cut1, route.cut2, route.codecs) for route in mix.routes]
    assert set(used) <= set(ways)
    times = [case.times(way) for way in used]
    slowest = max(
        sum(share * stations[k] for share, (_, stations) in zip(shares, times, strict=True)) for k in range(7)
    )
    through = [fill for way, (fill, _) in zip(used, times, strict=True) if way.cut1 < case.layers]
    assert mix.delay_s == pytest.approx(max(through) + more * slowest, rel=1e-12)
    objective = sum(share * fill for share, (fill, _) in zip(shares, times, strict=True)) + more * slowest
    if len(used) > 1:
        assert mix.objective_s == pytest.approx(objective, rel=1e-12)
    else:
        assert mix.objective_s <= objective * (1 + 1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_prices_prove_that_no_mix_of_any_routes_is_better(exact: bool) -> None:
    """Tiers in any order of speed, forbidden positions, busy devices, latencies and overheads, inputs of their own size.

    `exact` cases are of few binary fractions, so that ties abound.
    """
    mixed = 0
    for seed in range(CASES):
        case = _Case(seed, exact=exact)
        for family in FAMILIES:
            mix, single_s = case.mix(family), case.single_s(family)
            assert (mix is None) == (single_s is None), f"seed {seed}"
            if mix is None or single_s is None:
                continue
            try:
                _check(case, mix, case.ways(family))
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, family {family}: {mix}") from error
            assert mix.delay_s <= single_s
            assert mix.bound_s <= mix.delay_s * (1 + 1e-12)
            mixed += len(mix.routes) > 1
    assert mixed > CASES / 2


def test_a_mix_is_never_worse_than_any_single_route_of_its_family() -> None:
    for seed in range(CASES):
        case = _Case(seed)
        mix = case.mix(ALL_THREE)
        if mix is None:
            continue
        for family in FAMILIES:
            single_s = case.single_s(family)
            assert single_s is None or mix.objective_s <= single_s * (1 + 1e-12), f"seed {seed}, family {family}"


def test_the_objective_never_rises_with_a_grant_or_with_more_routes() -> None:
    for seed in range(300):
        case = _Case(seed)
        for family in FAMILIES:
            b1, b2 = case.links
            grants = [(b1, b2)]
            for _ in range(6):
                grants.append(
                    tuple(max(1, int(bps / case.rng.choice((1, 1, 1.0001, 1.5, 30)))) for bps in grants[-1])  # type: ignore[arg-type]
                )
            found = [mix for links in grants if (mix := case.mix(family, links)) is not None]
            for more, less in pairwise(found):
                assert more.objective_s <= less.objective_s * (1 + 1e-12), f"seed {seed}, family {family}"
            assert all(found[0].bound_s <= mix.delay_s * (1 + 1e-12) for mix in found), f"seed {seed}, family {family}"
            whole = case.mix(family)
            case.alone = False
            fewer = case.mix(family)
            assert (whole is None) == (fewer is None)
            assert whole is None or fewer is None or whole.objective_s <= fewer.objective_s * (1 + 1e-12)
            case.alone = True


@pytest.mark.parametrize("seed", range(15))
def test_equals_another_solver(seed: int) -> None:
    case = _Case(seed)
    for family in FAMILIES:
        mix = case.mix(family)
        if mix is None:
            continue
        times = [case.times(way) for way in case.ways(family)]
        other = linprog(
            [*(fill for fill, _ in times), case.samples - 1],
            A_ub=np.hstack([np.array([stations for _, stations in times]).T, -np.ones((7, 1))]),
            b_ub=np.zeros(7),
            A_eq=[[1.0] * len(times) + [0.0]],
            b_eq=[1.0],
            method="highs",
        )
        assert mix.objective_s == pytest.approx(other.fun, rel=1e-8)


def test_routes_that_load_different_stations_are_mixed() -> None:
    """Two layers: the device needs 1 s for each, the edge 0.5 s; everything that crosses link 1 takes 1 s."""
    device, edge = PlatformRow(profile("m", (1.0, 1.0), (1, 1, 0))), PlatformRow(profile("m", (0.5, 0.5), (1, 1, 0)))
    search = RouteSearch(CutSearch(device, edge, None))
    mix = search.best(DEVICE_EDGE, 8, 0, 301)
    assert mix is not None
    # a third on the device (2 s), two thirds through the edge (1 s on the link): each station works 2/3 s a sample
    assert [(route.cut1, route.cut2) for route in mix.routes] == [(0, 2), (2, 2)]
    assert [route.share for route in mix.routes] == pytest.approx([2 / 3, 1 / 3])
    assert mix.objective_s == pytest.approx(2.0 + 300 * 2 / 3)
    assert mix.delay_s == pytest.approx(2.0 + 300 * 2 / 3)
    busy = search.best(DEVICE_EDGE, 8, 0, 301, device_free=False)
    assert busy is not None
    assert busy.routes == ((0, 2, 1.0, (Codec.RAW, Codec.RAW)),)
    assert busy.delay_s == 2.0 + 300
    assert search.best(DEVICE, 8, 0, 301) is None
    assert search.best(ALL_THREE, 8, 8, 301) is None


def test_one_route_is_kept_where_its_prediction_is_less() -> None:
    """For 2 samples the mix has the lower objective, but the slowest of its routes takes longer than the best one alone."""
    kept = 0
    for seed in range(CASES):
        case = _Case(seed)
        case.samples = 2
        for family in FAMILIES:
            mix, single_s = case.mix(family), case.single_s(family)
            if mix is not None and single_s is not None and len(mix.routes) == 1 and mix.delay_s == single_s:
                kept += mix.objective_s < single_s * (1 - 1e-6)
    assert kept > 20


def test_searches_do_not_depend_on_earlier_ones() -> None:
    for seed in range(100):
        case = _Case(seed)
        wanted = [case.mix(family) for family in FAMILIES]
        used = RouteSearch(case.cuts)
        for family in FAMILIES:
            used.best(family, 1e7, 1e6, 100, 123_456)
            used.best(family, 1e7, 1e6, 100, None, False)
        case.search = used
        assert [case.mix(family) for family in FAMILIES] == wanted


# --- codecs --------------------------------------------------------------------------------------------------------------


def _coded_rows(rng: random.Random) -> tuple[PlatformRow, PlatformRow, PlatformRow]:
    layers = rng.randrange(1, 7)
    sizes = tuple(rng.randrange(10_000, 1_000_000) for _ in range(layers + 1))
    codecs = tuple(
        CodecProfile(
            position=position,
            codec=codec,
            bytes=rng.randrange(1_000, sizes[position]),
            encode_s=rng.random() * 0.003,
            decode_s=rng.random() * 0.003,
            agreement=None if codec.lossless else rng.choice((0.9, 0.99, 1.0)),
        )
        for position in range(layers)
        for codec in (Codec.ZSTD, Codec.Q8)
        if rng.random() < 0.7
    )
    pairs = tuple(
        PairAgreement(position1=one, codec1=Codec.Q8, position2=two, codec2=Codec.Q8, agreement=rng.choice((0.9, 1.0)))
        for one in range(layers)
        for two in range(one + 1, layers)
    )

    def row() -> PlatformRow:
        times = tuple(rng.random() * 0.01 for _ in range(layers))
        return PlatformRow(profile("m", times, sizes).model_copy(update={"codecs": codecs, "agreements": pairs}))

    return row(), row(), row()


def test_routes_with_codecs_are_mixed_optimally() -> None:
    coded = 0
    for seed in range(200):
        case = _Case(seed)
        rows = _coded_rows(case.rng)
        coding = CodecSearch(rows, case.rng.choice((None, 0.95)))
        case.cuts = CutSearch(*rows)  # the costs of the same rows
        case.layers, case.search = rows[0].layers, RouteSearch(coding)
        plain = RouteSearch(case.cuts)
        for family in FAMILIES:
            mix = case.mix(family)
            uncoded = plain.best(
                family, *case.links, case.samples, case.input_bytes, case.device_free, case.overheads, case.alone
            )
            if mix is None or uncoded is None:
                assert mix is uncoded is None
                continue
            ways = [Way(case.layers, case.layers)] if case.alone and case.device_free else []
            for one in FAMILIES if family == ALL_THREE else (family,):
                found = coding.ways(one)
                assert found is not None
                ways += [
                    Way(cut1, cut2, (codec1, codec2))
                    for (cut1, codec1), (cut2, codec2) in zip(found.first, found.second, strict=True)
                    if (cut1 == 0 or case.device_free)
                    and (cut1 or codec1 is Codec.RAW or case.input_bytes in (None, rows[0].cut_bytes[0]))
                ]
            _check(case, mix, ways)
            assert mix.objective_s <= uncoded.objective_s * (1 + 1e-12)
            coded += any(route.codecs != (Codec.RAW, Codec.RAW) for route in mix.routes)
    assert coded > 100


def test_overheads_of_the_device_alone_count_for_its_samples() -> None:
    """The device alone costs 10 s more for a task, so a mix with half of the samples there has 5 s more in its objective."""
    row = PlatformRow(profile("m", (1.0, 1.0), (1, 1, 0)))
    search = RouteSearch(CutSearch(row, PlatformRow(profile("m", (0.0, 0.0), (1, 1, 0))), None))
    without = search.best(DEVICE_EDGE, 4, 0, 1_001)
    more = search.best(DEVICE_EDGE, 4, 0, 1_001, overheads=Overheads(task_s=(10.0, 0.0, 0.0, 0.0)))
    assert without is not None
    assert more is not None
    assert [route.share for route in without.routes] == pytest.approx([0.5, 0.5])
    assert more.routes == without.routes
    assert more.objective_s == pytest.approx(without.objective_s + 5.0)
    assert more.delay_s == pytest.approx(without.delay_s)
    assert search.best(DEVICE_EDGE, 4, 0, 1_001, overheads=NO_OVERHEADS) == without
