"""Sweeps: every combination of parameter values, policies and seeds, as one tidy CSV and a page of small multiples.

A row is appended as soon as its run is done, so an interrupted sweep resumes. Each row has the key of its run
(`loadgen.experiments.run_key`), a hash of everything that the run depends on. A row is reused only if its key is equal, so
runs with a changed policy, profile or version are repeated. A file of another scenario is rejected. At the end the file is
written again in the order of the sweep, so the same sweep always gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bus.errors import ConfigError, unknown_name
from loadgen import plots
from loadgen.experiments.figure_result import POLICIES, RAW
from loadgen.experiments.run_key import KEY_DIGITS, RunKeys
from loadgen.experiments.runs import Cell, Workers, run_as_completed, run_cell
from loadgen.replay.metrics import half_width_95
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import FIELDS, Scenario, coerce

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.figure import Figure

MAX_RUNS = 1_000_000
MAX_PANELS = 24
KEY_COLUMN = "run_key"


@dataclass(frozen=True, slots=True)
class Axis:
    """One parameter and its values, as the user wrote them."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """`devices=20:200:20` (both ends included), `edges=10,40`, `reachable=1,2,all`,
        `samples=1..10,1..1000`.

        Raises `ConfigError` naming the fault.
        """
        name, equals, what = text.partition("=")
        name = name.strip()
        if not equals or not what.strip():
            raise ConfigError(f"--vary {text}: write it like devices=20:200:20 or edges=10,40")
        if name in ("policy", "seed", "name"):
            raise ConfigError(f"--vary {name}: use {'--policies' if name == 'policy' else '--seeds'}")
        if name not in FIELDS:
            raise unknown_name("parameter of a scenario called", name, sorted(FIELDS))
        values = tuple(_values(name, what))
        for value in values:
            coerce(name, value)
        return cls(name, values)


def _values(name: str, what: str) -> Iterable[Any]:
    if ":" in what and "," not in what:
        parts = what.split(":")
        try:
            low, high = float(parts[0]), float(parts[1])
            step = float(parts[2]) if len(parts) > 2 else 1.0
        except (ValueError, IndexError):
            raise ConfigError(f"--vary {name}={what}: a range is START:END:STEP in numbers") from None
        if not all(map(math.isfinite, (low, high, step))):
            raise ConfigError(f"--vary {name}={what}: a range is START:END:STEP in finite numbers")
        if len(parts) > 3 or not (step > 0 and low <= high):
            raise ConfigError(f"--vary {name}={what}: a range is START:END:STEP, rising")
        if not (high - low) / step < MAX_RUNS:
            raise ConfigError(f"--vary {name}={what}: more than {MAX_RUNS:,} values")
        if (high - low) / step >= MAX_RUNS:
            raise ConfigError(f"--vary {name}={what}: more than {MAX_RUNS:,} values", remedy="use a larger step")
        count = int((high - low) / step + 1e-9) + 1
        for value in (low + index * step for index in range(count)):
            yield int(value) if value == int(value) else value
    else:
        yield from (value.strip() for value in what.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """The runs of a sweep and the folder for its files."""

    out: Path  # sweep.csv, sweep.png, sweep.svg, sweep.json
    scenario: Scenario = field(default_factory=Scenario)  # base scenario that the axes change
    axes: tuple[Axis, ...] = ()
    policies: tuple[str, ...] = POLICIES
    seeds: int = 10
    jobs: int = 1
    cluster: str | None = None  # address of a Dask scheduler
    run: Callable[[Cell], dict[str, Any]] = run_cell  # runs one cell
    progress: Callable[[int, int], None] | None = None  # (runs done, runs in all)

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """The runs of one point by name, with what they change in the scenario: each policy, and `deepar` without codecs."""
        found: dict[str, dict[str, Any]] = {policy: {"policy": policy} for policy in self.policies}
        if self.scenario.codecs and "deepar" in found and not any(axis.name == "codecs" for axis in self.axes):
            found[RAW] = {"policy": "deepar", "codecs": False, "min_agreement": None}
        return found


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The result of a sweep."""

    rows: list[dict[str, Any]]  # in the order of the sweep
    files: list[Path]
    reused: int  # rows taken from an earlier sweep
    stale: int  # rows of an earlier sweep whose policy, profile or code has changed; they ran again
    notes: tuple[str, ...] = ()  # what is assumed

    @property
    def incomplete(self) -> list[dict[str, Any]]:
        """Runs in which not every task completed; their means cover the completed tasks."""
        return [row for row in self.rows if row["completed"] < row["tasks"]]


