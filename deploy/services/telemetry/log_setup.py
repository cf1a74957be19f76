"""Log configuration: text on a terminal, JSON lines elsewhere, always on stderr. Stdout is reserved for data."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog

QUIET_LOGGERS = ("aiokafka", "asyncio", "aiohttp", "matplotlib")
"""Loggers that stay at WARNING or above at every log level: aiokafka prints payloads at DEBUG."""


LIBRARY_REPEAT_S = 10.0
REPEAT_S = 60.0
MAX_REMEMBERED = 1000
REPORTED_BY_TOPIC_WATCH = (
    "Topic %s not found in cluster metadata",
    "Topic %s is not available during auto-create initialization",
)
"""Messages that aiokafka logs twenty times a second for a deleted topic; `deploy.services.topic_watch` logs it once, with
the remedy."""


def configure_logging(level: str = "info", *, json_lines: bool | None = None) -> None:
    """Set up structlog for the process; `json_lines` None: JSON unless stderr is a terminal."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    number = getattr(logging, level.upper())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        RepeatLimiter(),
    ]
    if as_json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # structlog's default formatter shows local variables, which may hold passwords.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LibraryRepeatLimiter())
    handler.setFormatter(_libraries_as_json() if as_json else logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=number)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR if name == "aiokafka" else logging.WARNING)


class RepeatLimiter:
    """Structlog processor that passes equal warnings once per `REPEAT_S`, with the number of suppressed ones."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[tuple[str, ...], tuple[float, int]] = {}  # start of the interval, number suppressed

    def __call__(self, logger: Any, method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Pass or suppress one log entry. Raises `DropEvent`."""
        if method != "warning" or "error" not in entry:
            return entry
        what = tuple(
            str(entry.get(name, "")) for name in ("event", "error", "node", "planner", "region", "topic", "task")
        )
        since_s, held = self._held.get(what, (float("-inf"), 0))
        now_s = self._clock()
        if now_s - since_s < REPEAT_S:
            self._held[what] = (since_s, held + 1)
            raise structlog.DropEvent
        if len(self._held) >= MAX_REMEMBERED:
            self._held.clear()
        self._held[what] = (now_s, 0)
        if held:
            entry["more_like_it"] = held
        return entry


class LibraryRepeatLimiter(logging.Filter):
    """Log filter that passes equal library messages once per `LIBRARY_REPEAT_S`, with the number of suppressed ones.

    aiokafka logs twenty times a second that a broker is unavailable.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple[str, str], tuple[float, int]] = {}  # start of the interval, number suppressed

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("aiokafka") and str(record.msg).startswith(REPORTED_BY_TOPIC_WATCH):
            return False
        what = (record.name, str(record.msg))  # the format string: the arguments do not matter
        since_s, held = self._held.get(what, (float("-inf"), 0))
        if record.created - since_s < LIBRARY_REPEAT_S:
            self._held[what] = (since_s, held + 1)
            return False
        self._held[what] = (record.created, 0)
        if held:
            record.msg, record.args = f"{record.getMessage()} ({held} more like it)", None
        return True


def _libraries_as_json() -> logging.Formatter:
    """Formatter that renders library messages as JSON lines; `logger` names the library."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_logger_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
