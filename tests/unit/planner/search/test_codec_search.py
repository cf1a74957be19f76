"""The search over cuts and codecs finds what trying every way finds."""

from __future__ import annotations

import random
import tracemalloc
from itertools import product

import pytest

from bus.values import Codec, CodecProfile, ModelProfile, Objective, PairAgreement
from planner.search.codec_search import CodecSearch, CodedFound, codec_search_bytes
from planner.search.cost import RAW, Codecs, Crossing, PlatformRow, stations_s
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from planner.search.route_search import RouteSearch, route_search_bytes
from tests.unit.planner.scenes import profile, random_overheads

FAMILIES = (DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
CODED = (Codec.ZSTD, Codec.Q8, Codec.Q4)
CASES = 1_500
Rows = tuple[PlatformRow, PlatformRow, PlatformRow]


def _profiles(rng: random.Random, layers: int, *, exact: bool) -> tuple[ModelProfile, ModelProfile, ModelProfile]:
    """A device, an edge and a cloud with codecs that not all of them have measured, and agreements of some pairs."""
    unit = 128 if exact else 1
    sizes = tuple(unit * (rng.choice((2, 4, 8)) if exact else rng.randrange(1_000, 900_000)) for _ in range(layers + 1))
    forbidden = tuple(sorted({rng.randrange(1, layers) for _ in range(rng.randrange(3))})) if layers > 1 else ()
    measured = {
        (position, codec): (
            unit * rng.choice((1, 2, 4)) if exact else rng.randrange(1, 2 * sizes[position]),
            None if codec.lossless or rng.random() < 0.2 else rng.choice((0.9, 0.99, 0.995, 1.0)),
        )
        for position, codec in product(range(layers), CODED)
        if rng.random() < 0.6
    }
    lossy = [crossing for crossing in measured if not crossing[1].lossless]
    pairs = tuple(
        PairAgreement(position1=p1, codec1=q1, position2=p2, codec2=q2, agreement=rng.choice((0.98, 0.995, 1.0)))
        for (p1, q1), (p2, q2) in product(lossy, lossy)
        if p1 < p2 and rng.random() < 0.5
    )

    def one() -> ModelProfile:
        times = tuple(rng.randrange(4) / 1024 if exact else rng.random() * 0.01 for _ in range(layers))
        codecs = tuple(
            CodecProfile(
                position=position,
                codec=codec,
                bytes=size_bytes,
                encode_s=rng.randrange(3) / 1024 if exact else rng.random() * 0.005,
                decode_s=rng.randrange(3) / 1024 if exact else rng.random() * 0.005,
                agreement=agreement,
            )
            for (position, codec), (size_bytes, agreement) in measured.items()
            if rng.random() < 0.8
        )
        return profile("m", times, sizes, forbidden).model_copy(update={"codecs": codecs, "agreements": pairs})

    return one(), one(), one()


def _rows(rng: random.Random, profiles: tuple[ModelProfile, ModelProfile, ModelProfile]) -> Rows:
    device, edge, cloud = (
        PlatformRow(one, rng.choice((1.0, 1.0, 2.0)), rng.choice((0, 0, 1)) / 1024) for one in profiles
    )
    return device, edge, cloud


def _bare(one: ModelProfile) -> ModelProfile:
    return one.model_copy(update={"codecs": None, "agreements": None})


def _same(one: ModelProfile) -> Rows:
    return PlatformRow(one), PlatformRow(one), PlatformRow(one)


def _usable(ends: tuple[ModelProfile, ...], crossing: Crossing) -> bool:
    """Whether the device, the sender and the receiver have measured a codec, and it makes the activations smaller."""
    sizes = [
        next((one.bytes for one in end.codecs or () if (one.position, one.codec) == crossing), None) for end in ends
    ]
    smaller = sizes[0] is not None and sizes[0] < ends[0].cut_bytes[crossing[0]]
    return smaller and None not in sizes


def _exhaustive(
    profiles: tuple[ModelProfile, ModelProfile, ModelProfile],
    search: CodecSearch,
    family: int,
    bandwidths: tuple[int, int],
    task: tuple[int, Objective, int | None],
    consent: float | None,
    cuts: tuple[list[int], list[int]],
) -> list[CodedFound]:
    """Every allowed way of a family in the order in which ties are decided."""
    device, edge, cloud = profiles
    layers, (samples, objective, input_bytes) = device.layers, task
    own_input = input_bytes in (None, device.cut_bytes[0])
    found = []
    for cut1, codec1, cut2, codec2 in product(cuts[0], Codec, cuts[1], Codec):
        if cut1 > cut2 or family_of(cut1, cut2, layers) != family:
            continue
        relayed = cut1 == cut2
        if codec2 != (codec1 if relayed else codec2 if cut2 < layers else Codec.RAW) or (
            cut1 == layers and codec1 != Codec.RAW
        ):
            continue  # it is the same crossing, or nothing crosses there
        if codec1 != Codec.RAW and (
            (cut1 == 0 and not own_input) or not _usable((device, cloud if relayed else edge), (cut1, codec1))
        ):
            continue
        if not relayed and codec2 != Codec.RAW and not _usable(profiles, (cut2, codec2)):
            continue
        if not (codec1.lossless and codec2.lossless):
            agreement = device.agreement((cut1, codec1), (cut2, codec2))
            if consent is None or agreement is None or agreement < consent:
                continue
        codecs: Codecs = (codec1, codec2)
        one = search.costs.sample_parts(cut1, cut2, *bandwidths, input_bytes, codecs)
        found.append(CodedFound(stations_s(one, samples, objective), cut1, cut2, codecs))
    return found


@pytest.mark.parametrize("objective", list(Objective))
def test_the_search_equals_trying_all_cuts_and_codecs(objective: Objective) -> None:
    """Tiers in any order of speed, forbidden positions, constraints on each cut, inputs of their own size, every consent.

    Most cases are of few binary fractions, so that ties abound: there the ways must be the very same.
    """
    coded = ties = pairs = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        exact = rng.random() < 0.7
        layers = rng.randrange(1, 9)
        profiles = _profiles(rng, layers, exact=exact)
        consent = rng.choice((None, 0.9, 0.99, 0.995, 1.0))
        allowed = [p for p in range(layers + 1) if p not in profiles[0].forbidden]
        ones, twos = ([p for p in allowed if rng.random() < 0.8] for _ in range(2))
        search = CodecSearch(_rows(rng, profiles), consent, ones, twos)
        b1, b2 = (1 << rng.randrange(14, 23) if exact else rng.randrange(10_000, 10**9) for _ in range(2))
        samples, input_bytes = rng.randrange(1, 100), rng.choice((None, None, rng.randrange(1, 100) * 128))
        device_free = rng.random() < 0.8
        overheads = random_overheads(rng)
        for family in FAMILIES:
            found = search.best(family, b1, b2, samples, objective, input_bytes, device_free, overheads)
            tried = _exhaustive(
                profiles,
                search,
                family,
                (b1, b2),
                (samples, objective, input_bytes),
                consent,
                (ones if device_free else [p for p in ones if p == 0], twos),
            )
            if found is None or not tried:
                assert found is None
                assert not tried, f"seed {seed}"
                continue
            wanted = min(tried, key=lambda way: way.delay_s)  # the first of the best
            more_s = overheads.total_s(family, samples, objective)
            coded += wanted.codecs != RAW
            pairs += wanted.cut1 < wanted.cut2 and not any(codec.lossless for codec in wanted.codecs)
            if exact:
                assert found == wanted._replace(delay_s=wanted.delay_s + more_s), f"seed {seed}"
                ties += sum(way.delay_s == wanted.delay_s for way in tried) > 1
            else:
                assert found.delay_s == pytest.approx(wanted.delay_s + more_s, rel=1e-13), f"seed {seed}"
                assert any(found[1:] == way[1:] for way in tried)
    assert coded > CASES / 2
    assert ties > CASES / 20
    assert pairs > CASES / 100


@pytest.mark.parametrize("objective", list(Objective))
def test_without_a_usable_codec_it_finds_what_the_search_of_cuts_finds(objective: Objective) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        one, _, _ = _profiles(rng, rng.randrange(1, 12), exact=True)
        bare = _rows(rng, (_bare(one), _bare(one), _bare(one)))
        for family in FAMILIES:
            arguments = family, 1 << 20, 1 << 18, 10, objective
            cuts = CutSearch(*bare).best(*arguments)
            found = CodecSearch(bare, 0.5).best(*arguments)
            assert (None if found is None else found[:3]) == cuts
            assert found is None or found.codecs == RAW


@pytest.mark.parametrize("objective", list(Objective))
def test_errors_of_two_lossy_crossings_compound(objective: Objective) -> None:
    """Both links are slow, and 4 bits agree alone, but not on both links: the pair that was measured decides."""
    codecs = tuple(
        CodecProfile(position=position, codec=codec, bytes=size, encode_s=0.0, decode_s=0.0, agreement=1.0)
        for position in (1, 2)
        for codec, size in ((Codec.Q8, 200), (Codec.Q4, 100))
    )

    def pair(codec1: Codec, codec2: Codec, agreement: float) -> PairAgreement:
        return PairAgreement(position1=1, codec1=codec1, position2=2, codec2=codec2, agreement=agreement)

    pairs = (pair(Codec.Q4, Codec.Q4, 0.98), pair(Codec.Q4, Codec.Q8, 0.996))
    plain = profile("m", (0.001,) * 3, (8000, 1000, 1000, 1))
    measured = plain.model_copy(update={"codecs": codecs, "agreements": pairs})
    rows = _same(measured)

    def found(consent: float | None) -> Codecs:
        way = CodecSearch(rows, consent).best(ALL_THREE, 1e4, 1e4, 10, objective)
        assert way is not None
        return way.codecs

    assert found(None) == (Codec.RAW, Codec.RAW)
    assert found(0.9) == (Codec.Q4, Codec.Q4)
    assert found(0.995) == (Codec.Q4, Codec.Q8)
    assert sorted(found(0.998)) == [Codec.Q4, Codec.RAW]  # no measured pair agrees enough


@pytest.mark.parametrize("objective", list(Objective))
def test_a_search_of_codecs_holds_no_more_than_it_is_said_to(objective: Objective) -> None:
    layers = 60
    rng = random.Random(layers)
    sizes = tuple(10**6 - 100 * j for j in range(layers + 1))
    codecs = tuple(
        CodecProfile(position=p, codec=q, bytes=10**5, encode_s=0.001, decode_s=0.001, agreement=1.0)
        for p, q in product(range(layers), CODED)
    )
    pairs = tuple(
        PairAgreement(position1=p, codec1=Codec.Q8, position2=p + step, codec2=Codec.Q8, agreement=1.0)
        for p in range(layers - 20)
        for step in range(1, 20)
    )
    times = tuple(rng.random() for _ in range(layers))
    measured = profile("m", times, sizes).model_copy(update={"codecs": codecs, "agreements": pairs})
    rows = _same(measured)
    tracemalloc.start()
    try:
        search = CodecSearch(rows, 0.9)
        for family in FAMILIES:
            assert search.best(family, 1e8, 1e7, 100, objective) is not None
        held_bytes = tracemalloc.get_traced_memory()[0]
        mixes = RouteSearch(search)
        for family in FAMILIES[1:]:
            assert mixes.best(family, 1e8, 1e7, 100) is not None
        more_bytes = tracemalloc.get_traced_memory()[0] - held_bytes
    finally:
        tracemalloc.stop()
    assert held_bytes <= codec_search_bytes(layers, len(codecs))
    assert more_bytes <= route_search_bytes(layers + len(codecs))
