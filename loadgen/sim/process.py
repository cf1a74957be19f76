"""Simulated process: runs in virtual time and can be killed, stopped or frozen between any two coroutine steps.

The loop's task factory wraps every coroutine that a process starts; a context variable identifies the owning process.
Each step, from one await to the next, is counted, and the process can be killed after any of them. A kill closes the
bus connection first and cancels the tasks second, so nothing that their cleanup code sends is delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextvars import Context, ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import structlog

from bus.errors import BusError
from bus.memory.bus import MemoryBus

RESTART_S = 1.0
"""Delay before the supervisor restarts a process that ended on its own."""

_whose: ContextVar[Process | None] = ContextVar("process", default=None)

Service = Callable[[MemoryBus], Awaitable[None]]


class Process:
    """One supervised service with its own bus connection; it is restarted when it dies."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], MemoryBus],
        serve: Service,
        *,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.after: Callable[[], None] | None = None  # called after each coroutine step
        self.sites: Callable[[str, bool], bool] | None = None
        """Called at each await with its source location and whether the wait is over; True kills the process there."""
        self.steps = 0
        self.frozen = False
        self.dead = True
        self.kills = 0
        self.ends: list[str] = []  # errors with which it ended, except kills and bus failures
        self.bus: MemoryBus | None = None
        self._connect = connect
        self._serve = serve
        self._leave = leave
        self._crash_at: int | None = None
        self.crashed: Callable[[], None] = lambda: None
        self._sleepers: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process if it is not running."""
        if not self.dead:
            return
        self.dead = self.frozen = False
        self.bus = self._connect()
        context = Context()
        context.run(_whose.set, self)
        self._task = asyncio.get_running_loop().create_task(self._run(self.bus), name=self.name, context=context)

    async def _run(self, bus: MemoryBus) -> None:
        try:
            async with bus:
                await self._serve(bus)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not _only_bus(error):
                self.ends.append(f"{self.name}: {_first(error)!r}")
        if self.bus is bus and not self.dead:
            self.dead = True
            asyncio.get_running_loop().call_later(RESTART_S, self.start, context=Context())

    def crash(self) -> None:
        """SIGKILL."""
        self._crash_at = None
        if self.dead:
            return
        self.dead = True
        self.kills += 1
        assert self.bus is not None
        self.bus.kill()
        if self._task is not None:
            self._task.cancel()
        self._wake()

    def crash_in(self, steps: int, then: Callable[[], None]) -> None:
        """Simulate SIGKILL after `steps` more coroutine steps, then call `then`."""
        self._crash_at, self.crashed = self.steps + steps, then

    def freeze(self) -> None:
        """Simulate SIGSTOP: coroutines take no steps and heartbeats stop."""
        if not self.dead and self.bus is not None:
            self.frozen = True
            self.bus.disconnect()

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        if not self.dead and self.bus is not None:
            self.bus.reconnect()
        self._wake()

    async def stop(self) -> None:
        """Simulate SIGTERM: the service finishes or hands over its work and leaves."""
        if self.dead or self.frozen or self._task is None or self.bus is None:
            return
        task, bus = self._task, self.bus
        if self._leave is not None:
            with contextlib.suppress(TimeoutError, BusError):
                async with asyncio.timeout(5.0):
                    await self._leave()
        if self.bus is bus and not self.dead:
            self.dead = True
            task.cancel()
            await asyncio.wait([task])

    def step(self) -> None:
        """Count a coroutine step that is about to run."""
        self.steps += 1
        if self._crash_at is not None and self.steps >= self._crash_at:
            self._crash_at = None
            self.crash_here()

    def spare(self) -> None:
        """Cancel scheduled crashes that have not happened yet."""
        self._crash_at = None

    def crash_here(self) -> None:
        """Simulate SIGKILL before the next coroutine step."""
        self.frozen = True  # until the crash, which must run outside the process's own steps
        asyncio.get_running_loop().call_soon(self._die, context=Context())

    def _die(self) -> None:
        self.crash()
        self.crashed()

    def sleeper(self) -> asyncio.Future[None]:
        """A future that resolves when the process is thawed; frozen coroutines wait for it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(future)
        return future

    def _wake(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for future in sleepers:
            if not future.done():
                future.set_result(None)


def running_process() -> Process:
    """The process whose code runs now, or one that was killed and whose tasks have not ended."""
    process = _whose.get()
    assert process is not None
    return process


class _Driven(Coroutine[Any, Any, Any]):
    """Wrapper of a process's coroutine that intercepts every step."""

    def __init__(self, process: Process, inner: Coroutine[Any, Any, Any]) -> None:
        self._process = process
        self._inner = inner
        self._held: tuple[Callable[[Any], Any], Any] | None = None
        self.__name__ = getattr(inner, "__name__", "coroutine")
        self.__qualname__ = getattr(inner, "__qualname__", "coroutine")

    def send(self, value: Any) -> Any:
        if self._held is not None:
            (act, what), self._held = self._held, None
            return self._step(act, what)
        return self._step(self._inner.send, value)

    def throw(self, kind: Any, value: Any = None, trace: Any = None) -> Any:
        self._held = None
        return self._step(self._inner.throw, kind if value is None else value)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError("a wrapped coroutine must be run by a task, not awaited")

    def _step(self, act: Callable[[Any], Any], what: Any) -> Any:
        process = self._process
        if process.dead:
            return act(what)
        process.step()
        if process.sites is not None and not process.frozen and process.sites(place_of(self._inner), True):
            process.crash_here()
        if process.frozen:
            self._held = (act, what)
            future = process.sleeper()
            future._asyncio_future_blocking = True
            return future
        found = act(what)
        if process.sites is not None and not process.frozen and process.sites(place_of(self._inner), False):
            process.crash_here()
        if process.after is not None:
            process.after()
        return found


@lru_cache(maxsize=1 << 12)
def _in_planner_or_stages(filename: str) -> str:
    """The file's path below the rooms' folder where it belongs to `planner` or `stages`; else empty."""
    rooms = Path(__file__).resolve().parents[2]
    path = Path(filename)
    inside = path.relative_to(rooms) if path.is_relative_to(rooms) else Path()
    return str(inside) if inside.parts[:1] in (("planner",), ("stages",)) else ""


def place_of(coroutine: Any) -> str:
    """FILE:LINE of the innermost planner or stages frame in which a coroutine waits; empty before its first await."""
    place = ""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            file = _in_planner_or_stages(frame.f_code.co_filename)
            if file:
                place = f"{file}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return place


def task_factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
    """For `loop.set_task_factory`: assigns each task to the process of its context; the broker's tasks have none."""
    context = more.get("context")
    if getattr(coroutine, "__qualname__", "") == "Group._balance":
        more["context"] = Context()
        return asyncio.Task(coroutine, loop=loop, **more)
    process = context.get(_whose) if context is not None else _whose.get()
    if process is not None:
        coroutine = _Driven(process, coroutine)
    return asyncio.Task(coroutine, loop=loop, **more)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _only_bus(error: BaseException) -> bool:
    """Whether the error consists of bus errors only."""
    if isinstance(error, BaseExceptionGroup):
        return all(_only_bus(inner) for inner in error.exceptions)
    return isinstance(error, BusError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log messages about injected crashes and about sends whose process died before the acknowledgement."""
    before, library = structlog.get_config(), logging.getLogger("asyncio")
    level = library.level
    library.setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        library.setLevel(level)
        structlog.configure(**before)
