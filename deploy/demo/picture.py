"""Chart of a demonstration run: the tasks that each node and link worked on, over time."""

from __future__ import annotations

from pathlib import Path

from bus.values import Parts
from deploy.demo.demo import Run

# Okabe and Ito's palette without black; colour-blind people can distinguish it.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_DOES = ("computes", "link 1", "computes", "link 2", "computes", "results back")
ACTIVITIES = dict(zip(Parts.model_fields, _DOES, strict=True))
"""What a node does in each part of the delay."""


def draw_run(run: Run, path: Path) -> None:
    """Draw one row per node and part, one colour per task; the suffix of the path selects PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    rows = sorted(
        {(stretch.node, stretch.part) for stretch in run.stretches if stretch.part != "result_s"},
        key=lambda row: ("dec".index(row[0][0]), row[0], list(ACTIVITIES).index(row[1])),
    )
    tasks = [outcome.task_id for outcome in run.outcomes]
    figure, axes = pyplot.subplots(figsize=(11, 0.9 + 0.38 * len(rows)), layout="constrained")
    for height, row in enumerate(reversed(rows)):
        spans = {task_id: _spans(run, row, task_id) for task_id in tasks}
        lanes = _lanes({task_id: found for task_id, found in spans.items() if found})
        lane_height = 0.8 / (max(lanes.values(), default=0) + 1)
        for index, task_id in enumerate(tasks):
            if task_id not in lanes:
                continue
            axes.broken_barh(
                spans[task_id],
                (height - 0.4 + lanes[task_id] * lane_height, lane_height),
                facecolors=COLOURS[index % len(COLOURS)],
                hatch="//" if index >= len(COLOURS) else None,
                edgecolor="white",
                linewidth=0,
            )
    axes.set_yticks(range(len(rows)), [f"{node} {ACTIVITIES[part]}" for node, part in reversed(rows)])
    axes.set_xlabel("time since the first arrival (s)")
    axes.set_title(f"Work of nodes and links: {len(tasks)} tasks under {run.policy}")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Rectangle(
            (0, 0),
            1,
            1,
            facecolor=COLOURS[i % len(COLOURS)],
            hatch="//" if i >= len(COLOURS) else None,
            edgecolor="white",
        )
        for i in range(len(tasks))
    ]
    axes.legend(handles, tasks, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _spans(run: Run, row: tuple[str, str], task_id: str) -> list[tuple[float, float]]:
    """(begin, length) of every work period of a task in a row; short ones are lengthened to stay visible."""
    return [
        (stretch.begin_s, max(stretch.end_s - stretch.begin_s, 0.004))
        for stretch in run.stretches
        if (stretch.node, stretch.part) == row and stretch.task_id == task_id
    ]


def _lanes(spans: dict[str, list[tuple[float, float]]]) -> dict[str, int]:
    """Assign a lane to each task, so that tasks that overlap in time do not hide each other."""
    lanes: dict[str, int] = {}
    free_s: list[float] = []
    for task_id, found in sorted(spans.items(), key=lambda item: item[1][0]):
        begin_s, end_s = found[0][0], found[-1][0] + found[-1][1]
        lane = next((lane for lane, until_s in enumerate(free_s) if until_s <= begin_s), len(free_s))
        free_s[lane : lane + 1] = [end_s]
        lanes[task_id] = lane
    return lanes
