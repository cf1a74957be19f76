"""Planner benchmark (`deepar loadgen bench planner`): time of search, decision and event handling.

* `search`: all cuts of a model for one edge (the four families), against the paper's exhaustive search, on random models.
* `decision`: one arriving task against a loaded ledger: (edges, tasks in flight) in {10, 100, 1000} x {100, 1000,
  10000}, four reachable edges per device, the parameters of Fig. 4, links and slots scaled to the load so that about a third
  of the tasks wait (with less than one task per edge none can wait); one case has the policy `routes`.
  `p50_s` is the time of the decision alone; `handle_p50_s` includes `PlannerCore.handle` and encoding the decision record
  with the state's hash.
* The reference is Algorithm 1 written down literally, kept with the tests; without the tests it is skipped.
  It takes seconds per decision, so only a few are timed, and its decisions are verified to be the same.

All times are processor times of the thread, which exclude preemption. A decision alone is also the best of three, because
it changes no state. Percentiles are over hundreds of different decisions; the ratio to the
reference is taken over the same decisions in one run.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bus import messages
from bus.errors import InvariantError
from bus.messages import Decision, Placed, TaskSubmitted
from bus.values import ModelProfile, Objective
from loadgen.bench.loaded_core import CROWDED, busy_region
from planner.core.core import PlannerCore
from planner.search.cost import PlatformRow
from planner.search.cut_search import CutSearch, exhaustive

LAYERS = (13, 22, 66, 92)
EDGES = (10, 100, 1000)
TASKS_IN_FLIGHT = (100, 1000, 10_000)
FAMILIES = (0, 1, 2, 3)

SEARCH_MODELS = 12
SEARCHES = 60
DECISIONS = 400
REPEATS = 3
"""Repetitions of each decision. Deciding does not change state; the minimum excludes the effect of other processes."""
DECISIONS_OF_MANY = 100
REFERENCE_DECISIONS = 3
REFERENCE_DECISIONS_OF_AIM = 15
"""Decisions of the reference at (100, 1000), the point where the ratio has a goal."""
REFERENCE_MOST_TASKS = 1000

AIMS = {
    "search, 92 layers, sequential": 10e-6,
    "search, 92 layers, pipelined": 50e-6,
    "decision p99, (100, 1000), sequential": 0.1e-3,
    "decision p99, (100, 1000), pipelined": 0.2e-3,
    "decision p99, (10, 1000), sequential": 0.5e-3,
    "decision p99, (10, 1000), pipelined": 0.5e-3,
    "decision p99, (100, 1000), policy routes": 1e-3,
    "handle p99, (100, 1000), sequential": 0.5e-3,
    "handle p99, (100, 1000), pipelined": 0.5e-3,
    "decision median, (1000, 10000) over (10, 100), sequential": 1.5,
    "decision median, (1000, 10000) over (10, 100), pipelined": 1.5,
}
RATIO_AIMS = {"reference": 1000.0, "reference_fast_search": 50.0}


def run(*, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes. Takes one to two minutes of one core."""
    say = progress or (lambda line: None)
    results: list[dict[str, Any]] = []
    for objective in Objective:
        for layers in LAYERS:
            say(f"search, {layers} layers, {objective.value}")
            results.append(search_case(layers, objective, seed))
    reference = load_reference()
    for objective in Objective:
        for edges in EDGES:
            for tasks in TASKS_IN_FLIGHT:
                say(f"decisions, {edges} edges, {tasks} tasks in flight, {objective.value}")
                results.append(decision_case(edges, tasks, objective, seed, reference))
    say("decisions, 100 edges, 1000 tasks in flight, policy routes")
    results.append(decision_case(100, 1000, Objective.PIPELINED, seed, None, "routes"))
    return {
        "bench": "planner",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": aims_of(results),
        "note": ""
        if reference is not None
        else "the tests are not installed, so there is no reference to compare with",
    }


# --- search ----------------------------------------------------------------------------------------------------------


