"""Fixtures for every test: pytest loads the modules that are named here."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Generator, Iterator

import pytest
import structlog

pytest_plugins = ["tests.kafka_broker", "tests.lanes", "tests.client_environment"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while tests are collected, and set aside what exists then: collection takes half the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo the log settings of a command that ran in this process: they write to a stderr that pytest closes."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers = handlers


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Programs that a test starts heed SIGINT, even if the tests run in the background, where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
