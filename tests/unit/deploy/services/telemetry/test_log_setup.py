"""Logs: what an error held in its variables does not get into them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import structlog

from deploy.services.telemetry.log_setup import LIBRARY_REPEAT_S, LibraryRepeatLimiter, RepeatLimiter, configure_logging

PLANTED = "planted-0xC0FFEE"


@pytest.mark.parametrize("json_lines", [False, True])
def test_a_traceback_shows_no_variables(capsys: pytest.CaptureFixture[str], json_lines: bool) -> None:
    configure_logging("debug", json_lines=json_lines)
    settings = {"sasl_plain_password": PLANTED}
    try:
        raise ValueError(f"{len(settings)} setting is wrong")
    except ValueError:
        structlog.get_logger("test").exception("it failed")
    said = capsys.readouterr().err
    assert "1 setting is wrong" in said
    assert "Traceback" in said
    assert PLANTED not in said


def test_the_kafka_client_stays_quiet_at_debug() -> None:
    """It prints payloads and requests at DEBUG."""
    configure_logging("debug", json_lines=True)
    assert logging.getLogger("aiokafka").getEffectiveLevel() >= logging.WARNING
    assert logging.getLogger("aiokafka.conn").getEffectiveLevel() >= logging.WARNING


def test_what_libraries_say_is_json_too() -> None:
    """Runs in a process of its own, because pytest installs handlers on the root logger."""
    script = (
        "import logging, structlog; from deploy.services.telemetry.log_setup import configure_logging\n"
        "configure_logging('info', json_lines=True)\n"
        "structlog.get_logger('test').info('ours')\n"
        "logging.getLogger('aiokafka.consumer').error('Request failed: %s', '[Error 15]')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    ours, theirs = (json.loads(line) for line in done.stderr.splitlines())
    assert ours["event"] == "ours"
    assert (theirs["logger"], theirs["level"]) == ("aiokafka.consumer", "error")
    assert theirs["event"] == "Request failed: [Error 15]"


def test_a_library_that_repeats_itself_is_counted() -> None:
    """Thousands of lines while a broker is away say no more than one."""
    sparing = LibraryRepeatLimiter()

    def said(at_s: float, message: str, *words: object) -> str | None:
        record = logging.LogRecord("aiokafka", logging.ERROR, "f", 1, message, words, None)
        record.created = at_s
        return record.getMessage() if sparing.filter(record) else None

    told = [said(number / 20, "no %s", number) for number in range(200)]
    assert [line for line in told if line] == ["no 0"]
    assert said(1.0, "something else") == "something else"
    assert said(LIBRARY_REPEAT_S, "no %s", 200) == "no 200 (199 more like it)"
    assert said(3 * LIBRARY_REPEAT_S, "no %s", 201) == "no 201"


def test_a_failure_that_a_service_repeats_is_told_once_a_minute_and_counted() -> None:
    times_s = [0.0]
    sparing = RepeatLimiter(lambda: times_s[-1])

    def told(method: str, **entry: str) -> dict[str, object] | None:
        try:
            return dict(sparing(None, method, dict(entry)))
        except structlog.DropEvent:
            return None

    failed = {"event": "cannot read", "error": "no topic", "node": "e1"}
    seen = []
    while times_s[-1] < 130.0:
        seen.append(told("warning", **failed))
        times_s.append(times_s[-1] + 2.0)
    assert [line for line in seen if line] == [failed, failed | {"more_like_it": 29}, failed | {"more_like_it": 29}]
    assert told("warning", **failed | {"node": "e2"}) is not None
    assert told("warning", **failed | {"error": "another"}) is not None
    assert all(told("error", **failed) and told("info", event="ready") for _ in range(3))


def test_what_is_said_of_missing_topics_by_the_library_is_left_to_us() -> None:
    record = logging.LogRecord(
        "aiokafka.cluster", logging.ERROR, "f", 1, "Topic %s not found in cluster metadata", ("t",), None
    )
    assert not LibraryRepeatLimiter().filter(record)
    record.name = "other"
    assert LibraryRepeatLimiter().filter(record)
