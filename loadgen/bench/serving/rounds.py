"""Rounds of the serving benchmark: every case in turn, several times, so that a drift of the machine falls on all alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from loadgen.bench.serving.callers import Caller, CallFailedError, MakeCaller

WARM_CALLS = 20
"""Calls of each connection before its round is timed."""

CpuSeconds = Callable[[], float]
"""Processor time that the measured server has used so far."""


@dataclass(slots=True)
class Case:
    """A protocol, a server and a model under a number of concurrent clients."""

    protocol: str  # rest-binary, rest-json, grpc, in-process
    server: str  # deepar, interpreter, mlserver, kserve
    model: str
    placement: str
    mode: str  # request, session
    concurrency: int
    input_bytes: int
    make: MakeCaller
    cpu_s: CpuSeconds
    delays_s: list[float] = field(default_factory=list)
    rates_per_s: list[float] = field(default_factory=list)  # one per round
    cpu_per_call_s: list[float] = field(default_factory=list)  # one per round

    def __str__(self) -> str:
        return f"{self.server} {self.protocol} {self.model} x{self.concurrency}"

    @property
    def requests_per_s(self) -> float:
        """The median over the rounds."""
        return median(self.rates_per_s)

    @property
    def cpu_s_per_request(self) -> float:
        """The median over the rounds."""
        return median(self.cpu_per_call_s)

    def quantile_s(self, share: float) -> float:
        """A quantile of the delays of all rounds."""
        ordered = sorted(self.delays_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def as_row(self) -> dict[str, Any]:
        """The row of the report, without a peer."""
        return {
            "protocol": self.protocol,
            "model": self.model,
            "placement": self.placement,
            "mode": self.mode,
            "concurrency": self.concurrency,
            "input_bytes": self.input_bytes,
            "requests_per_s": round(self.requests_per_s, 1),
            "p50_s": self.quantile_s(0.5),
            "p99_s": self.quantile_s(0.99),
            "cpu_s_per_request": self.cpu_s_per_request,
        }


def play(cases: Sequence[Case], *, rounds: int, seconds: float, progress: Callable[[str], None]) -> None:
    """Measure every case in every round; the order rotates. Raises `CallFailedError`."""
    for number in range(rounds):
        shift = number * len(cases) // max(1, rounds)
        for case in (*cases[shift:], *cases[:shift]):
            _measure(case, seconds)
        progress(f"round {number + 1} of {rounds} done")


def _measure(case: Case, seconds: float) -> None:
    """One round of one case: `concurrency` clients, each with one request under way."""
    callers: list[Caller] = []
    failures: list[CallFailedError] = []
    delays_s: list[list[float]] = []
    try:
        callers += (case.make() for _ in range(case.concurrency))
        for caller in callers:
            for _ in range(WARM_CALLS):
                caller.call()
        cpu_s, begin_s = case.cpu_s(), time.perf_counter()
        until_s = begin_s + seconds

        def client(caller: Caller, found: list[float]) -> None:
            now = time.perf_counter()
            try:
                while not found or now < until_s:
                    caller.call()
                    after = time.perf_counter()
                    found.append(after - now)
                    now = after
            except CallFailedError as error:
                failures.append(error)

        threads = []
        for caller in callers:
            delays_s.append([])
            threads.append(threading.Thread(target=client, args=(caller, delays_s[-1]), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - begin_s
        cpu_s = case.cpu_s() - cpu_s
    finally:
        for caller in callers:
            caller.close()
    if failures:
        raise CallFailedError(f"{case}: {failures[0]}")
    calls = sum(map(len, delays_s))
    case.delays_s += [delay for found in delays_s for delay in found]
    case.rates_per_s.append(calls / elapsed_s)
    case.cpu_per_call_s.append(cpu_s / calls)
