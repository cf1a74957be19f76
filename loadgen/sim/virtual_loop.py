"""An asyncio event loop on virtual time: when everything waits, the clock jumps to the next timer.

Real shells run on it unchanged, since they take the time from `loop.time()`: an hour of sleeping costs
nothing, and two runs with the same seed take the same steps in the same order. What would bring the real
world in, threads, sockets and processes, is refused with an error that says so, because a computation in a
thread takes no virtual time and ends in an order nobody chose. When nothing is scheduled and tasks still
wait, no step can ever follow: `DeadlockError` names them.
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
"""asyncio registers the reading end of its own wake-up pipe, and nothing else is allowed."""


class DeadlockError(DeeparError):
    """Nothing is scheduled and tasks still wait: virtual time has no next instant. `waiting` says who waits where."""

    def __init__(self, now_s: float, waiting: tuple[str, ...]) -> None:
        lines = "".join(f"\n  {line}" for line in waiting)
        super().__init__(f"deadlock at {now_s:.6f} s of virtual time; {len(waiting)} tasks wait for ever:{lines}")
        self.now_s = now_s
        self.waiting = waiting


class HorizonError(DeeparError):
    """Virtual time would pass the horizon that was given; `waiting` says who still waits where."""

    def __init__(self, horizon_s: float, waiting: tuple[str, ...]) -> None:
        lines = "".join(f"\n  {line}" for line in waiting)
        super().__init__(f"not over by {horizon_s:g} s of virtual time; still waiting:{lines}")
        self.horizon_s = horizon_s
        self.waiting = waiting


class VirtualTimeError(DeeparError):
    """Something was asked of the virtual loop that only the real world can do: threads, sockets."""


class _Selector(selectors.BaseSelector):
    """Never waits: where a real selector would sleep, it moves the loop's clock instead."""

    def __init__(self) -> None:
        self._keys: dict[Any, selectors.SelectorKey] = {}
        self.on_idle: Callable[[float | None], None] = lambda timeout: None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if len(self._keys) >= _SELF_PIPE_REGISTRATIONS:
            raise VirtualTimeError("virtual time knows no sockets or pipes: the real world would not wait for it")
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
    """The event loop; `time()` starts at 0 and only moves when every task waits.

    `horizon_s` bounds virtual time: a run that would go past it raises `HorizonError` (periodic timers, such
    as heartbeats, would otherwise keep a stuck run alive for ever). Raises `DeadlockError` out of
    `run_forever`.
    """

    def __init__(self, *, horizon_s: float | None = None) -> None:
        selector = _Selector()
        self._now_s = 0.0  # before super().__init__, which may ask for the time
        self._horizon_s = horizon_s
        self._owner = threading.get_ident()
        super().__init__(selector)
        selector.on_idle = self._advance

    def time(self) -> float:
        return self._now_s

    def _advance(self, timeout: float | None) -> None:
        # asyncio hands over only "seconds until the next timer"; adding them up would round, so that a timer
        # could fire a hair early or late. The timer's own instant is exact.
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if timeout is None or not scheduled:
            raise DeadlockError(self._now_s, self.waiting())
        instant = scheduled[0].when()
        if self._horizon_s is not None and instant > self._horizon_s:
            raise HorizonError(self._horizon_s, self.waiting())
        self._now_s = max(self._now_s, instant)
        # asyncio runs a timer that is due within the clock's resolution at once. A clock that jumps has none to speak of:
        # with a nanosecond, whoever sleeps for the last half of one would wake up too early, and again, for ever.
        self._clock_resolution = math.ulp(self._now_s)

    def waiting(self) -> tuple[str, ...]:
        """One line for each task that is not done: its name and the innermost place at which it waits."""
        return tuple(sorted(_describe(task) for task in asyncio.all_tasks(self)))

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._owner:
            raise VirtualTimeError("a thread called into the virtual loop; model its work behind a port")
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        name = getattr(func, "__qualname__", repr(func))
        raise VirtualTimeError(
            f"virtual time runs no threads, so {name} cannot run in one",
            remedy="use a modelled runner, which waits on the loop's clock",
        )

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("virtual time runs no processes")

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("virtual time runs no processes")


def run_virtual(main: Coroutine[Any, Any, T], *, horizon_s: float | None = None) -> T:
    """Run `main` to its end on a fresh `VirtualLoop` and return its result.

    Raises what `main` raises, `DeadlockError`, `HorizonError`, and `InvariantError` when a task is left
    behind that a cancellation does not end.
    """
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(horizon_s=horizon_s)) as runner:
            return runner.run(main)
    except DeadlockError as error:
        # A task that swallows its cancellation shows as a second deadlock while the runner closes; say which
        # came first.
        if isinstance(error.__context__, DeadlockError | HorizonError):
            raise InvariantError(f"tasks outlive their cancellation: {'; '.join(error.waiting)}") from error.__context__
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
    """The first of the attributes that the value has and that is not None (coroutines differ)."""
    found = (getattr(value, attribute, None) for attribute in attributes)
    return next((attribute for attribute in found if attribute is not None), None)
