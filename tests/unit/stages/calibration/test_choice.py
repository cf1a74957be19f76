"""Which codecs and positions are announced, and which pairs are measured."""

from __future__ import annotations

import random

from bus.values import Codec, CodecProfile
from stages.calibration.choice import by_usefulness, worth_pairing, worth_using

ZSTD, Q8, Q4 = Codec.ZSTD, Codec.Q8, Codec.Q4


def coded(codec: Codec, size: int, agreement: float | None = None, position: int = 1) -> CodecProfile:
    return CodecProfile(position=position, codec=codec, bytes=size, encode_s=1e-6, decode_s=1e-6, agreement=agreement)


def test_a_codec_must_save_bytes_and_a_lossy_one_more_than_a_lossless_one() -> None:
    assert worth_using([coded(ZSTD, 96), coded(Q8, 25, 1.0), coded(Q4, 10, 0.5)], 100) == [
        coded(Q8, 25, 1.0),
        coded(Q4, 10, 0.5),
    ]
    assert worth_using([coded(ZSTD, 40), coded(Q8, 40, 1.0), coded(Q4, 20, 0.9)], 100) == [
        coded(ZSTD, 40),
        coded(Q4, 20, 0.9),
    ]
    assert worth_using([coded(ZSTD, 120), coded(Q8, 99, 1.0)], 100) == []
    assert worth_using([coded(ZSTD, 0), coded(Q8, 0, 1.0)], 0) == []  # where nothing crosses, nothing is encoded


def test_the_best_cut_at_any_bandwidth_and_ratio_of_speeds_is_among_the_first() -> None:
    rng = random.Random(4)
    for _ in range(50):
        count = rng.randint(1, 12)
        work = sorted(rng.random() for _ in range(count))
        sizes = [rng.random() for _ in range(count)]
        ranked = by_usefulness(work, sizes)
        assert sorted(ranked) == list(range(count))
        best = {
            min(range(count), key=lambda at: weight * work[at] + sizes[at])
            for weight in (rng.uniform(-20, 20) for _ in range(300))
        }
        assert best <= set(ranked[: _hull_size(work, sizes)])


def _hull_size(work: list[float], sizes: list[float]) -> int:
    """Corners of the lower hull: points that no chord of two others passes below."""
    points = list(zip(work, sizes, strict=True))
    return sum(
        not any(
            a[0] <= x <= b[0] and a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) <= y
            for a in points
            for b in points
            if a[0] < b[0] and (x, y) not in (a, b)
        )
        for x, y in points
    )


def test_equal_points_are_all_ranked() -> None:
    assert sorted(by_usefulness([0.0, 0.0, 1.0], [5.0, 5.0, 5.0])) == [0, 1, 2]
    assert by_usefulness([], []) == []


def test_pairs_are_measured_for_the_most_useful_positions_within_the_limit() -> None:
    crossings = [coded(codec, 10, 0.99, position) for position in range(4) for codec in (Q8, Q4)]
    assert worth_pairing(crossings, [2, 0, 3, 1], 24) == crossings
    assert {one.position for one in worth_pairing(crossings, [2, 0, 3, 1], 12)} == {0, 2, 3}
    assert {one.position for one in worth_pairing(crossings, [2, 0, 3, 1], 11)} == {0, 2}
    poor = [coded(Q4, 10, 0.6, 1), coded(Q8, 10, 0.999, 1), coded(ZSTD, 50, None, 1)]
    assert worth_pairing(poor, [1], 10) == [poor[1]]