def sweep(options: SweepOptions, keys: RunKeys | None = None) -> SweepResult:
    """Run the cells that have no row yet. Raises `ConfigError`."""
    cells = cells_of(options)
    keys = keys or RunKeys()
    wanted = [keys.key(cell) for cell in cells]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sweep.csv"
    names = [axis.name for axis in options.axes]
    before = _resume(options, path, names, set(wanted))
    found = {index: before.valid[key] | cells[index].labels for index, key in enumerate(wanted) if key in before.valid}
    missing = [index for index in range(len(cells)) if index not in found]
    reused, stale = len(found), sum(_place(cells[index], names) in before.stale for index in missing)
    if options.progress is not None:
        options.progress(len(found), len(cells))
    workers = Workers(options.jobs, options.cluster, options.run)
    runs = run_as_completed([cells[index] for index in missing], workers)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for position, run in runs:
            index = missing[position]
            row = {**run, KEY_COLUMN: wanted[index]}
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
            writer.writerow(row)
            file.flush()
            found[index] = row
            if options.progress is not None:
                options.progress(len(found), len(cells))
    rows = [found[index] for index in range(len(cells))]
    _rewrite(path, rows)
    pictures = plots.save(picture(options, rows), options.out / "sweep") if options.axes else []
    return SweepResult(rows, [path, options.out / "sweep.json", *pictures], reused, stale, _notes(cells))


def _notes(cells: Iterable[Cell]) -> tuple[str, ...]:
    """What the codecs of the runs are, where they were not measured on the models themselves."""
    profiles = dict.fromkeys(cell.scenario.profile for cell in cells if cell.scenario.codecs)
    return tuple(filter(None, (platforms(profile, codecs=True).assumed for profile in profiles)))


