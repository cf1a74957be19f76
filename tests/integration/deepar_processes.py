"""`deepar` commands as real processes, for the tests: started, asked whether they are ready, ended, their logs kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deploy.kafka_local.child_process import tied_to_us
from deploy.kafka_local.ports import free_port
from tests.namespaces import Namespace, first_in_line

READY_S = 90.0


class Process:
    """One running command."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        log: Path,
        http_port: int,
        inside: Namespace | None = None,
    ) -> None:
        self._inside = inside
        self.name = name
        self.process = process
        self.log = log
        self.http_port = http_port

    def ready(self) -> dict[str, Any] | None:
        """What `/readyz` says, None while it says no."""
        return self._ask() if self._inside is None else self._inside.call(self._ask)

    def _ask(self) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/readyz", timeout=2.0) as answer:
                return dict(json.loads(answer.read()))
        except (OSError, urllib.error.HTTPError, ValueError):
            return None

    def wait_ready(self, timeout_s: float = READY_S) -> dict[str, Any]:
        """Wait until it is ready. Raises AssertionError with the log where it ends or takes too long."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.text()}"
            if (answer := self.ready()) is not None:
                return answer
            time.sleep(0.1)
        raise AssertionError(f"{self.name} was not ready within {timeout_s} s:\n{self.text()}")

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 15.0) -> int:
        """Send a signal and wait for the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)


class Processes:
    """Everything that one test started against one broker; leaving the block ends it all."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"KAFKA_BOOTSTRAP_SERVERS": bootstrap, "NO_COLOR": "1", "COLUMNS": "160"}
        self.all: list[Process] = []

    def start(
        self, name: str, *arguments: str, inside: Namespace | None = None, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start `deepar ARGUMENTS`, with a port for its probes and variables of its own; `inside` a network namespace, if one
        is given.
        """
        prefix = inside.prefix if inside else []
        port = free_port()
        log = self.folder / f"{name}-{len(self.all)}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                tied_to_us([*prefix, sys.executable, "-m", "deploy.cli", *arguments]),
                env=self.environment | {"DEEPAR_HTTP_PORT": str(port)} | dict(environment or {}),
                stdout=sink,
                stderr=sink,
                cwd=self.folder,
                start_new_session=inside is not None,
            )
        if inside is not None:
            first_in_line(process.pid)
        self.all.append(made := Process(name, process, log, port, inside))
        return made

    def run(
        self, *arguments: str, inside: Namespace | None = None, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `deepar ARGUMENTS` to its end; `inside` a network namespace, if one is given."""
        prefix = inside.prefix if inside else []
        return subprocess.run(
            [*prefix, sys.executable, "-m", "deploy.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.folder,
            check=False,
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.all:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGCONT)
                one.process.kill()
        for one in self.all:
            one.process.wait(10.0)
