"""How rates, durations and counts are written, and that what is written can be read again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from bus.errors import ConfigError
from bus.text.units import (
    format_count,
    format_moment,
    format_rate,
    format_seconds,
    format_share,
    parse_duration,
    parse_rate,
    parse_size,
)

AWKWARD_S = {
    0: "0 s",
    1e-12: "<0.001 us",
    1e-7: "0.1 us",
    316e-6: "316 us",
    0.99996e-3: "1 ms",
    0.01: "10 ms",
    0.1: "100 ms",
    0.48: "480 ms",
    0.5: "500 ms",
    0.9999: "1 s",
    0.99996: "1 s",
    1.25: "1.25 s",
    59.99: "60 s",
    100.0: "100 s",
    119.4: "119 s",
    119.96: "2 min",
    480.0: "8 min",
    999.9: "16.7 min",
    3600.0: "60 min",
    7199.0: "2 h",
    86400.0: "24 h",
    3.6e6: "1000 h",
    1e10: "2780000 h",
    -0.168: "-168 ms",
}
AWKWARD_BPS = {
    0: "0 bps",
    1: "1 bps",
    100: "100 bps",
    999: "999 bps",
    999.6: "1 kbps",
    100_000: "100 kbps",
    999_960: "1 Mbps",
    480_000_000: "480 Mbps",
    999_960_000: "1 Gbps",
    1_000_000_000_000: "1000 Gbps",
}


@pytest.mark.parametrize(("seconds", "text"), AWKWARD_S.items())
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("bps", "text"), AWKWARD_BPS.items())
def test_rates(bps: float, text: str) -> None:
    assert format_rate(bps) == text


def test_what_is_written_is_read_again_within_half_of_the_third_digit() -> None:
    generator = random.Random(31)
    for _ in range(5000):
        seconds, bps = 10 ** generator.uniform(-8, 7), round(10 ** generator.uniform(0, 13))
        for text, value, again in (
            (format_seconds(seconds), seconds, parse_duration(format_seconds(seconds))),
            (format_rate(bps), bps, parse_rate(format_rate(bps))),
        ):
            assert again == pytest.approx(value, rel=0.00501), text
            assert re.fullmatch(r"\d+(\.\d+)? [a-zA-Z]+", text), text
            assert value > 999 or len(text.split()[0].replace(".", "").lstrip("0")) <= 3, text


def test_order_is_kept_within_a_unit() -> None:
    generator = random.Random(7)
    values = sorted(10 ** generator.uniform(-6, 6) for _ in range(2000))
    read = [parse_duration(format_seconds(value)) for value in values]
    assert all(before <= after * (1 + 1e-9) for before, after in pairwise(read))


def test_moments_keep_their_decimals() -> None:
    assert [format_moment(1665.2), format_moment(0.0, 1), format_moment(12.3456, 3)] == [
        "1665.20 s",
        "0.0 s",
        "12.346 s",
    ]


def test_counts() -> None:
    assert [format_count(n, "task") for n in (0, 1, 2, 2000)] == ["0 tasks", "1 task", "2 tasks", "2,000 tasks"]
    assert [format_count(n, "search", "searches") for n in (1, 2)] == ["1 search", "2 searches"]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_rate, "100Mbps", 100_000_000),
        (parse_rate, "1.5 Gbit/s", 1_500_000_000),
        (parse_rate, "250kbps", 250_000),
        (parse_rate, "8 bits/s", 8),
        (parse_rate, "0", 0),
        (parse_duration, "200ms", 0.2),
        (parse_duration, ".5 h", 1800.0),
        (parse_duration, "0", 0.0),
        (parse_size, "600KB", 600_000),
        (parse_size, "4KiB", 4096),
        (parse_size, "17B", 17),
    ],
)
def test_quantities_are_read_with_their_units(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text", "message", "remedy"),
    [
        (parse_rate, "100", "--flag 100: a rate without a unit", "write 100Mbps"),
        (parse_rate, "1.5", "--flag 1.5: a rate without a unit", "write 1.5Mbps"),
        (parse_duration, "7", "--flag 7: a duration without a unit", "write 7s"),
        (parse_size, "64", "--flag 64: a size without a unit", "write 64KB"),
        (parse_rate, "5 apples", "--flag 5 apples: not a rate", "write it like 100Mbps"),
        (parse_rate, "-5Mbps", "--flag -5Mbps: not a rate", "write it like"),
        (parse_rate, "nan", "--flag nan: not a rate", "write it like"),
        (parse_duration, "", "--flag : not a duration", "write it like"),
        (parse_size, "10MBps", "--flag 10MBps: not a size", "write it like"),
    ],
)
def test_a_quantity_without_a_unit_is_an_error_that_says_what_to_write(
    parse: Callable[[str, str], float], text: str, message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "--flag")
    assert str(caught.value) == message
    assert (caught.value.remedy or "").startswith(remedy)


@pytest.mark.parametrize("parse", [parse_rate, parse_duration, parse_size])
def test_a_quantity_that_is_too_large_is_an_error(parse: Callable[[str], float]) -> None:
    for text in ("9" * 400, "9" * 400 + "h", "9" * 400 + "Gbps", "9" * 400 + "GB", "9" * 30 + "h"):
        with pytest.raises(ConfigError):
            parse(text)


def test_shares_are_whole_percents_and_small_ones_are_not_zero() -> None:
    shown = [format_share(share) for share in (0.0, 0.001, -0.001, 0.005, 0.12, -0.2, 1.0, 49.0)]
    assert shown == ["0 %", "<1 %", "-<1 %", "<1 %", "12 %", "-20 %", "100 %", "4,900 %"]