def cells_of(options: SweepOptions) -> list[Cell]:
    """Every cell: the axes in the order given, then policies, then seeds. Raises `ConfigError`."""
    if options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: at least one")
    total = int(np.prod([len(axis.values) for axis in options.axes], initial=1)) * len(options.columns) * options.seeds
    if total > MAX_RUNS:
        raise ConfigError(f"{total:,} runs are more than {MAX_RUNS:,}; vary less at once")
    names = [axis.name for axis in options.axes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--vary {name} is given twice", remedy=f"name all its values at once: --vary {name}=A,B")
    cells = []
    for values in itertools.product(*(axis.values for axis in options.axes)):
        varied = {axis.name: value for axis, value in zip(options.axes, values, strict=True)}
        for column, changes in options.columns.items():
            scenario = options.scenario.varied(**{**varied, **changes})
            labels = {**{name: str(value) for name, value in varied.items()}, "policy": column}
            cells += [Cell(scenario, seed, labels) for seed in range(options.seeds)]
    for scenario in {(cell.scenario.profile, *cell.scenario.models): cell.scenario for cell in cells}.values():
        platforms(scenario.profile, codecs=scenario.codecs).require(scenario.models)
    return cells


def picture(options: SweepOptions, rows: Sequence[dict[str, Any]]) -> Figure:
    """Small multiples: mean delay over the first axis, one line per policy, one panel per value of the other axes."""
    x_axis, others = options.axes[0], options.axes[1:]
    panels = list(itertools.product(*(axis.values for axis in others)))[:MAX_PANELS]
    columns = min(len(panels), len(others[-1].values) if others else 1, 4)
    lines = -(-len(panels) // columns)
    width_in = max(5.5, 3.1 * columns + 0.6)
    fig, grid = plots.figure(width_in, 2.7 * lines + 0.7, lines, columns, sharey=True, sharex=True, squeeze=False)
    xs, numeric = _places(x_axis)
    # The policies are shifted sideways so that their error bars do not overlap.
    gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(xs))]
    dodge = 0.05 * min((gap for gap in gaps if gap > 0), default=1.0)
    for index, panel in enumerate(panels):
        axes = grid[index // columns][index % columns]
        here = {axis.name: str(value) for axis, value in zip(others, panel, strict=True)}
        for number, policy in enumerate(options.columns):
            means: list[float] = []
            errors: list[float | None] = []
            for value in x_axis.values:
                wanted = {**here, x_axis.name: str(value), "policy": policy}
                delays = [
                    float(row["mean_delay_s"])
                    for row in rows
                    if row["mean_delay_s"] not in (None, "") and all(row[k] == v for k, v in wanted.items())
                ]
                means.append(float(np.mean(delays)) if delays else np.nan)
                errors.append(half_width_95(delays))
            colour, _, marker = plots.look(policy, number)
            shift = (number - (len(options.columns) - 1) / 2) * dodge
            axes.errorbar(
                [x + shift for x in xs], means, yerr=plots.error_bars(errors), color=colour, marker=marker, markersize=4.5,
                capsize=2, linewidth=1.3, elinewidth=0.8, label=plots.label(policy),
            )  # fmt: skip
        if here:
            axes.set_title(", ".join(f"{name} = {value}" for name, value in here.items()), fontsize=9)
        if not numeric:
            axes.set_xticks(xs, [str(value) for value in x_axis.values])
        if index // columns == lines - 1 or index + columns >= len(panels):
            axes.set_xlabel(_axis_label(x_axis.name))
        if index % columns == 0:
            axes.set_ylabel("mean delay (s)")
    # The shared axis is complete only after the last panel.
    grid[0][0].set_ylim(0, grid[0][0].get_ylim()[1])
    for index in range(len(panels), lines * columns):
        grid[index // columns][index % columns].set_axis_off()
    handles, names = grid[0][0].get_legend_handles_labels()
    fig.legend(
        handles, names, loc="outside upper center", ncols=min(len(names), 3 if columns < 2 else 6), frameon=False
    )
    return fig


_UNITS = {
    "within_s": "arrivals within (s)",
    "devices": "number of devices",
    "edges": "number of edges",
    "reachable": "reachable edges",
}


def _axis_label(name: str) -> str:
    return _UNITS.get(name, name.replace("_bps", " (bit/s)").replace("_s", " (s)").replace("_", " "))


def _places(axis: Axis) -> tuple[list[float], bool]:
    try:
        return [float(value) for value in axis.values], True
    except ValueError:
        return [float(index) for index in range(len(axis.values))], False


def _place(cell: Cell, names: Sequence[str]) -> tuple[str, ...]:
    """The position of a cell in the sweep, independent of its key."""
    return (*(cell.labels[name] for name in names), cell.labels["policy"], str(cell.seed))


@dataclass(frozen=True, slots=True)
class _Before:
    """Rows of an earlier run of the same sweep."""

    valid: dict[str, dict[str, Any]] = field(default_factory=dict)  # reusable rows by run key
    stale: set[tuple[str, ...]] = field(default_factory=set)  # positions of outdated rows


def _resume(options: SweepOptions, path: Path, names: Sequence[str], wanted: set[str]) -> _Before:
    """Read the existing rows and keep those with a key in `wanted`. Raises `ConfigError` for the file of another sweep."""
    base = {key: value for key, value in asdict(options.scenario).items() if key not in ("name", "policy", *names)}
    print_ = hashlib.sha256(json.dumps(base, sort_keys=True, default=str).encode()).hexdigest()
    record = options.out / "sweep.json"
    described = {"scenario": base, "axes": list(names), "fingerprint": print_}
    if not (path.exists() and path.stat().st_size):
        record.write_text(json.dumps(described, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
        return _Before()
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if (before.get("fingerprint"), before.get("axes")) != (print_, list(names)):
        raise ConfigError(f"{path} holds another sweep", remedy="choose another --out, or remove it to start again")
    with path.open(encoding="utf-8", newline="") as file:
        # A line that a kill cut short has too few columns; its run is repeated.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    valid = [row for row in rows if row.get(KEY_COLUMN) in wanted and row[KEY_COLUMN]]
    _rewrite(path, valid)
    columns = (*names, "policy", "seed")
    # A partial key marks a line that was cut short; rows of old versions have no key.
    stale = [row for row in rows if row not in valid and len(row.get(KEY_COLUMN, "")) in (0, KEY_DIGITS)]
    places = {tuple(row.get(name, "") for name in columns) for row in stale}
    return _Before({row[KEY_COLUMN]: _typed(row, names) for row in valid}, places)


def _typed(row: dict[str, str], names: Sequence[str]) -> dict[str, Any]:
    """A row with the types that `run_cell` returned; `repr` of a float is exact."""
    typed: dict[str, Any] = {}
    for key, value in row.items():
        if key in (*names, "policy", "kinds", KEY_COLUMN):
            typed[key] = value
        elif value == "":
            typed[key] = None
        else:
            typed[key] = int(value) if value.lstrip("-").isdigit() else float(value)
    return typed


def _rewrite(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".csv.part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
