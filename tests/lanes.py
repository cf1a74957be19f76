"""Lanes, so that `make test` uses both cores: Docker's tests, live ones, and all else, beside each other.

A live test starts programs, listens on ports and waits in real time. Live tests never run beside each other. Docker's wait
longest, mostly for health checks, and share nothing with the others. All else needs a processor and no clock. Where there is
too little processor, live tests go first, then Docker's: the others run with a lower priority. One process alone, as in
`pytest tests/unit/bus`, knows no lanes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parent / "integration"
LANES = ("docker", "live", "")  # in the order in which they begin, so that each of three workers has one
POLITENESS = {"docker": 5, "live": 0, "": 10}
"""What a worker's niceness is, and that of all that it starts, once it works in a lane. It never gets less nice again."""


def lane_of(item: pytest.Item) -> str:
    """The name of a test's lane; "" for what may run beside anything, in any number."""
    if item.path.is_relative_to(INTEGRATION):
        return "docker" if item.path.stem == "test_compose" else "live"
    return "live" if item.get_closest_marker("live") else ""


def is_worker() -> bool:
    """Whether this process runs a share of the tests for another."""
    return "PYTEST_XDIST_WORKER" in os.environ


@pytest.hookimpl(tryfirst=True)  # the groups must be known when xdist names the tests by them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_worker():
        return
    items.sort(key=lambda item: LANES.index(lane_of(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(lane_of(item) or item.path.stem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if is_worker():
        os.nice(max(0, POLITENESS[lane_of(item)] - os.nice(0)))


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
