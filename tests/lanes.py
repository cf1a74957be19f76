"""Lanes of the test run: Docker tests, live tests and all others run in parallel processes.

A live test starts programs, listens on ports and waits in real time, so two live tests never run at the same time. Docker
tests mostly wait for health checks and share nothing with the others. All other tests need only a processor. Live tests have
the highest process priority, then Docker tests. A run in a single process, such as `pytest tests/unit/bus`, has no lanes.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

DOCKER = ("tests/integration/test_compose.py",)
LIVE = (
    "tests/integration/",
    "tests/contracts/",
    "tests/unit/bus/kafka/test_faults.py",
    "tests/unit/loadgen/bench/test_bus.py",
    "tests/unit/deploy/test_dashboards.py",  # it may fetch Prometheus, as another live test may
)
LANES = ("docker", "live", "")  # in the order in which they begin, so that each of three workers has one
POLITENESS = {"docker": 5, "live": 0, "": 10}
"""Niceness of a worker and its children after its first test of a lane. It is never lowered again."""


def lane_of(node_id: str) -> str:
    """The name of a test's lane; "" for a test that may run in parallel with any other."""
    if node_id.startswith(DOCKER):
        return "docker"
    return "live" if node_id.startswith(LIVE) else ""


class Lanes(LoadScopeScheduling):  # type: ignore[misc]  # xdist tells no types
    """Assigns whole lanes, and whole files of tests without a lane, to workers in collection order."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return lane_of(nodeid) or nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    return Lanes(config, log)


def is_worker() -> bool:
    """Whether this process runs a share of the tests for another."""
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_worker():
        items.sort(key=lambda item: LANES.index(lane_of(item.nodeid)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if is_worker():
        lane = lane_of(item.nodeid)
        os.nice(max(0, POLITENESS[lane] - os.nice(0)))
        if lane:
            have_for_itself(lane, item.config._tmp_path_factory.getbasetemp().parent)  # type: ignore[attr-defined]


@cache
def have_for_itself(lane: str, folder: Path) -> None:
    """Lock a lane until this process ends. Raises `AssertionError` if another process of this run has locked it.

    `folder` belongs to this run only.
    """
    lock = os.open(folder / f"lane-{lane}", os.O_CREAT | os.O_RDWR)  # never closed: that would end it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AssertionError(
            f"two processes run tests of the lane {lane!r}: xdist does not use the scheduler of tests/lanes.py"
        ) from None


class Teller:
    """Prints a failure when it happens, not only at the end: a run may be cut off before."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.nodeid} failed in its {report.when}:\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if is_worker():
        # Some thirty brokers are started and none lives long: the quick compiler alone takes a third less of the processor.
        os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Teller(config))
