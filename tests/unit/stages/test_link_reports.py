"""Which measurements of links a heartbeat carries."""

from __future__ import annotations

from bus.messages import LinkMeasurement
from stages.measuring.reports import LinkReports


def link(latency_s: float, *, edge: str = "e1", deviation_s: float = 0.0, bps: int | None = None) -> LinkMeasurement:
    return LinkMeasurement(link=1, edge=edge, latency_s=latency_s, deviation_s=deviation_s, bps=bps)


def test_only_what_has_changed_is_reported() -> None:
    reports = LinkReports()
    first = (link(0.010), link(0.020, edge="e2"))
    assert reports.news(first) == first
    assert reports.news(first) == first  # the heartbeat was not acknowledged
    reports.told(first)
    assert reports.news(first) == ()
    assert reports.news((link(0.0109), link(0.023, edge="e2"))) == (link(0.023, edge="e2"),)
    assert reports.news([link(0.0089)]) == (link(0.0089),)
    reports.forget()
    assert reports.news(first) == first


def test_small_latencies_may_vary_by_a_fifth_of_a_millisecond() -> None:
    reports = LinkReports()
    reports.told([link(0.0005)])
    assert reports.news([link(0.00069)]) == ()
    assert reports.news([link(0.00071)]) == (link(0.00071),)


def test_deviation_and_throughput_are_reported_too() -> None:
    reports = LinkReports()
    reports.told([link(0.010, deviation_s=0.002)])
    assert reports.news([link(0.010, deviation_s=0.0029)]) == ()
    assert reports.news([link(0.010, deviation_s=0.0031)]) != ()
    assert reports.news([link(0.010, deviation_s=0.002, bps=1_000)]) != ()
