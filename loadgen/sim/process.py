"""A process in virtual time that can be killed, stopped or frozen between any two steps of its coroutines.

The loop's task factory wraps every coroutine that a process starts (a context variable tells whose it is), so that each
step, from one await to the next, is counted and can be the last. A killed process flushes nothing: its connection dies
first, then its tasks are cancelled, so that nothing they do on their way out reaches anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextvars import Context, ContextVar
from typing import Any

import structlog

from bus.errors import BusError
from bus.memory.bus import MemoryBus

RESTART_S = 1.0
"""What a supervisor waits before it starts a process again that ended by itself."""

_whose: ContextVar[Process | None] = ContextVar("process", default=None)

Service = Callable[[MemoryBus], Awaitable[None]]


class Process:
    """One service with a connection of its own, supervised: it is started again when it dies."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], MemoryBus],
        serve: Service,
        *,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.after: Callable[[], None] | None = None  # called after each step of its coroutines
        self.sites: Callable[[str, bool], bool] | None = None
        """Asked at each await, by its place and whether it is over: whether the process is to die there."""
        self.steps = 0
        self.frozen = False
        self.dead = True
        self.ends: list[str] = []  # how it ended, where it was not killed and no bus was to blame
        self.bus: MemoryBus | None = None
        self._connect = connect
        self._serve = serve
        self._leave = leave
        self._crash_at: int | None = None
        self.crashed: Callable[[], None] = lambda: None
        self._sleepers: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, unless it runs."""
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
        assert self.bus is not None
        self.bus.kill()
        if self._task is not None:
            self._task.cancel()
        self._wake()

    def crash_in(self, steps: int, then: Callable[[], None]) -> None:
        """SIGKILL between two steps of its coroutines, `steps` from now; then call `then`."""
        self._crash_at, self.crashed = self.steps + steps, then

    def freeze(self) -> None:
        """SIGSTOP: no step is taken and no sign of life given."""
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
        """SIGTERM: finish or hand over, leave."""
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
        """One of its coroutines is about to go on."""
        self.steps += 1
        if self._crash_at is not None and self.steps >= self._crash_at:
            self._crash_at = None
            self.crash_here()

    def spare(self) -> None:
        """No crash that was ordered and has not come yet will come."""
        self._crash_at = None

    def crash_here(self) -> None:
        """SIGKILL, before any further step."""
        self.frozen = True  # until the crash, which cannot come out of a step of the process itself
        asyncio.get_running_loop().call_soon(self._die, context=Context())

    def _die(self) -> None:
        self.crash()
        self.crashed()

    def sleeper(self) -> asyncio.Future[None]:
        """What a coroutine waits for while the process is frozen."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(future)
        return future

    def _wake(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for future in sleepers:
            if not future.done():
                future.set_result(None)


class _Driven(Coroutine[Any, Any, Any]):
    """A coroutine of a process, step by step."""

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
        raise NotImplementedError("only a task drives it")

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


def place_of(coroutine: Any) -> str:
    """Where a coroutine waits, as far in as it is planner's or stages' code: FILE:LINE; empty before its first await."""
    place = ""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            room, _, file = frame.f_code.co_filename.rpartition("/")
            room = room.rpartition("/")[2]
            if room in ("planner", "stages"):
                place = f"{room}/{file}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return place


def task_factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
    """For `loop.set_task_factory`: tasks belong to the process whose context they are made in; the broker's to none."""
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
    """Whether nothing but the bus was to blame."""
    if isinstance(error, BaseExceptionGroup):
        return all(_only_bus(inner) for inner in error.exceptions)
    return isinstance(error, BusError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A thousand crashes that were ordered need not be told, nor the sends whose acknowledgement nobody lived to await."""
    before, library = structlog.get_config(), logging.getLogger("asyncio")
    level = library.level
    library.setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        library.setLevel(level)
        structlog.configure(**before)
