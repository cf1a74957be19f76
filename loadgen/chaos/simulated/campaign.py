"""Simulated fault campaign (`deepar simulate chaos`): the real shells and core on `MemoryBus` in virtual time.

A seed determines the tasks, the schedule of faults, the step at which a process dies, and the errors of the bus. After
the faults everything is healed and the region must converge: every acknowledged task ends once, every sample is
delivered once with the right content, the ledger is valid after every record, and no state is left behind.
`loadgen.chaos.simulated.monitor` checks every record, commit and step during the run;
`loadgen.chaos.simulated.final_checks` checks the end state. A failing seed is replayed by its number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from loadgen.chaos.simulated.region import LEASE_S, ChaosScenario
from loadgen.chaos.simulated.run import ChaosRun, Play, Sites
from loadgen.rare_collection import rare_collection
from loadgen.replay.metrics import distribution
from loadgen.sim.process import quiet
from loadgen.sim.programs import REAL, Programs
from loadgen.sim.virtual_loop import run_virtual
from loadgen.workers import worker_pool

CHUNK = 20
"""Number of seeds that a worker process runs before it reports."""
COLLECT_AFTER = 50_000
"""Net allocations between two searches of the garbage collector during a seed."""


def run_seed(
    seed: int, *, scenario: ChaosScenario | None = None, sites: Sites | None = None, programs: Programs = REAL
) -> ChaosRun:
    """Run one seed, including its checks."""
    with quiet(), rare_collection(COLLECT_AFTER):
        return run_virtual(Play(seed, scenario or ChaosScenario(), sites, programs).play(), horizon_s=3_600.0)


def run(
    seeds: Sequence[int],
    *,
    scenario: ChaosScenario | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    programs: Programs = REAL,
) -> dict[str, Any]:
    """Run the seeds in `jobs` processes; returns what `deepar simulate chaos --json` prints, independent of `jobs`."""
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    play = partial(_run_chunk, scenario=scenario, programs=programs)
    found: Iterable[list[ChaosRun]]
    done: list[list[ChaosRun]] = []
    with ExitStack() as stack:
        if jobs <= 1 or len(chunks) < 2:
            found = map(play, chunks)
        else:
            found = stack.enter_context(worker_pool(min(jobs, len(chunks)))).map(play, chunks)
        for runs in found:
            done.append(runs)
            if progress is not None:
                progress(sum(map(len, done)), len(seeds))
    return _summary(done)


def _run_chunk(seeds: Iterable[int], *, scenario: ChaosScenario | None, programs: Programs) -> list[ChaosRun]:
    # Traces are dropped because they are large and the summary does not use them.
    return [replace(run_seed(seed, scenario=scenario, programs=programs), trace=()) for seed in seeds]


def _summary(chunks: Iterable[Sequence[ChaosRun]]) -> dict[str, Any]:
    runs = [run for chunk in chunks for run in chunk]
    silences = [silence for run in runs for silence in run.silences]
    return {
        "seeds": len(runs),
        "simulated_hours": sum(sum(run.virtual_s for run in chunk) for chunk in chunks) / 3600.0,
        "faults": _counted(run.faults for run in runs),
        "violations": [
            violation.as_object(run.seed, f"deepar simulate chaos --seeds 1 --seed {run.seed} --trace -")
            for run in runs
            for violation in run.violations
        ],
        "states": _counted(run.states for run in runs),
        "sessions": sum(run.sessions for run in runs),
        "frames": _counted(run.frames for run in runs),
        "retries": sum(run.retries for run in runs),
        "suppressed_duplicates": sum(run.suppressed for run in runs),
        "rejected_queue_full": sum(run.rejected for run in runs),
        "placements_of_several_routes": sum(run.mixed for run in runs),
        "placements_with_codecs": sum(run.encoded for run in runs),
        "batches_of_several_tasks": _counted(run.batches for run in runs),
        "rerouted": sum(run.rerouted for run in runs),
        "replanned_s": {"times": len(silences), "lease": LEASE_S} | (distribution(silences) if silences else {}),
    }


def _counted(counters: Iterable[Counter[str]]) -> dict[str, int]:
    return dict(sorted(sum(counters, Counter()).items()))
