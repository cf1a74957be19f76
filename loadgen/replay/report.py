"""Report files of a replay: `profile_export.jsonl`, `summary.json`, `summary.csv`, and a self-contained `report.html`."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.text.json_text import json_text
from bus.text.units import format_share
from bus.values import DELAY_PARTS, Placement
from loadgen import plots
from loadgen.replay.metrics import PERCENTILES
from loadgen.replay.outcome import Outcome, as_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART_COLOURS = (plots.ORANGE, plots.YELLOW, plots.SKY, plots.GREEN, plots.PURPLE, plots.GREY)
MAX_TABLE_ROWS = 500
"""Maximum number of tasks listed in the HTML report; profile_export.jsonl lists all."""


def write_files(
    directory: Path,
    outcomes: Sequence[Outcome],
    summary: dict[str, Any],
    *,
    began_at: datetime | None = None,
    title: str = "DeePar replay",
) -> list[Path]:
    """Write all files of a replay and return their paths. `began_at` adds wall-clock times to the export."""
    directory.mkdir(parents=True, exist_ok=True)
    export = directory / "profile_export.jsonl"
    with export.open("w", encoding="utf-8") as file:
        for outcome in outcomes:
            file.write(json_text(_stamped(as_row(outcome), began_at)) + "\n")
    as_json = directory / "summary.json"
    as_json.write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
    as_csv = directory / "summary.csv"
    as_csv.write_text(summary_csv(summary), encoding="utf-8")
    report = directory / "report.html"
    report.write_text(html_report(outcomes, summary, title=title, began_at=began_at), encoding="utf-8")
    return [export, as_json, as_csv, report]


def summary_csv(summary: dict[str, Any]) -> str:
    """CSV with columns `group,name,tasks,avg_s,p50_s,p90_s,p99_s,p99_9_s`: all tasks, then per kind, then per model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "name", "tasks", "avg_s", *(f"{name}_s" for name in PERCENTILES)])
    delay = summary["delay_s"]
    writer.writerow(["all", "all", summary["completed"], delay["mean"], *(delay[name] for name in PERCENTILES)])
    for group in ("kind", "model"):
        for name, row in summary[f"by_{group}"].items():
            found = [row[f"{percentile}_s"] for percentile in PERCENTILES]
            writer.writerow([group, name, row["tasks"], row["mean_delay_s"], *found])
    return text.getvalue()


