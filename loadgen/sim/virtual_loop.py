"""An asyncio event loop on virtual time: when every task waits, the clock jumps to the next timer.

The real shells run on it unchanged because they read the time from `loop.time()`. Sleeping takes no real time, and
two runs with the same seed take the same steps in the same order. The loop rejects threads, sockets and processes:
their work takes no virtual time and completes in a nondeterministic order. When no timer is scheduled and tasks still
wait, the loop raises `DeadlockError`, which names them.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any, NoReturn, TypeVar

from bus.errors import DeeparError, InvariantError

T = TypeVar("T")

_SELF_PIPE_REGISTRATIONS = 1
"""Number of registrations allowed: only asyncio's own wake-up pipe."""


class DeadlockError(DeeparError):
    """No timer is scheduled and tasks still wait. `waiting` lists each task and the line at which it waits."""

    def __init__(self, now_s: float, waiting: tuple[str, ...]) -> None:
        lines = "".join(f"\n  {line}" for line in waiting)
        super().__init__(f"deadlock at {now_s:.6f} s of virtual time; {len(waiting)} tasks wait forever:{lines}")
        self.now_s = now_s
        self.waiting = waiting


class HorizonError(DeeparError):
    """Virtual time reached the given horizon. `waiting` lists each waiting task and the line at which it waits."""

    def __init__(self, horizon_s: float, waiting: tuple[str, ...]) -> None:
        lines = "".join(f"\n  {line}" for line in waiting)
        super().__init__(f"not finished by {horizon_s:g} s of virtual time; still waiting:{lines}")
        self.horizon_s = horizon_s
        self.waiting = waiting


class VirtualTimeError(DeeparError):
    """The virtual loop was asked for an operation that needs real time: a thread, socket or process."""


class _Selector(selectors.BaseSelector):
    """A selector that advances the loop's clock instead of waiting."""

    def __init__(self) -> None:
        self._keys: dict[Any, selectors.SelectorKey] = {}
        self.on_idle: Callable[[float | None], None] = lambda timeout: None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if len(self._keys) >= _SELF_PIPE_REGISTRATIONS:
            raise VirtualTimeError("virtual time does not support sockets or pipes: they run in real time")
        key = selectors.SelectorKey(fileobj, fileobj if isinstance(fileobj, int) else fileobj.fileno(), events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.on_idle(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop; `time()` starts at 0 and advances only when every task waits.

    `horizon_s` bounds virtual time: a run beyond it raises `HorizonError`, because periodic timers such as heartbeats
    would otherwise keep a stuck run alive forever. `run_forever` raises `DeadlockError`.
    """

    def __init__(self, *, horizon_s: float | None = None) -> None:
        selector = _Selector()
        self._now_s = 0.0  # set before super().__init__, which may call time()
        self._horizon_s = horizon_s
        self._owner = threading.get_ident()
        super().__init__(selector)
        selector.on_idle = self._advance

    def time(self) -> float:
        return self._now_s

    def _advance(self, timeout: float | None) -> None:
        # asyncio passes only the seconds until the next timer; adding them to the clock would accumulate rounding
        # errors, so the clock is set to the timer's own time.
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if timeout is None or not scheduled:
            raise DeadlockError(self._now_s, self.waiting())
        instant = scheduled[0].when()
        if self._horizon_s is not None and instant > self._horizon_s:
            raise HorizonError(self._horizon_s, self.waiting())
        self._now_s = max(self._now_s, instant)
        # asyncio runs a timer early if it is due within the clock's resolution. With asyncio's default of a nanosecond,
        # a task that sleeps for less than that would wake up too early again and again, so the resolution is minimal.
        self._clock_resolution = math.ulp(self._now_s)

    def waiting(self) -> tuple[str, ...]:
        """One line per unfinished task: its name and the innermost line at which it waits."""
        return tuple(sorted(_describe(task) for task in asyncio.all_tasks(self)))

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._owner:
            raise VirtualTimeError("a thread called into the virtual loop; replace the thread with a simulated port")
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        name = getattr(func, "__qualname__", repr(func))
        raise VirtualTimeError(
            f"virtual time does not support threads, so {name} cannot run in one",
            remedy="use a modelled runner, which waits on the loop's clock",
        )

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("virtual time does not support processes")

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("virtual time does not support processes")


def run_virtual(main: Coroutine[Any, Any, T], *, horizon_s: float | None = None) -> T:
    """Run `main` to its end on a new `VirtualLoop` and return its result.

    Raises the errors of `main`, `DeadlockError`, `HorizonError`, and `InvariantError` if a task does not end when it is
    cancelled.
    """
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(horizon_s=horizon_s)) as runner:
            return runner.run(main)
    except DeadlockError as error:
        # A task that ignores its cancellation causes a second deadlock while the runner closes; the first error is
        # kept as the cause.
        if isinstance(error.__context__, DeadlockError | HorizonError):
            raise InvariantError(f"tasks did not end when cancelled: {'; '.join(error.waiting)}") from error.__context__
        raise


def _describe(task: asyncio.Task[Any]) -> str:
    """ "NAME at file.py:LINE in function": the innermost coroutine that the task awaits."""
    waits: Any = task.get_coro()
    place = ""
    while waits is not None:
        frame = _first(waits, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            place = f" at {file}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        waits = _first(waits, "cr_await", "gi_yieldfrom", "ag_await")
    return f"{task.get_name()}{place}"


def _first(value: Any, *attributes: str) -> Any:
    """The first of the attributes that exists and is not None; coroutine types name them differently."""
    found = (getattr(value, attribute, None) for attribute in attributes)
    return next((attribute for attribute in found if attribute is not None), None)
