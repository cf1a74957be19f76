"""Warm sessions: plain requests for a model share a session, which follows their rate and closes when they stop.

A session reserves what its rate needs. When requests come faster than its rate, or much slower, another session with a
fitting rate is opened, and replaces it when it is ready.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from bus.messages import SessionTerms
from stages.devices.endings import SessionEndedError
from stages.devices.session import DeviceSession
from stages.serving.submission import PlanTerms

IDLE_S = 30.0
"""A session without requests for this long is closed."""

REFUSED_S = 10.0
"""After a session was refused, requests are tasks of their own for this long."""

MAX_WARM = 64
"""Sessions that are warm at once. Requests with yet other terms are tasks of their own."""

LOOK_S = 1.0
"""Interval at which rates are compared."""

LOWEST_HZ = 16.0
"""Rate of a first session. Rates are powers of two, so that they seldom change."""

HEADROOM = 1.5
"""The rate of a new session over the rate of the requests."""

SLOWER = 8.0
"""A session is replaced by a slower one if its rate is this many times too high."""

log = structlog.get_logger("serving")

OpenSession = Callable[[PlanTerms, SessionTerms], DeviceSession]
Spawn = Callable[[Coroutine[Any, Any, None], str], None]


@dataclass(slots=True)
class _Warm:
    """The session of one plan's requests."""

    session: DeviceSession
    rate_hz: float
    used_s: float
    fresh: int = 0  # requests since the last look
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=int(IDLE_S / LOOK_S)))  # rates at the last looks
    looked_s: float = 0.0
    replacing: bool = False
    settled_s: float = 0.0  # before this time the session is not replaced


class WarmSessions:
    """The warm sessions of a device."""

    def __init__(self, open_session: OpenSession, spawn: Spawn) -> None:
        self._open = open_session
        self._spawn = spawn
        self._clock = asyncio.get_running_loop().time
        self._warm: dict[PlanTerms, _Warm] = {}
        self._refused_until_s: dict[PlanTerms, float] = {}

    @property
    def count(self) -> int:
        """Number of open sessions."""
        return len(self._warm)

    def session(self, plan: PlanTerms, samples: int) -> DeviceSession | None:
        """The session for a request; None if the planner refused one a short time ago, or `MAX_WARM` have other terms."""
        warm = self._warm.get(plan)
        now_s = self._clock()
        if warm is None:
            if self._refused_until_s.get(plan, now_s) > now_s:
                return None
            if len(self._warm) >= MAX_WARM:
                return None
            self._refused_until_s.pop(plan, None)
            session = self._open(plan, SessionTerms(rate_hz=LOWEST_HZ))
            warm = self._warm[plan] = _Warm(session, LOWEST_HZ, now_s, looked_s=now_s)
        warm.used_s = now_s
        warm.fresh += samples
        return warm.session

    def ended(self, plan: PlanTerms, session: DeviceSession) -> None:
        """Note that a session ended. One that was never placed was refused."""
        warm = self._warm.get(plan)
        if warm is not None and warm.session is session:
            del self._warm[plan]
        if session.placed is None:
            self._refused_until_s[plan] = self._clock() + REFUSED_S

    def look(self) -> None:
        """Close idle sessions, and replace those whose rate does not fit. Call it every `LOOK_S`."""
        now_s = self._clock()
        for plan, until_s in list(self._refused_until_s.items()):
            if until_s <= now_s:
                del self._refused_until_s[plan]
        for plan, warm in list(self._warm.items()):
            if now_s - warm.used_s >= IDLE_S and not warm.session.waiting and not warm.session.under_way:
                del self._warm[plan]
                self._spawn(_close(warm.session), "close idle session")
                continue
            warm.recent.append(warm.fresh / max(now_s - warm.looked_s, LOOK_S / 2))
            warm.fresh, warm.looked_s = 0, now_s
            wanted_hz = fitting_rate(max(warm.recent))
            if (
                not warm.replacing
                and now_s >= warm.settled_s
                and (wanted_hz > warm.rate_hz or wanted_hz * SLOWER <= warm.rate_hz)
            ):
                warm.replacing = True
                self._spawn(self._replace(plan, warm, wanted_hz), "replace session")

    def cancel(self) -> None:
        """End all sessions now."""
        for warm in self._warm.values():
            warm.session.cancel()
        self._warm.clear()

    async def _replace(self, plan: PlanTerms, warm: _Warm, rate_hz: float) -> None:
        session = self._open(plan, SessionTerms(rate_hz=rate_hz))
        warm.settled_s = self._clock() + REFUSED_S
        try:
            await session.ready()
        except SessionEndedError as error:
            log.info("session not replaced", model=plan.model, rate_hz=rate_hz, cause=error.cause)
            return
        finally:
            warm.replacing = False
        if self._warm.get(plan) is not warm:
            await _close(session)
            return
        old, warm.session, warm.rate_hz = warm.session, session, rate_hz
        await _close(old)


def fitting_rate(requests_hz: float) -> float:
    """The rate of a session for requests at a rate: a power of two with headroom."""
    return max(LOWEST_HZ, 2.0 ** math.ceil(math.log2(max(requests_hz * HEADROOM, 1.0))))


async def _close(session: DeviceSession) -> None:
    with suppress(SessionEndedError):
        await session.close()
