"""Peers of probes: how the stages send probes over their links and answer those of others (`stages.measuring.probes`).

A device probes edges through their activation topics, and they answer on the results topic. An edge probes the cloud stages
through their topic, and they answer on the edge's. Probes and answers take the latency of a played network, as data does.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bus.errors import BusError, ProtocolError
from bus.frames import Frame, encode_frame
from bus.port import Bus
from bus.values import is_node_name
from stages.measuring.clock import exact_clock

MAX_PROBED_EDGES = 16
"""A device probes at most this many edges: those that its tasks used last, then a selection that depends on its name."""
MAX_ECHOES = 64
"""Answers that are sent at the same time; further probes are dropped, and the prober tries again."""
CLOUD = "cloud"
"""The cloud stages as one peer of an edge."""


class DelayingLink(Protocol):
    """A link with the latency of a played network."""

    def latency_s(self, now_s: float) -> float:
        """The one-way latency now, by the loop's clock."""


def edges_to_probe(device: str, edges: Iterable[str], used: Sequence[str]) -> list[str]:
    """The edges that a device probes, of those that it reaches; `used` by its tasks, the last one first."""
    reached = sorted(edges)
    recent = [edge for edge in used if edge in reached]
    others = sorted(
        (edge for edge in reached if edge not in recent), key=lambda edge: zlib.crc32(f"{device} {edge}".encode())
    )
    return [*recent, *others][:MAX_PROBED_EDGES]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbingNode:
    """What probes and answers use of their node."""

    name: str
    bus: Bus
    gate: Callable[[], Awaitable[None]]  # returns when the node may send
    count: Callable[[str], None]  # adds to a counter of the node


class LinkToPeers:
    """The way of a node's probes (`stages.measuring.probes.ProbedLink`)."""

    def __init__(
        self,
        node: ProbingNode,
        link: DelayingLink,
        topic_of: Callable[[str], str],
        *,
        idle: Callable[[], bool],
        subscribe: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._node, self._link, self._topic_of = node, link, topic_of
        self._idle, self._subscribe = idle, subscribe

    @property
    def idle(self) -> bool:
        return self._idle()

    async def open(self, peer: str) -> None:
        if self._subscribe is not None:
            await self._subscribe(peer)
        await self._node.gate()

    async def send(self, peer: str, probe: Frame) -> None:
        await _after_latency(self._link)
        await self._node.bus.send(self._topic_of(peer), encode_frame(probe), key=self._node.name)


class EchoStage(Protocol):
    """What answers depend on: the edge's or the cloud's side."""

    @property
    def echo_link(self) -> DelayingLink:
        """The link that answers cross."""

    def echo_topic(self, prober: str) -> str:
        """The topic on which a prober reads answers. Raises ValueError for a name that no prober has."""


class Echoes:
    """Answers probes."""

    def __init__(
        self, node: ProbingNode, stage: EchoStage, can_sign: Callable[[str], bool], bus_for: Callable[[str], Bus]
    ) -> None:
        """`bus_for` returns the bus that carries a topic of answers."""
        self._node, self._stage, self._can_sign, self._bus_for = node, stage, can_sign, bus_for
        self._open = 0

    def answer(self, probe: Frame, group: asyncio.TaskGroup) -> None:
        """Send a probe back in the background. Raises `ProtocolError` if no node can have sent it."""
        if not is_node_name(probe.source):
            raise ProtocolError("undecodable", f"a probe from {probe.source!r}, which is not a node name")
        try:
            topic = self._stage.echo_topic(probe.source)
        except ValueError as error:
            raise ProtocolError("undecodable", f"a probe from {probe.source!r}: {error}") from None
        if self._open >= MAX_ECHOES or not self._can_sign(topic):
            self._node.count("probes_dropped")
            return
        self._open += 1
        name = self._node.name
        echo = Frame("echo", probe.task_id, probe.attempt, name)
        group.create_task(self._send(topic, probe.source, encode_frame(echo)), name=f"{name}: echo to {probe.source}")

    async def _send(self, topic: str, prober: str, payload: bytes) -> None:
        try:
            await _after_latency(self._stage.echo_link)
            await self._bus_for(topic).send(topic, payload, key=prober)
        except BusError:
            self._node.count("probes_dropped")
        finally:
            self._open -= 1


async def _after_latency(link: DelayingLink) -> None:
    if (latency_s := link.latency_s(exact_clock()())) > 0:
        await asyncio.sleep(latency_s)
