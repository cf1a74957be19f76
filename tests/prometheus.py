"""Prometheus' own programs, on our configuration.

Taken from PATH, or unpacked from Debian's package into the user's cache folder, where DEEPAR_TEST_DOCKER=required allows to
fetch something: unpacked, not installed, so that no service of the system is started.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.kafka_local.artifacts import cache_root
from deploy.kafka_local.child_process import tied_to_us
from deploy.kafka_local.ports import free_port
from tests.compose_engine import CommandError, packages_locked, required, run

DEPLOY = Path(__file__).parents[1] / "deploy"
CONFIG, ALARMS = DEPLOY / "prometheus" / "prometheus.yml", DEPLOY / "prometheus" / "alarms.yml"


@dataclass(frozen=True)
class Programs:
    """Where they are."""

    prometheus: Path
    promtool: Path


def find_programs() -> Programs:
    """Both programs. Skips the test where they cannot be had, fails it where they must."""
    found = available()
    if found is None:
        pytest.skip("Prometheus is not installed (DEEPAR_TEST_DOCKER=required fetches it)")
    return found


def available() -> Programs | None:
    """The same; None where they cannot be had."""
    here = {name: shutil.which(name) for name in ("prometheus", "promtool")}
    if all(here.values()):
        return Programs(Path(here["prometheus"] or ""), Path(here["promtool"] or ""))
    kept = cache_root() / "prometheus"
    found = Programs(kept / "usr" / "bin" / "prometheus", kept / "usr" / "bin" / "promtool")
    if found.prometheus.exists() and found.promtool.exists():
        return found
    if not required():
        return None
    try:
        _unpack(kept)
    except (CommandError, OSError) as error:
        pytest.fail(f"DEEPAR_TEST_DOCKER=required, but Prometheus cannot be had: {error}", pytrace=False)
    return found


def _unpack(kept: Path) -> None:
    with packages_locked(), tempfile.TemporaryDirectory() as work:
        try:
            run(["apt-get", "download", "-q", "prometheus"], cwd=Path(work))
        except CommandError:  # the lists may be old, or not there
            run(["apt-get", "update", "-q"])
            run(["apt-get", "download", "-q", "prometheus"], cwd=Path(work))
        (package,) = Path(work).glob("prometheus_*.deb")
        run(["dpkg-deb", "-x", package, Path(work) / "files"])
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(work) / "files" / "usr" / "bin", kept / "usr" / "bin", dirs_exist_ok=True)


def configuration(folder: Path, targets: Mapping[str, int], scrape: str = "5s") -> Path:
    """The file that the compose file mounts, with services of this machine in the place of its containers.

    `targets`: the name of a service there, and the port that plays it here. Raises AssertionError where names do not fit.
    """
    text = CONFIG.read_text(encoding="utf-8")
    named = re.findall(r'"([\w-]+):9464"', text)
    assert set(targets) <= set(named), f"{CONFIG.name} scrapes {named}, not all of {list(targets)}"
    text = re.sub(
        r"targets: \[.*\]", f"targets: {json.dumps([f'127.0.0.1:{port}' for port in targets.values()])}", text
    )
    text = text.replace("/etc/prometheus/alarms.yml", str(ALARMS)).replace("_interval: 5s", f"_interval: {scrape}")
    path = folder / "prometheus.yml"
    path.write_text(text, encoding="utf-8")
    return path


class Prometheus:
    """A running one."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def ask(self, path: str, **words: str) -> Any:
        """The `data` of an answer of its API. Raises AssertionError with the error that it names."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=10.0) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {words}: {error.read().decode()}") from error

    def value(self, expression: str) -> list[dict[str, Any]]:
        """What an expression is now: one entry a series."""
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait for something. Raises AssertionError with its log."""
        until_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until_s, f"{what}: not within {timeout_s} s\n{self._log.read_text()[-2000:]}"
            time.sleep(0.2)


@contextmanager
def running(programs: Programs, config: Path, folder: Path) -> Iterator[Prometheus]:
    """Prometheus on a configuration while the block runs."""
    port, log = free_port(), folder / "prometheus.log"
    command = [str(programs.prometheus), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            tied_to_us([*command, f"--web.listen-address=127.0.0.1:{port}"]), stdout=sink, stderr=sink, cwd=folder
        )
    made = Prometheus(port, log)
    try:
        made.until(lambda: child.poll() is None and _ready(port), "Prometheus answers")
        yield made
    finally:
        child.terminate()
        child.wait(20.0)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2.0):
            return True
    except OSError:
        return False
