"""Faults on real processes: kinds, targets, order, and the measured effect of each.

The implementation of `Machines` (`deploy/services/live_region.py`) owns the processes; this module starts none.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bus.errors import ConfigError
from loadgen.random_streams import Streams

FLOW_AIM_S = 1.0
"""Goal of G6: maximum time from broker readiness to the next result."""


class Target(StrEnum):
    """Role that a fault hits; among several edges or devices the seed selects one."""

    PLANNER = "planner"
    DEVICE = "device"
    EDGE = "edge"
    CLOUD = "cloud"
    BROKER = "broker"


class FaultKind(StrEnum):
    """Kind of fault."""

    KILL = "kill"  # SIGKILL, then an immediate restart
    STOP = "stop"  # SIGSTOP, then SIGCONT after `stop_s`
    TERMINATE = "terminate"  # SIGTERM, then a restart once the process has ended


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault."""

    kind: FaultKind
    target: Target

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}"


@dataclass(slots=True)
class FaultRecord:
    """One injected fault and its measurements. Times are seconds."""

    fault: Fault
    name: str  # of the process
    at_s: float  # time since the run began
    recovered_s: float | None = None  # from the end of the fault to the first proof of work
    lost_after_s: float | None = None  # stopped nodes: until the planner declared the node lost
    ready_s: float | None = None  # broker: from the end of the fault until it answered
    flow_after_ready_s: float | None = None  # broker: from its first answer to the next result at a device

    @property
    def line(self) -> dict[str, Any]:
        """The form that `--json` prints."""
        times = {"recovered_s": self.recovered_s}
        if self.fault.target is Target.BROKER:
            times |= {"ready_s": self.ready_s, "flow_after_ready_s": self.flow_after_ready_s}
        elif self.lost_after_s is not None:
            times["lost_after_s"] = self.lost_after_s
        rounded = {key: None if value is None else round(value, 3) for key, value in times.items()}
        what = {"kind": self.fault.kind.value, "target": self.fault.target.value, "name": self.name}
        return what | {"at_s": round(self.at_s, 3)} | rounded


class Machines(Protocol):
    """The processes of a region and its broker, by name."""

    def names(self, target: Target) -> Sequence[str]:
        """Process names of a target; empty for a broker that this run does not own."""

    def results(self) -> dict[str, Path]:
        """Result file of each device."""

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal."""

    async def gone(self, name: str, timeout_s: float) -> bool:
        """Wait until the process has ended; False on timeout."""

    def start(self, name: str) -> None:
        """Restart a process with the same name and data; returns as soon as the process runs."""

    async def broker_answers(self) -> None:
        """Wait until the broker serves."""

    def check(self) -> None:
        """Raise `DeeparError` with the log of a process that ended on its own."""


def every_fault(seed: int) -> list[Fault]:
    """Every kind of fault on every target once, in an order drawn from the seed."""
    faults = [Fault(kind, target) for kind in FaultKind for target in Target]
    order = Streams(seed).stream("faults").permutation(len(faults))
    return [faults[int(index)] for index in order]


def parse_faults(text: str, seed: int) -> list[Fault]:
    """Parse `all`, or a list of kinds, targets and KIND:TARGET: `kill`, `stop,broker`, `kill:edge,stop:cloud`.

    Raises `ConfigError`.
    """
    faults = every_fault(seed)
    if text.strip() == "all":
        return faults
    chosen: set[Fault] = set()
    for word in text.split(","):
        parts = word.strip().split(":")
        found = {fault for fault in faults if set(parts) <= {fault.kind.value, fault.target.value}}
        if not found or len(parts) > 2:
            kinds, targets = ", ".join(FaultKind), ", ".join(Target)
            raise ConfigError(
                f"--faults {word.strip()!r}: unknown fault",
                remedy=f"use all, or a list of {kinds}; {targets}; KIND:TARGET",
            )
        chosen |= found
    return [fault for fault in faults if fault in chosen]


def pick(names: Sequence[str], fault: Fault, seed: int) -> str:
    """The process among several that a fault hits, drawn from the seed."""
    return names[int(Streams(seed).stream(str(fault)).integers(len(names)))]


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50 and p99 of the values that are not None, by nearest rank; None if there are none."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(known, [50, 99], method="inverted_cdf")
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


@dataclass(frozen=True, slots=True)
class FaultTiming:
    """Timing of the faults, in seconds."""

    stop_s: float = 30.0  # from SIGSTOP to SIGCONT
    pause_s: float = 2.0  # undisturbed work before each fault
    grace_s: float = 10.0  # time for a graceful end before the second SIGTERM
    recovery_s: float = 60.0  # time limit for a target to work again


@dataclass(slots=True)
class Findings:
    """Results of a live campaign."""

    seed: int
    faults: list[FaultRecord] = field(default_factory=list)
    verdict: dict[str, Any] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The findings as one JSON object."""
        broker = [record for record in self.faults if record.fault.target is Target.BROKER]
        return {
            "seed": self.seed,
            "faults": [record.line for record in self.faults],
            **self.verdict,
            "recovery_s": percentiles(record.recovered_s for record in self.faults),
            "flow_after_ready_s": percentiles(record.flow_after_ready_s for record in broker),
            "elapsed_s": round(self.elapsed_s, 1),
        }

    @property
    def flows_late(self) -> list[FaultRecord]:
        """Broker faults after which results took longer than the goal to flow again."""
        times = [(record, record.flow_after_ready_s) for record in self.faults]
        return [record for record, flow_s in times if flow_s is not None and flow_s > FLOW_AIM_S]
