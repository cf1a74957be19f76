"""The charts of `plan` and `profile`: bounded pictures with readable axes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from bus.values import ModelProfile
from deploy.console_output import plan_chart, profile_chart
from deploy.console_output.plan_chart import cuts_text, draw_plan, plan_figure
from deploy.console_output.profile_chart import profile_figure
from loadgen import plots
from planner.search.profiles import load_profile
from planner.search.what_if import Situation

PAPER = load_profile("paper")


def situation(
    model: str = "alexnet", link1_bps: int = 200_000_000, link2_bps: int = 18_000_000, **more: Any
) -> Situation:
    return Situation(PAPER.device[model], PAPER.edge[model], PAPER.cloud[model], link1_bps, link2_bps, **more)


def profile(layers: int) -> ModelProfile:
    names = tuple(f"network/block_{index}/depthwise_convolution_{index}" for index in range(layers))
    times = tuple(1e-3 * (1 + index % 7) for index in range(layers))
    return ModelProfile(
        model="big", sha256="0" * 64, platform="a machine", layer_names=names, layer_s=times,
        cut_bytes=(1000,) * (layers + 1),
    )  # fmt: skip


def shown(axis: Any) -> list[str]:
    """The labels of the ticks inside the axis."""
    low, high = sorted(axis.get_view_interval())
    inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1.get_text() for tick in inside if tick.label1.get_text()]


def apart(labels: list[Any]) -> bool:
    """Whether no two labels overlap."""
    boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
    return not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("layers", [1, 13, 30, 31, 97, 400])
def test_a_profile_of_many_layers_is_bounded_and_keeps_names(layers: int) -> None:
    fig = profile_figure(profile(layers), [1000 + index for index in range(layers)], "big on a machine")
    fig.draw_without_rendering()
    width_in, height_in = fig.get_size_inches()
    assert width_in <= 13
    assert height_in <= 15
    axis = fig.axes[0].yaxis if layers > profile_chart.MOST_ACROSS else fig.axes[0].xaxis
    names = [label.get_text() for label in axis.get_ticklabels()]
    assert len(names) == -(-layers // -(-layers // profile_chart.MOST_NAMES))
    assert len(set(names)) == len(names)
    assert all(len(name) <= profile_chart.MOST_LETTERS for name in names)
    if layers > profile_chart.MOST_ACROSS:
        assert apart(axis.get_ticklabels())


def test_the_title_and_the_legend_of_a_small_profile_do_not_overlap() -> None:
    fig = profile_figure(profile(5), [1000] * 5, "a long title " * 5)
    fig.draw_without_rendering()
    (legend,) = fig.legends
    assert not legend.get_window_extent().overlaps(fig.axes[0].title.get_window_extent())


@pytest.mark.parametrize("model", ["alexnet", "vgg16", "lenet"])
@pytest.mark.parametrize(
    ("link1_bps", "link2_bps"), [(10**6, 10**6), (2 * 10**8, 18 * 10**6), (10**6, 5 * 10**10), (5 * 10**10, 10**6)]
)
def test_the_axes_of_a_plan_have_four_readable_ticks_or_more(model: str, link1_bps: int, link2_bps: int) -> None:
    fig = plan_figure(situation(model, link1_bps, link2_bps))
    fig.draw_without_rendering()
    left, right = fig.axes
    for axis in (left.yaxis, left.xaxis, right.xaxis):
        assert 4 <= len(shown(axis)) <= 10
    assert apart([label for axes in fig.axes for label in axes.get_xticklabels()])
    assert apart(left.get_yticklabels())


@pytest.mark.parametrize(
    ("low", "high"), [(41.0, 43.0), (0.1, 0.9), (99.0, 101.0), (1e-3, 1e6), (5.0, 5.01), (7.0, 80.0)]
)
def test_a_logarithmic_axis_has_ticks_however_narrow_it_is(low: float, high: float) -> None:
    fig, axes = plots.figure(4.0, 4.0)
    axes.set(yscale="log", ylim=(low, high))
    plots.log_ticks(axes.yaxis, low, high)
    fig.draw_without_rendering()
    labels = shown(axes.yaxis)
    assert len(labels) >= 4
    assert len(set(labels)) == len(labels)
    assert not any("e" in label for label in labels)


def test_the_colours_of_a_plan_touch() -> None:
    fig = plan_figure(situation())
    for axes in fig.axes:
        spans = sorted(tuple(patch.get_extents().intervalx) for patch in axes.patches)
        assert len(spans) > 1
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start == pytest.approx(end)


def test_what_the_legend_of_a_plan_calls_cuts() -> None:
    here = situation()
    last = here.device.layers
    assert cuts_text(here, last, last) == "device alone"
    assert cuts_text(here, 0, last) == "edge alone"
    assert cuts_text(here, 0, 0) == "cloud alone"
    assert cuts_text(here, 3, 3) == "maxpool_1: device, cloud"
    assert cuts_text(here, 0, 3) == "maxpool_1: edge, cloud"
    assert cuts_text(here, 3, last) == "maxpool_1: device, edge"
    assert cuts_text(here, 3, 10) == "maxpool_1, maxpool_3: device, edge, cloud"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plan_is_written_in_each_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"my.plan.{suffix}"
    draw_plan(situation("lenet"), path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 1000


def test_names_lose_their_middle() -> None:
    assert plots.shortened("short", 10) == "short"
    long = plots.shortened("abcdefghijklmnopqrstuvwxyz", 10)
    assert (len(long), long[:3], long[-6:]) == (10, "abc", "uvwxyz")
    assert plan_chart.MOST_LETTERS < profile_chart.MOST_LETTERS
