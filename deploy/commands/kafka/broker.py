"""`deepar broker`: a real Apache Kafka in the foreground, without Docker."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import platformdirs
import typer
from rich.console import Console
from rich.markup import escape

from deploy.kafka_local.broker import BrokerDiedError, BrokerOptions, KafkaBroker
from deploy.services.process import EXIT_INTERRUPTED, EXIT_OK


class _Signalled(BaseException):
    """A stop signal arrived. A BaseException, so that `except Exception` does not treat it as a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def default_data_dir() -> Path:
    """Default folder for the broker's records: the user's data folder, because a cache may be deleted."""
    return Path(platformdirs.user_data_dir("deepar")) / "broker"


def broker(
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="DEEPAR_BROKER_PORT", help="Port on 127.0.0.1.")] = 9092,
    data: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            envvar="DEEPAR_BROKER_DATA",
            help="Folder for records and logs; by default the user's data folder.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the records of earlier runs first.")] = False,
) -> None:
    """Run Apache Kafka on this machine until Ctrl-C.

    One KRaft node with 512 MB of heap, reachable from this machine only. Needs Java 17 and, the first time,
    Maven.

    Example: `deepar broker --port 19092 --data /tmp/kafka`
    """
    out = Console(emoji=False, highlight=False, soft_wrap=True)
    log = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    one = KafkaBroker(
        data or default_data_dir(),
        BrokerOptions(port=port),
        started_by="started by deepar broker",
        progress=lambda line: log.print(line, style="dim"),
    )
    try:
        before = {number: signal.signal(number, _raise_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if fresh:
                one.erase()
            took_s = one.start()
            ready = f"[bold green]{one.kind}[/] is ready after {took_s:.1f} s: [bold]{one.bootstrap}[/]"
            # One write: a script may react to the first line.
            out.print(f"{ready}\n  records and log: {escape(str(one.data_dir))}\n{_what_next(one.bootstrap)}")
            _wait_for_its_end(one)
        finally:
            for number in before:  # a second Ctrl-C must not interrupt the clean stop
                signal.signal(number, signal.SIG_IGN)
            if one.running:
                log.print("stopping Apache Kafka", style="dim")
            one.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
    except _Signalled as stop:
        raise typer.Exit(EXIT_INTERRUPTED if stop.number == signal.SIGINT else EXIT_OK) from None


def _what_next(bootstrap: str) -> str:
    """Suggested next commands; they set KAFKA_BOOTSTRAP_SERVERS if the address is not the default."""
    prefix = "" if bootstrap == "127.0.0.1:9092" else f"KAFKA_BOOTSTRAP_SERVERS={bootstrap} "
    return (
        f"  next, in other terminals:\n    {prefix}deepar topics create\n    {prefix}deepar planner\n"
        f"    {prefix}deepar stage cloud\n"
        "  Ctrl-C stops it; the records stay (--fresh deletes them)."
    )


def _wait_for_its_end(one: KafkaBroker) -> None:
    """Wait until a signal raises `_Signalled`; raise `BrokerDiedError` if Kafka ends first."""
    idle = threading.Event()
    while one.running:
        idle.wait(0.2)
    raise BrokerDiedError(
        f"Apache Kafka ended unexpectedly; last lines of its log:\n{one.log_tail()}", remedy=f"see {one.log_file}"
    )


def _raise_stop(number: int, _: FrameType | None) -> NoReturn:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise _Signalled(number)
