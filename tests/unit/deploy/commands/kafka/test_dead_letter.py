"""Dead letters as people read them."""

from __future__ import annotations

import asyncio

from bus import topics
from bus.dead_letter import write_dead_letter
from bus.errors import ProtocolError
from bus.memory.bus import MemoryBus
from bus.port import Record
from deploy.commands.kafka.dead_letter import hex_lines, read_dead_letters


def test_a_letter_tells_origin_task_cause_and_keeps_the_bytes() -> None:
    async def run() -> None:
        async with MemoryBus() as bus:
            await bus.create_topics(topics.specs())
            broken = Record("deepar.activations.e1", 2, 77, 0, "t", b"\x80\xff")
            await write_dead_letter(bus, broken, ProtocolError("undecodable", "no map"), task_id="t", by="e1")
            await bus.send(topics.DEAD_LETTER, b"?", key="somebody else's")
            first, second = await read_dead_letters(bus)
        assert first.as_object() == {
            "topic": "deepar.activations.e1",
            "partition": 2,
            "offset": 77,
            "task_id": "t",
            "cause": "undecodable",
            "error": "no map",
            "size_bytes": 2,
            "by": "e1",
        }
        assert (first.origin, first.value) == ("deepar.activations.e1/2/77", b"\x80\xff")
        assert (second.topic, second.partition, second.cause) == ("", -1, "")

    asyncio.run(run())


def test_bytes_are_printed_as_hexdump_does() -> None:
    assert hex_lines(b"DeePar\x00") == ["00000000  44 65 65 50 61 72 00" + " " * 27 + "  DeePar."]
