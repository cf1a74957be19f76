"""Logs go to stderr: for people on a terminal, JSON lines elsewhere. Data goes to stdout and never comes here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog

QUIET_LOGGERS = ("aiokafka", "asyncio", "aiohttp", "matplotlib")
"""Held at WARNING whatever is asked for: aiokafka prints payloads at DEBUG."""


SPARING_S = 10.0
REPEAT_S = 60.0
MOST_REMEMBERED = 1000
TOLD_BY_US = ("Topic %s not found in cluster metadata", "Topic %s is not available during auto-create initialization")
"""What aiokafka says twenty times a second of a topic that is gone; `deploy.services.topic_watch` says it once, with
the remedy."""


def configure_logging(level: str = "info", *, json_lines: bool | None = None) -> None:
    """Set up structlog for the process; `json_lines` None: JSON unless stderr is a terminal."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    number = getattr(logging, level.upper())
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        SparingRepeats(),
    ]
    if as_json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # structlog's own choice shows local variables, and with them passwords.
        plain = structlog.dev.plain_traceback
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Sparing())
    handler.setFormatter(_libraries_as_json() if as_json else logging.Formatter("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=number)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR if name == "aiokafka" else logging.WARNING)


class SparingRepeats:
    """Lets a service say that something failed of the same error once in `REPEAT_S`, and then how often it has."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[tuple[str, ...], tuple[float, int]] = {}  # since when, and how many were held back

    def __call__(self, logger: Any, method: str, entry: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """A processor of structlog. Raises `DropEvent`."""
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
        if len(self._held) >= MOST_REMEMBERED:
            self._held.clear()
        self._held[what] = (now_s, 0)
        if held:
            entry["more_like_it"] = held
        return entry


class Sparing(logging.Filter):
    """Lets a library say the same once in `SPARING_S`, and then how often it has: aiokafka says twenty times a second that a
    broker is away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple[str, str], tuple[float, int]] = {}  # since when, and how many were held back

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("aiokafka") and str(record.msg).startswith(TOLD_BY_US):
            return False
        what = (record.name, str(record.msg))  # as it is written in the library's code, whatever it is about
        since_s, held = self._held.get(what, (float("-inf"), 0))
        if record.created - since_s < SPARING_S:
            self._held[what] = (since_s, held + 1)
            return False
        self._held[what] = (record.created, 0)
        if held:
            record.msg, record.args = f"{record.getMessage()} ({held} more like it)", None
        return True


def _libraries_as_json() -> logging.Formatter:
    """What libraries say, as the same JSON lines; `logger` names who."""
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
