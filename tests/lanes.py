"""Lanes of the test run: patient tests, live tests and all others run in parallel processes.

Live and patient tests start programs, listen on ports and wait in real time. The limits of a live test are tight, so two live
tests never run at the same time. The limits of a patient test are generous: patient tests run one after another, beside the
live ones. All other tests need only a processor. Live tests have the highest process priority, then patient tests. A run in
a single process, such as `pytest tests/unit/bus`, has no lanes.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.class_archive import start_brokers_quickly
from tests.kafka_broker import choose

LANE_OF_PREFIX = {
    "tests/integration/test_broker.py": "patient",
    "tests/integration/test_cluster.py": "patient",
    "tests/integration/test_compose.py": "patient",
    "tests/integration/test_deleted_topics.py": "patient",
    "tests/integration/test_docs_on_kafka.py": "patient",
    "tests/integration/test_lost_decisions.py": "patient",
    "tests/integration/test_page_numbers.py": "patient",
    "tests/integration/test_topic_settings.py": "patient",
    "tests/integration/test_codec_models.py": "",
    "tests/integration/test_docs.py": "",  # commands that need no broker
    "tests/integration/test_exact_optimum.py": "",  # its solver's effort is not counted in seconds
    "tests/integration/test_interrupts.py": "",  # its moments are counted in processor time
    "tests/integration/test_wheel.py": "",
    "tests/integration/": "live",
    "tests/contracts/": "live",
    "tests/unit/bus/kafka/test_faults.py": "live",
    "tests/unit/loadgen/bench/test_bus.py": "live",
    "tests/unit/deploy/test_dashboards.py": "live",  # it may fetch Prometheus, as another live test may
}
"""The lane of the tests whose id begins so; the first prefix that fits counts."""
LANES = ("patient", "live", "")  # in the order in which they begin, so that each of three workers has one
POLITENESS = {"patient": 5, "live": 0, "": 10}
"""Niceness of a worker and its children after its first test of a lane. It is never lowered again."""


def lane_of(node_id: str) -> str:
    """The name of a test's lane; "" for a test that may run in parallel with any other."""
    return next((lane for prefix, lane in LANE_OF_PREFIX.items() if node_id.startswith(prefix)), "")


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
            prepare_java()


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


@cache
def prepare_java() -> None:
    """Once in a process with a lane: brokers of this run start quickly. Options that the user has set stay."""
    if choose().how == "apache" and "JDK_JAVA_OPTIONS" not in os.environ:
        start_brokers_quickly()


class Teller:
    """Prints a failure when it happens, not only at the end: a run may be cut off before."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write_line(f"\n{report.nodeid} failed in its {report.when}:\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Teller(config))
