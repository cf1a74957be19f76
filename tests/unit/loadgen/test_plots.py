"""The looks of policies in pictures."""

from __future__ import annotations

from loadgen import plots
from loadgen.experiments.figure_result import RAW
from loadgen.experiments.figures_multi import SEQUENTIAL
from planner.search.policies import BUILT_IN


def test_policies_that_a_picture_may_compare_differ_in_colour_marker_and_label() -> None:
    names = [*BUILT_IN, SEQUENTIAL, RAW]
    looks = [plots.look(name) for name in names]
    assert len({colour for colour, _, _ in looks}) == len(names)
    assert len({marker for _, _, marker in looks}) == len(names)
    assert all(plots.label(name) != name for name in names)
