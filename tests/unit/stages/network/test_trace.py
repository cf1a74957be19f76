"""Traces: what a file may hold, and what is wrong with others, by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.errors import ConfigError
from stages.network.played import PlayedNetwork
from stages.network.trace import Trace, parse_trace, read_trace

RECORDED = sorted((Path(__file__).parents[3] / "data" / "traces").glob("*.csv"))


def test_a_row_holds_until_the_next_one_and_the_trace_repeats() -> None:
    trace = parse_trace("t", ["t_s,bps,latency_s", "0,1000,0.5", "", "# a comment", "2.5, 0, 0.1", "4,9,9"])
    assert [(row.bps, row.duration_s) for row in trace.rows] == [(1000, 2.5), (0, 1.5)]
    assert trace.period_s == 4
    moments = (0.0, 2.4, 2.5, 3.9, 4.0, 6.4, 6.5, 4e6, 4e6 + 2.5)
    assert [trace.latency_s(moment) for moment in moments] == [0.5, 0.5, 0.1, 0.1, 0.5, 0.5, 0.1, 0.5, 0.1]
    assert trace.mean_latency_s == pytest.approx((2.5 * 0.5 + 1.5 * 0.1) / 4)


def test_the_latency_may_be_left_out_and_given_apart() -> None:
    trace = parse_trace("t", ["t_s,bps", "0,1000", "1,1000"])
    assert PlayedNetwork(0.02, trace).latency_at(0.5) == 0.02
    assert PlayedNetwork(0.02, trace).mean_latency_s == 0.02
    assert not PlayedNetwork(trace=trace).delays


def test_a_latency_given_twice_is_refused() -> None:
    trace = parse_trace("t.csv", ["t_s,bps,latency_s", "0,1000,0.01", "1,1000,0.01"])
    with pytest.raises(ConfigError, match=r"trace t\.csv has latencies, too"):
        PlayedNetwork(0.02, trace)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "trace t: empty"),
        (["time,rate", "0,1"], "line 1: the header is 'time,rate'"),
        (["t_s,latency_s", "0,1"], "line 1: the header is"),
        (["t_s,bps", "0,1", "", "1,2,3", "2,1"], "line 4: 3 values; the header has 2 columns"),
        (["t_s,bps,latency_s", "0,1", "2,1"], "line 2: 2 values; the header has 3 columns"),
        (["t_s,bps", "0,fast", "1,1"], "line 2: bps: 'fast' is not a number"),
        (["t_s,bps", "0,1", "1,-1"], "line 3: bps: -1 is not between 0 and"),
        (["t_s,bps", "0,nan", "1,1"], "line 2: bps: nan is not between"),
        (["t_s,bps", "0,inf", "1,1"], "line 2: bps: inf is not between"),
        (["t_s,bps,latency_s", "0,1,20000", "1,1,0"], "line 2: latency_s: 20000 is not between 0 and 3600"),
        (["t_s,bps", "1,1", "2,1"], "line 2: t_s: the first row begins at 1, not at 0"),
        (["t_s,bps", "0,1", "2,1", "2,1"], "line 4: t_s: 2 does not come after 2"),
        (["t_s,bps", "0,1", "2,1", "1.5,1"], "line 4: t_s: 1.5 does not come after 2"),
        (["t_s,bps", "0,1"], "trace t: fewer than two rows"),
        (["t_s,bps", "0,0", "1,5"], "trace t: the link never carries anything"),
    ],
)
def test_a_fault_is_named_with_its_line(lines: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_trace("t", lines)
    assert fault in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace .*missing\.csv: No such file"):
        read_trace(tmp_path / "missing.csv")
    (tmp_path / "picture.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"picture\.csv: not text in UTF-8"):
        read_trace(tmp_path / "picture.csv")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recordings_are_read(path: Path) -> None:
    trace: Trace = read_trace(path)
    assert 50 < trace.period_s < 100
    assert 0.02 <= trace.mean_latency_s <= 0.1001


def test_there_are_recordings_with_and_without_outages() -> None:
    assert sorted({any(row.bps == 0 for row in read_trace(path).rows) for path in RECORDED}) == [False, True]