def html_report(
    outcomes: Sequence[Outcome], summary: dict[str, Any], *, title: str, began_at: datetime | None = None
) -> str:
    """A self-contained page with numbers, plots and tasks; it loads no external resources."""
    done = [outcome for outcome in outcomes if outcome.delay_s is not None]
    pictures = []
    if done:
        pictures = [
            ("Delay of each task over the time it was due", _delays(done)),
            ("Share of tasks that were done within a delay", _cumulative(done)),
            ("Delay parts, predicted and measured, mean of the tasks of a kind", _parts(done)),
        ]
    body = [f"<h1>{html.escape(title)}</h1>", _facts(summary, began_at)]
    for group in ("kind", "model"):
        body += [f"<h2>By {group}</h2>", _group_table(summary[f"by_{group}"])]
    for caption, picture in pictures:
        body.append(
            f'<figure><img alt="{html.escape(caption)}" src="{_embedded(picture)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    body += ["<h2>Tasks</h2>", _task_table(outcomes)]
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1b1b1b }}
table {{ border-collapse: collapse; margin: 0.5rem 0 1rem; font-variant-numeric: tabular-nums }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.2rem 0.7rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
.wide {{ overflow-x: auto }} .wide td {{ white-space: nowrap }}
</style></head><body>
{body}
</body></html>
"""


def _facts(summary: dict[str, Any], began_at: datetime | None) -> str:
    delay = summary["delay_s"]
    rows = [
        ("Policy", summary["policy"]),
        ("Seed", summary["seed"]),
        ("Began", began_at.isoformat(timespec="seconds") if began_at else "virtual time"),
        *((name.capitalize(), summary[name]) for name in ("submitted", "completed", "rejected", "failed", "expired")),
        ("Unfinished", summary["unfinished"]),
        ("Mean delay", _span(delay["mean"])),
        *((name.replace("_", "."), _span(delay[name])) for name in PERCENTILES),
        ("Largest", _span(delay["max"])),
        ("Mean wait", _span(summary["wait_s"]["mean"])),
    ]
    if summary["causes"]:
        rows.append(("Causes", ", ".join(f"{cause}: {count}" for cause, count in summary["causes"].items())))
    cells = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _group_table(groups: dict[str, dict[str, Any]]) -> str:
    names = ["mean_delay_s", *(f"{percentile}_s" for percentile in PERCENTILES)]
    head = "<tr><th></th><th>tasks</th><th>mean</th>" + "".join(
        f"<th>{name.replace('_', '.')}</th>" for name in PERCENTILES
    )
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{row['tasks']}</td>"
        + "".join(f"<td>{_span(row[key])}</td>" for key in names)
        + "</tr>"
        for name, row in groups.items()
    ]
    return f"<table>{head}</tr>{''.join(rows)}</table>"


def _cuts(place: Placement) -> str:
    """The layers after which a task is cut; of several routes the numbers of the layers, with their shares."""
    if place.routes is None:
        return f"{place.cut1_name}, {place.cut2_name}"
    return "; ".join(f"{format_share(route.share)} {route.cut1}, {route.cut2}" for route in place.routes)


def _task_table(outcomes: Sequence[Outcome]) -> str:
    columns = ("task", "model", "samples", "kind", "edge", "cuts", "state", "due", "wait", "predicted", "delay")
    rows = []
    for outcome in outcomes[:MAX_TABLE_ROWS]:
        place = outcome.placement
        cells = (
            outcome.task_id,
            outcome.model,
            outcome.samples,
            outcome.kind,
            place.edge or "-" if place else "-",
            _cuts(place) if place else "-",
            f"{outcome.state.value if outcome.state else 'UNFINISHED'} {outcome.cause}".strip(),
            _span(outcome.scheduled_s),
            _span(outcome.wait_s),
            _span(outcome.predicted_delay_s),
            _span(outcome.delay_s),
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    more = len(outcomes) - MAX_TABLE_ROWS
    note = f"<p>{more} more in profile_export.jsonl.</p>" if more > 0 else ""
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>{note}'


def _delays(done: Sequence[Outcome]) -> Figure:
    fig, axes = plots.figure(8.5, 3.6)
    for index, kind in enumerate(sorted({outcome.kind for outcome in done})):
        mine = [outcome for outcome in done if outcome.kind == kind]
        axes.scatter(
            [outcome.scheduled_s for outcome in mine],
            [outcome.delay_s for outcome in mine],
            s=22,
            color=plots.CYCLE[index],
            marker="os^vDPX"[index % 7],
            label=f"{kind} ({len(mine)})",
            alpha=0.85,
            linewidths=0,
        )
    axes.set(xlabel="task due at (s)", ylabel="delay (s)", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return fig


def _cumulative(done: Sequence[Outcome]) -> Figure:
    fig, axes = plots.figure(8.5, 3.6)
    models = sorted({outcome.model for outcome in done})
    for index, model in enumerate(["all", *models] if len(models) > 1 else models):
        delays = sorted(o.delay_s for o in done if o.delay_s is not None and model in ("all", o.model))
        shares = [(rank + 1) / len(delays) for rank in range(len(delays))]
        colour = plots.BLACK if model == "all" else plots.CYCLE[index % len(plots.CYCLE)]
        axes.step([delays[0], *delays], [0.0, *shares], where="post", label=model, color=colour, linewidth=1.6)
    axes.set(xlabel="delay (s)", ylabel="share of tasks", ylim=(0, 1.02))
    if min(o.delay_s for o in done if o.delay_s is not None) > 0:
        axes.set_xscale("log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return fig


def _parts(done: Sequence[Outcome]) -> Figure:
    rows: list[tuple[str, list[float]]] = []
    for kind in sorted({outcome.kind for outcome in done}):
        mine = [outcome for outcome in done if outcome.kind == kind]
        for name in ("predicted", "measured"):
            found = [parts for parts in (getattr(outcome, name) for outcome in mine) if parts is not None]
            if found:
                means = [sum(getattr(parts, f"{part}_s") for parts in found) / len(found) for part in DELAY_PARTS]
                rows.append((f"{kind}, {name}", means))
    fig, axes = plots.figure(8.5, 0.9 + 0.27 * len(rows))
    lefts = [0.0] * len(rows)
    for index, part in enumerate(DELAY_PARTS):
        widths = [means[index] for _, means in rows]
        axes.barh(range(len(rows)), widths, left=lefts, color=PART_COLOURS[index], label=part, height=0.7)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="busy time (s)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return fig


def _embedded(picture: Figure) -> str:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _stamped(row: dict[str, Any], began_at: datetime | None) -> dict[str, Any]:
    if began_at is not None:
        for name in ("scheduled", "submitted", "started", "ended"):
            seconds = row[f"{name}_s"]
            row[f"{name}_at"] = None if seconds is None else (began_at + timedelta(seconds=seconds)).isoformat()
    return row


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.4g} s"
