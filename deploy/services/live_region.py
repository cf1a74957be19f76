"""Regions of real processes for fault injection and benchmarks, optionally with an own broker.

Each process runs `deepar ...` in its own session, so that a Ctrl-C at the terminal reaches only this process. The kernel
kills every process, even a stopped one, when this process ends for any reason.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bus.errors import DeeparError
from deploy.kafka_local.broker import START_LIMIT_S, KafkaBroker
from deploy.kafka_local.child_process import tied_to_us
from loadgen.chaos.live.faults import Target

POLL_S = 0.02
PATIENCE = "60s"
"""Time that a process waits for an unavailable broker at its start."""

KEPT = ("DEEPAR_CACHE_DIR", "DEEPAR_LOG_LEVEL", "DEEPAR_KAFKA_ALLOW_CLEAR_TEXT_PASSWORD", "DEEPAR_KAFKA_REPLICATION")


class ProcessEndedError(DeeparError):
    """A process of the region ended without a signal from the fault injector."""


class RegionCommands(Protocol):
    """Which processes a region has."""

    def commands(self, folder: Path) -> Mapping[str, tuple[Target, list[str]]]:
        """Process name -> its role and the arguments of `deepar`; result files belong in `folder`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOptions:
    """Number of processes of each role, and their speeds."""

    planners: int = 1  # the others stand by
    devices: int = 2
    edges: int = 2
    slots: int = 4  # of each edge
    link1: str = "1Gbps"  # of each edge, to its devices
    link2: str = "100Mbps"  # of each edge, to the cloud
    lease_s: float = 10.0  # of the nodes
    planner_lease_s: float = 5.0
    device_slowdown: float = 800.0
    edge_slowdown: float = 200.0
    cloud_slowdown: float = 100.0

    def commands(self, folder: Path) -> dict[str, tuple[Target, list[str]]]:
        """Process name -> its role and the arguments of `deepar`."""
        lease = ["--model", "lenet", "--lease", f"{self.lease_s}s"]
        cloud = ["stage", "cloud", "--name", "c1", "--slowdown", str(self.cloud_slowdown), *lease]
        found = {"c1": (Target.CLOUD, cloud)}
        for number in range(1, self.planners + 1):
            # A planner that learns would avoid the stage that was just hit, and its recovery could not be seen.
            words = ["planner", "--name", f"p{number}", "--lease", f"{self.planner_lease_s}s", "--no-learn"]
            found[f"p{number}"] = (Target.PLANNER, words)
        for number in range(1, self.edges + 1):
            capacity = ["--slots", str(self.slots), "--link1", self.link1, "--link2", self.link2]
            words = ["stage", "edge", "--name", f"e{number}", "--slowdown", str(self.edge_slowdown), *capacity, *lease]
            found[f"e{number}"] = (Target.EDGE, words)
        for number in range(1, self.devices + 1):
            shown = ["--results", str(result_file(folder, f"d{number}"))]
            words = ["stage", "device", "--name", f"d{number}", "--slowdown", str(self.device_slowdown), *shown, *lease]
            found[f"d{number}"] = (Target.DEVICE, words)
        return found


def result_file(folder: Path, device: str) -> Path:
    """The results file of a device."""
    return folder / f"{device}.jsonl"


@dataclass(slots=True)
class _Member:
    """One process of the region, across restarts."""

    target: Target
    words: list[str]
    log: Path
    running: subprocess.Popen[bytes] | None = None
    may_end: bool = field(default=False)  # a signal asked it to end


class LiveRegion:
    """Implements `loadgen.chaos.live.faults.Machines`. Use it in the main thread, as an async context manager."""

    def __init__(self, options: RegionCommands, folder: Path, bootstrap: str, broker: KafkaBroker | None) -> None:
        """`broker`: a running broker to inject faults into; None if the broker must not be touched."""
        self.folder = folder.absolute()
        self.broker = broker
        # Settings of the user's own services in the environment must not affect these processes.
        own = {name: value for name, value in os.environ.items() if not name.startswith("DEEPAR_") or name in KEPT}
        if broker is not None:
            own = {name: value for name, value in own.items() if not name.startswith("KAFKA_")}
        self._environment = own | {
            "KAFKA_BOOTSTRAP_SERVERS": bootstrap,
            "DEEPAR_BROKER_PATIENCE": PATIENCE,
            "NO_COLOR": "1",
        }
        self._members = {
            name: _Member(target, words, self.folder / f"{name}.log")
            for name, (target, words) in options.commands(self.folder).items()
        }

    def names(self, target: Target) -> Sequence[str]:
        if target is Target.BROKER:
            return ("broker",) if self.broker is not None else ()
        return [name for name, member in self._members.items() if member.target is target]

    def results(self) -> dict[str, Path]:
        return {device: result_file(self.folder, device) for device in self.names(Target.DEVICE)}

    def signal(self, name: str, number: signal.Signals) -> None:
        if name == "broker":
            assert self.broker is not None
            pid = self.broker.pid
            if pid is not None:
                os.kill(pid, number)
            return
        member = self._members[name]
        assert member.running is not None
        member.may_end = member.may_end or number not in (signal.SIGSTOP, signal.SIGCONT)
        member.running.send_signal(number)

    def pid(self, name: str) -> int:
        """The process that runs under this name now."""
        running = self._members[name].running
        assert running is not None
        return running.pid

    async def gone(self, name: str, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        while self._lives(name):
            if time.monotonic() > until_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def start(self, name: str) -> None:
        if name == "broker":
            assert self.broker is not None
            self.broker.stop()  # it has ended; this releases its lock
            self.broker.launch()
            return
        member = self._members[name]
        with member.log.open("ab") as sink:
            member.running = subprocess.Popen(
                tied_to_us([sys.executable, "-m", "deepar", *member.words], number=signal.SIGKILL),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=self.folder,
                start_new_session=True,
            )
        member.may_end = False

    async def broker_answers(self) -> None:
        assert self.broker is not None
        await asyncio.to_thread(self.broker.wait, time.monotonic() + START_LIMIT_S)

    def check(self) -> None:
        for name, member in self._members.items():
            if member.running is not None and not member.may_end and (code := member.running.poll()) is not None:
                raise ProcessEndedError(
                    f"{name} ended unexpectedly with code {code}; last lines of its log:\n{log_tail(member.log)}",
                    remedy=f"see {member.log}",
                )

    def _lives(self, name: str) -> bool:
        if name == "broker":
            return self.broker is not None and self.broker.running
        running = self._members[name].running
        return running is not None and running.poll() is None

    async def __aenter__(self) -> LiveRegion:
        for name in self._members:
            self.start(name)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for member in self._members.values():
            if member.running is not None and member.running.poll() is None:
                member.running.kill()  # works on a stopped process too
        for member in self._members.values():
            if member.running is not None:
                member.running.wait()
        if self.broker is not None and self.broker.pid is not None:
            os.kill(self.broker.pid, signal.SIGCONT)


def log_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a process's log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
