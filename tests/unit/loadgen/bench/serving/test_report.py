"""The serving benchmark: cases are measured in turn, rows name their peers, and aims can be missed."""

from __future__ import annotations

import itertools

import pytest

from loadgen.bench.serving.callers import CallFailedError
from loadgen.bench.serving.report import aims, rows
from loadgen.bench.serving.rounds import Case, play
from loadgen.bench.serving.streams import Stream


class Counting:
    """A caller that counts its calls; the call with the number `fails_at` fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.closed = 0, 0
        self._fails_at = fails_at

    def call(self) -> None:
        self.calls += 1
        if self.calls == self._fails_at:
            raise CallFailedError("refused")

    def close(self) -> None:
        self.closed += 1


def case(server: str, protocol: str, model: str = "lenet", *, rate: float = 0.0, cpu_s: float = 0.0) -> Case:
    """A case that has been measured."""
    made = Case(protocol, server, model, "device", "session", 1, 3136, Counting, lambda: 0.0)
    made.rates_per_s, made.cpu_per_call_s, made.delays_s = [rate], [cpu_s], [0.001, 0.002, 0.003]
    return made


def test_every_case_is_measured_in_every_round() -> None:
    callers: list[Counting] = []

    def make() -> Counting:
        callers.append(Counting())
        return callers[-1]

    ticks = itertools.count()
    measured = [Case("grpc", "deepar", name, "", "request", 2, 1, make, lambda: float(next(ticks))) for name in "ab"]
    play(measured, rounds=3, seconds=0.001, progress=lambda line: None)
    assert [len(one.rates_per_s) for one in measured] == [3, 3]
    assert len(callers) == 2 * 2 * 3
    assert all(caller.closed == 1 for caller in callers)
    assert all(one.requests_per_s > 0 and one.cpu_s_per_request > 0 for one in measured)


def test_a_request_that_fails_ends_the_measurement_and_closes_the_connections() -> None:
    caller = Counting(fails_at=25)
    failing = Case("grpc", "deepar", "lenet", "", "request", 1, 1, lambda: caller, lambda: 0.0)
    with pytest.raises(CallFailedError, match="refused"):
        play([failing], rounds=1, seconds=10.0, progress=lambda line: None)
    assert caller.closed == 1


def test_rows_are_beside_the_peers_of_the_same_model() -> None:
    ours = case("deepar", "grpc", rate=1000)
    peers = [case("mlserver", "grpc", rate=500), case("mlserver", "grpc", "wide", rate=7)]
    assert [(row["peer"], row["peer_requests_per_s"]) for row in rows([ours, *peers])] == [("mlserver grpc", 500.0)]
    assert [row["peer"] for row in rows([ours])] == [None]


def judged(*cases: Case) -> dict[str, bool]:
    return {aim["name"]: aim["pass"] for aim in aims(cases, ())}


def test_aims_of_rates_and_processor_time_pass_and_fail() -> None:
    peer, whole = case("mlserver", "grpc", rate=500), case("interpreter", "in-process", cpu_s=0.0001)
    good = judged(peer, whole, case("deepar", "rest-binary", rate=1300, cpu_s=0.0005))
    bad = judged(peer, whole, case("deepar", "rest-binary", rate=1200, cpu_s=0.0006))
    assert set(good) == set(bad)
    assert list(good.values()) == [True, True]
    assert list(bad.values()) == [False, False]


def stream(mode: str, delay_s: float, *, sent: int = 2, stations_s: float = 0.01) -> Stream:
    return Stream(mode, 30.0, sent=sent, delays_s=[delay_s, delay_s], stations_s=[stations_s, stations_s])


def test_aims_of_sessions_pass_and_fail() -> None:
    good = aims((), [stream("session", 0.02), stream("request", 0.07)])
    assert [aim["pass"] for aim in good] == [True, True, True]
    bad = aims((), [stream("session", 0.04, sent=3), stream("request", 0.07)])
    assert [aim["pass"] for aim in bad] == [False, False, False]