def random_profile(rng: random.Random, layers: int, sizes: tuple[int, ...]) -> ModelProfile:
    """A model whose layers take up to 10 ms, drawn independently for each tier."""
    return ModelProfile(
        model="random",
        sha256="0" * 64,
        platform="random",
        layer_names=tuple(f"layer_{j}" for j in range(1, layers + 1)),
        layer_s=tuple(rng.random() * 0.01 for _ in range(layers)),
        cut_bytes=sizes,
    )


def search_case(layers: int, objective: Objective, seed: int) -> dict[str, Any]:
    """Median time of a search over all four families, and of trying every pair, for the same inputs."""
    rng = random.Random(f"{seed} search {layers}")
    fast, brute = [], []
    for _ in range(SEARCH_MODELS):
        sizes = tuple(rng.randrange(1_000, 1_000_000) for _ in range(layers + 1))
        device, edge, cloud = (PlatformRow(random_profile(rng, layers, sizes)) for _ in range(3))
        search = CutSearch(device, edge, cloud)
        questions = [
            (rng.randrange(20_000_000, 300_000_000), rng.randrange(10_000_000, 50_000_000), rng.randint(1, 1000))
            for _ in range(SEARCHES)
        ]
        best = search.best
        for family in FAMILIES:
            best(family, 1e8, 1e7, 10, objective, 500_000)
        began = time.thread_time()
        for b1, b2, samples in questions:
            for family in FAMILIES:
                best(family, b1, b2, samples, objective, 500_000)
        fast.append((time.thread_time() - began) / SEARCHES)
        b1, b2, samples = questions[0]
        began = time.thread_time()
        wanted = [exhaustive(search.costs, family, b1, b2, samples, objective, 500_000) for family in FAMILIES]
        brute.append(time.thread_time() - began)
        for family, one in enumerate(wanted):
            found = best(family, b1, b2, samples, objective, 500_000)
            if found is None or one is None or abs(found[0] - one[0]) > 1e-12 * one[0]:
                raise InvariantError(f"the search found {found}, trying every pair {one}")
    search_s, brute_s = statistics.median(fast), statistics.median(brute)
    return {
        "layers": layers,
        "objective": objective.value,
        "search_s": search_s,
        "brute_force_s": brute_s,
        "ratio": brute_s / search_s,
    }


# --- decisions -------------------------------------------------------------------------------------------------------


def decision_case(
    edges: int, tasks: int, objective: Objective, seed: int, reference: Any, policy: str = "deepar"
) -> dict[str, Any]:
    """Times of arriving tasks against a ledger with `tasks` in flight."""
    region = busy_region(edges, tasks, objective, seed, policy)
    core = region.core
    decided: list[float] = []
    handled: list[float] = []
    delayed = 0
    slow: dict[str, list[float]] = {"reference": [], "reference_fast_search": []}
    compared = REFERENCE_DECISIONS_OF_AIM if (edges, tasks) == (100, 1000) else REFERENCE_DECISIONS
    count = DECISIONS if tasks / edges < CROWDED else DECISIONS_OF_MANY
    assert core.state_hash  # the service reads the hash after every step
    with no_collection():
        for step in range(count):
            region.one_ends()
            task = region.next_task()
            decided.append(min(_timed(core, task, region.now) for _ in range(REPEATS)))
            if reference is not None and step < compared and tasks <= REFERENCE_MOST_TASKS:
                _compare(reference, core, task, region.now, slow)
            began = time.thread_time()
            changes = core.handle(task, region.now)
            record = messages.encode(
                Decision(
                    region=0,
                    epoch=1,
                    nonce="bench",
                    seq=step + 1,
                    now_s=region.now,
                    inputs={"deepar.tasks": step},
                    changes=tuple(changes),
                    ledger_hash=core.state_hash,
                )
            )
            handled.append(time.thread_time() - began)
            assert record
            region.note(changes)
            delayed += any(isinstance(change, Placed) and change.wait_s > 0 for change in changes)
    if len(core.tasks) != tasks:
        raise InvariantError(f"{len(core.tasks)} tasks in flight, wanted {tasks}")
    core.validate()
    medians = {name: statistics.median(times) if times else None for name, times in slow.items()}
    return {
        "edges": edges,
        "tasks_in_flight": tasks,
        "objective": objective.value,
        "policy": policy,
        "p50_s": _percentile(decided, 50),
        "p99_s": _percentile(decided, 99),
        "handle_p50_s": _percentile(handled, 50),
        "handle_p99_s": _percentile(handled, 99),
        "reference_p50_s": medians["reference"],
        "reference_fast_search_p50_s": medians["reference_fast_search"],
        "same_decisions_p50_s": statistics.median(decided[:compared]),
        "delayed_share": delayed / count,
    }


