"""Signing bus: a `Bus` that wraps another and signs what one speaker sends."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping
from typing import Literal

from bus import topics
from bus.errors import InvariantError
from bus.identity.frame_keys import FrameKeys
from bus.identity.keys import Key, satisfy
from bus.port import Bus, FoundTopic, Headers, Member, Position, Reader, RebalanceCallback, RecordValue, TopicPartition
from bus.topics import TopicSpec


class SignedBus:
    """Signs records on signed topics, and frames if the master requires it; passes everything else through unchanged.

    Signing a control message takes microseconds; signing a frame takes half a millisecond per megabyte.
    """

    def __init__(self, bus: Bus, key: Key) -> None:
        self.bus = bus
        self.key = key
        self.name = bus.name
        self._beside: dict[int, SignedBus] = {}  # by the identity of the bus of another site

    async def __aenter__(self) -> SignedBus:
        await self.bus.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.bus.__aexit__(*exc)

    def beside(self, topic: str, neighbour: str) -> Bus:
        other = self.bus.beside(topic, neighbour)
        if other is self.bus:
            return self
        if (known := self._beside.get(id(other))) is None:
            known = self._beside[id(other)] = SignedBus(other, self.key)
        return known

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        await self.bus.create_topics(specs)

    async def partitions(self, topic: str) -> int:
        return await self.bus.partitions(topic)

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        return await self.bus.found_topics(names)

    async def prepare_topic(self, topic: str) -> None:
        await self.bus.prepare_topic(topic)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self.bus.end_offsets(topic)

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        headers = self._signed(topic, value, key, partition, headers)
        return await self.bus.post(topic, value, key=key, partition=partition, headers=headers)

    async def send(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Position:
        headers = self._signed(topic, value, key, partition, headers)
        return await self.bus.send(topic, value, key=key, partition=partition, headers=headers)

    async def reader(
        self,
        partitions: Iterable[TopicPartition],
        *,
        start: Literal["start", "end"] | Mapping[TopicPartition, int],
    ) -> Reader:
        return await self.bus.reader(partitions, start=start)

    async def join(
        self,
        topics: Iterable[str],
        *,
        group: str,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
    ) -> Member:
        return await self.bus.join(topics, group=group, on_assigned=on_assigned, on_revoked=on_revoked)

    def _signed(
        self, topic: str, value: RecordValue | None, key: str | None, partition: int | None, headers: Headers
    ) -> Headers:
        if topic not in topics.SIGNED_TOPICS:
            frames = self.key.frames
            return headers if frames is None else (*headers, *frames.headers(topic, key, value or b""))
        if partition is None:
            raise InvariantError(f"a record on {topic} is signed for its region, and none is named")
        return (*headers, *self.key.headers(topic, partition, key, bytes(value or b"")))

    def __repr__(self) -> str:
        return f"<SignedBus {self.key.speaker} on {self.bus!r}>"


def signed(bus: Bus, key: Key | None) -> Bus:
    """`bus`, signing with `key`; `bus` itself if there is no key."""
    return bus if key is None else SignedBus(bus, key)


def frame_keys(bus: Bus) -> FrameKeys | None:
    """The keys that verify frames received over this bus; None if frames carry no proofs."""
    return bus.key.frames if isinstance(bus, SignedBus) else None


def satisfy_region(bus: Bus, demanded: str | None, who: str) -> None:
    """Check that this bus gives the proofs that a region requires. Raises `ConfigError`."""
    satisfy(demanded, bus.key if isinstance(bus, SignedBus) else None, who)


__all__ = ["SignedBus", "frame_keys", "satisfy_region", "signed"]
