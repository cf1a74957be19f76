"""The text around a figure: nothing overlaps, nothing leaves the picture, and a plain figure has none."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from loadgen import plots
from loadgen.experiments import claims
from loadgen.experiments.captions import Caption, finish
from loadgen.experiments.claims import Claim, Reductions

CASES = ("E_i = 1", "E_i = 2", "E_i = all")


def many_claims() -> list[Claim]:
    """Every rule and verdict, in three cases; the widest values that a figure can have."""
    base = np.array([[100.0], [200.0], [300.0]])
    found = Reductions.of(base * (1 - np.array([[0.5], [0.555], [0.9]])), base)
    worse = Reductions.of(base * (1 + np.array([[0.9], [0.25], [0.1]])), base)
    return [
        replace(claim, case=case, fitted=not claim.own)
        for case in CASES
        for claim in (
            claims.over("DeePar's delay below device-only", found, 60),
            claims.up_to("DeePar's delay below device-only", found, 30),
            claims.about("DeePar's delay below device-only", worse, 30),
            claims.is_true("DeePar best of the paper's four", "best", "beaten at some x", False),
            claims.pays("waiting pays: DeePar's delay below no-delay", worse),
            claims.pays("streaming lowers DeePar's delay on the same tasks", found),
        )
    ]


@pytest.mark.parametrize("notes", [(), ("short", "a long note " * 30)])
def test_no_text_overlaps_another_or_leaves_the_picture(notes: tuple[str, ...]) -> None:
    fig, grid = plots.figure(11.0, 3.7, 1, 3, sharey=True, squeeze=False)
    plots.grouped_bars(
        grid[0][0], ["20"], {"device-only": [1.0], "deepar": [0.5]}, {"device-only": [0.1], "deepar": [None]}
    )
    finish(fig, Caption(title="A title", claims=many_claims(), notes=notes), legend=grid[0][0])
    fig.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in fig.texts]
    assert len(boxes) > len(many_claims())
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), (one, other)
    panels = [box for box in (axes.get_tightbbox() for axes in fig.axes) if box is not None]
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= fig.bbox.x1, text
        assert not any(box.overlaps(panel) for panel in panels), text


def test_axes_keep_their_size_whatever_is_written_around_them() -> None:
    heights = []
    for caption in (Caption(title="A", claims=many_claims()), Caption(title="A", plain=True, claims=many_claims())):
        fig, axes = plots.figure(11.0, 3.7)
        finish(fig, caption)
        fig.draw_without_rendering()
        heights.append(axes.get_window_extent().height)
        assert bool(fig.texts) is not caption.plain
    assert heights[0] == pytest.approx(heights[1], rel=0.02)
