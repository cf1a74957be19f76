"""Frames at a fixed rate, as a camera sends them: in one session, or each as a request that is a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from bus.tensors import Array
from bus.values import DELAY_PARTS
from deepar.client import AsyncClient
from deepar.protocol import Answer, InferenceError

DRAIN_S = 30.0
"""How long the last answers may take."""

PLACEMENT = "-device"
"""The device computes nothing, so that every frame crosses the bus."""


@dataclass(slots=True)
class Stream:
    """What became of the frames of one stream."""

    mode: str  # session, request
    rate_hz: float
    sent: int = 0
    delays_s: list[float] = field(default_factory=list)  # from when a frame was due to its answer
    failures: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    stations_s: list[float] = field(default_factory=list)  # predicted time of one frame, latencies included
    elapsed_s: float = 0.0
    cpu_s: float = 0.0  # of the device's process

    def take(self, answer: Answer, delay_s: float) -> None:
        """Count one answer."""
        self.delays_s.append(delay_s)
        told = answer.parameters
        kind = str(told.get("deepar_kind", ""))
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        parts = [float(told.get(f"deepar_predicted_{part}_s", 0.0)) for part in DELAY_PARTS]
        self.stations_s.append(float(told.get("deepar_predicted_s", sum(parts))))

    @property
    def lost(self) -> int:
        """Frames without an answer."""
        return self.sent - len(self.delays_s)

    @property
    def placement(self) -> str:
        """Where most frames were computed."""
        return max(self.kinds, key=self.kinds.__getitem__, default="")

    def quantile_s(self, share: float) -> float:
        """A quantile of the delays; infinity where no answer came."""
        ordered = sorted(self.delays_s) or [float("inf")]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def as_row(self, model: str, input_bytes: int) -> dict[str, Any]:
        """The row of the report."""
        return {
            "protocol": "websocket" if self.mode == "session" else "rest-binary",
            "model": model,
            "placement": self.placement,
            "mode": self.mode,
            "concurrency": 1,
            "input_bytes": input_bytes,
            "requests_per_s": round(len(self.delays_s) / max(self.elapsed_s, 1e-9), 2),
            "p50_s": self.quantile_s(0.5),
            "p99_s": self.quantile_s(0.99),
            "cpu_s_per_request": self.cpu_s / max(1, len(self.delays_s)),
            "sent": self.sent,
            "lost": self.lost,
            "stations_s": median(self.stations_s) if self.stations_s else None,
        }


async def stream(
    url: str, model: str, array: Array, *, mode: str, rate_hz: float, seconds: float, cpu_s: Callable[[], float]
) -> Stream:
    """Send frames at `rate_hz` for `seconds`, whether or not their answers come in time."""
    found = Stream(mode, rate_hz)
    play = _in_session if mode == "session" else _as_requests
    async with AsyncClient(url) as client:
        await client.infer(model, array, placement=PLACEMENT)  # loads the model, and tells that the endpoint works
        before_s, begin_s = cpu_s(), perf_counter()
        await play(client, model, array, found, seconds)
        found.elapsed_s, found.cpu_s = perf_counter() - begin_s, cpu_s() - before_s
    return found


async def _paced(found: Stream, seconds: float, send: Callable[[float], Awaitable[None]]) -> None:
    """Call `send` with the instant at which each frame is due."""
    begin_s = perf_counter()
    for number in range(int(seconds * found.rate_hz)):
        due_s = begin_s + number / found.rate_hz
        await asyncio.sleep(max(0.0, due_s - perf_counter()))
        found.sent += 1
        await send(due_s)


async def _in_session(client: AsyncClient, model: str, array: Array, found: Stream, seconds: float) -> None:
    async with await client.session(model, rate_hz=found.rate_hz, placement=PLACEMENT) as session:
        due_s: dict[str, float] = {}
        await session.send(array)  # opens the way
        await session.receive()

        async def send(at_s: float) -> None:
            due_s[await session.send(array)] = at_s

        async def receive() -> None:
            while (answer := await session.receive()) is not None:
                if isinstance(answer, InferenceError):
                    found.failures.append(str(answer))
                else:
                    found.take(answer, perf_counter() - due_s[answer.id])
                if len(found.delays_s) + len(found.failures) == int(seconds * found.rate_hz):
                    return

        receiving = asyncio.create_task(receive())
        await _paced(found, seconds, send)
        async with asyncio.timeout(DRAIN_S):
            await receiving


async def _as_requests(client: AsyncClient, model: str, array: Array, found: Stream, seconds: float) -> None:
    async def one(at_s: float) -> None:
        try:
            answer = await client.infer(model, array, deepar_mode="request", placement=PLACEMENT)
        except InferenceError as error:
            found.failures.append(str(error))
        else:
            found.take(answer, perf_counter() - at_s)

    async with asyncio.TaskGroup() as group:

        async def send(at_s: float) -> None:
            group.create_task(one(at_s))

        await _paced(found, seconds, send)