def _timed(core: PlannerCore, task: TaskSubmitted, now: float) -> float:
    began = time.thread_time()
    core.decide(task, now)
    return time.thread_time() - began


def _compare(reference: Any, core: PlannerCore, task: TaskSubmitted, now: float, slow: dict[str, list[float]]) -> None:
    """Time the reference on the same input. Raises `InvariantError` if it decides differently."""
    request = core.request(task)
    wanted = core.decide(task, now)
    for name, search in (("reference", reference.every_pair), ("reference_fast_search", reference.fast_pair)):
        began = time.thread_time()
        found = reference.place(request, core.ledger, now, device=task.device, search=search)
        slow[name].append(time.thread_time() - began)
        if found != wanted:
            raise InvariantError(f"the planner decided {wanted}, the reference {found}")


def load_reference() -> Any:
    """The literal Algorithm 1 that is kept with the tests, or None if they are not installed."""
    root = str(Path(__file__).parents[2])
    sys.path.insert(0, root)
    try:
        return importlib.import_module("tests.unit.planner.reference")
    except ImportError:
        return None
    finally:
        sys.path.remove(root)


@contextmanager
def no_collection() -> Iterator[None]:
    """Disable the garbage collector, whose pauses depend on the other objects in the process."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


# --- aims ------------------------------------------------------------------------------------------------------------


def aims_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the measurements with their goals."""
    searches = {(row["layers"], row["objective"]): row for row in results if "layers" in row}
    decisions = [row for row in results if "edges" in row]
    cases = {
        (row["edges"], row["tasks_in_flight"], row["objective"]): row for row in decisions if row["policy"] == "deepar"
    }
    found = []
    for row in decisions:
        if row["policy"] == "routes":
            name = f"decision p99, ({row['edges']}, {row['tasks_in_flight']}), policy routes"
            found.append({"name": name, "value": row["p99_s"], "aim": AIMS[name], "pass": row["p99_s"] <= AIMS[name]})
    for objective in ("sequential", "pipelined"):
        middle, crowded = cases[100, 1000, objective], cases[10, 1000, objective]
        growth = cases[1000, 10_000, objective]["p50_s"] / cases[10, 100, objective]["p50_s"]
        for name, value in (
            (f"search, 92 layers, {objective}", searches[92, objective]["search_s"]),
            (f"decision p99, (100, 1000), {objective}", middle["p99_s"]),
            (f"decision p99, (10, 1000), {objective}", crowded["p99_s"]),
            (f"handle p99, (100, 1000), {objective}", middle["handle_p99_s"]),
            (f"decision median, (1000, 10000) over (10, 100), {objective}", growth),
        ):
            found.append({"name": name, "value": value, "aim": AIMS[name], "pass": value <= AIMS[name]})
        for name, aim in RATIO_AIMS.items():
            slow = middle[f"{name}_p50_s"]
            if slow is not None:
                ratio = slow / middle["same_decisions_p50_s"]
                found.append(
                    {
                        "name": f"{name} over the planner, (100, 1000), {objective}",
                        "value": ratio,
                        "aim": aim,
                        "pass": ratio >= aim,
                    }
                )
    return found
