"""Ranges of finished samples: exactly the samples that were added, in memory for the gaps only."""

from __future__ import annotations

import random

from stages.sample_ranges import SampleRanges


def test_it_is_the_set_of_what_was_added_whatever_the_order() -> None:
    for seed in range(50):
        draw = random.Random(seed)
        found, wanted = SampleRanges(), set[int]()
        for _ in range(draw.randrange(200)):
            sample = draw.randrange(120)
            found.add(sample)
            wanted.add(sample)
            assert len(found) == len(wanted)
        assert {sample for sample in range(-1, 121) if sample in found} == wanted
        gaps = sum(sample - 1 not in wanted for sample in wanted)
        assert found.ranges == gaps


def test_samples_in_order_need_one_range_and_gaps_close() -> None:
    found = SampleRanges()
    found.update(range(1_000, 100_000))
    assert (len(found), found.ranges) == (99_000, 1)
    assert 999 not in found
    found.update([100_001, 100_003])
    assert found.ranges == 3
    found.update([100_002, 100_000, 100_000])
    assert (len(found), found.ranges) == (99_004, 1)
