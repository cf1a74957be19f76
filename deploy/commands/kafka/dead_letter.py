"""`deepar dead-letter list|show`: records that were rejected, with their origin and cause."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bus import topics
from bus.errors import UnknownNameError
from bus.port import Bus, Record
from bus.text.json_text import json_text
from deploy.console_output.options import AsJson, Bootstrap
from deploy.services import wiring
from deploy.services.process import run_on_uvloop

app = typer.Typer(
    no_args_is_help=True, help="List and show dead letters: rejected records with their origin and cause."
)

HEX_BYTES = 512
"""Maximum bytes of a dead letter that are shown on a terminal."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter. `topic`, `partition` and `offset` locate the rejected record."""

    topic: str
    partition: int
    offset: int
    task_id: str | None  # the task that the record belongs to, if known
    cause: str  # short, stable identifier
    error: str  # description for people
    by: str  # the service that rejected it
    value: bytes  # original bytes

    @classmethod
    def of(cls, record: Record) -> DeadLetter:
        """Parse a record of the dead-letter topic; a missing header gives an empty field."""
        headers = {name: content.decode(errors="replace") for name, content in record.headers}
        topic, partition, offset = ([*headers.get("deepar_origin", "").rsplit("/", 2), "", "", ""])[:3]
        return cls(
            topic,
            int(partition) if partition.isdecimal() else -1,
            int(offset) if offset.isdecimal() else -1,
            headers.get("deepar_task"),
            headers.get("deepar_cause", ""),
            headers.get("deepar_error", ""),
            headers.get("deepar_by", ""),
            record.value or b"",
        )

    @property
    def origin(self) -> str:
        """TOPIC/PARTITION/OFFSET."""
        return f"{self.topic}/{self.partition}/{self.offset}"

    def as_object(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "task_id": self.task_id,
            "cause": self.cause,
            "error": self.error,
            "size_bytes": len(self.value),
            "by": self.by,
        }


async def read_dead_letters(bus: Bus) -> list[DeadLetter]:
    """Read all retained dead letters, oldest first in each partition. Raises `BusError`."""
    partitions = await bus.partitions(topics.DEAD_LETTER)
    reader = await bus.reader([(topics.DEAD_LETTER, number) for number in range(partitions)], start="start")
    dead_letters = []
    try:
        while await reader.lag():
            dead_letters += [DeadLetter.of(record) for record in await reader.fetch(timeout_s=0.5)]
    finally:
        await reader.close()
    return dead_letters


def _dead_letters(bootstrap_servers: str | None) -> list[DeadLetter]:
    async def read() -> list[DeadLetter]:
        async with wiring.kafka_bus(bootstrap_servers) as bus:
            return await read_dead_letters(bus)

    return run_on_uvloop(read())


@app.command("list")
def list_dead_letters(
    cause: Annotated[str | None, typer.Option(help="Show only this cause: undecodable, wrong_shape, ...")] = None,
    task: Annotated[str | None, typer.Option(help="Show only dead letters of this task.")] = None,
    as_json: AsJson = False,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """List dead letters with their origin, task, cause and error.

    Example: `deepar dead-letter list --cause wrong_identity`
    """
    dead_letters = [
        letter
        for letter in _dead_letters(bootstrap_servers)
        if cause in (None, letter.cause) and task in (None, letter.task_id)
    ]
    if as_json:
        print(json_text({"letters": [letter.as_object() for letter in dead_letters]}))
        return
    table = Table("origin", "task", "cause", "error", "bytes")
    for letter in dead_letters:
        table.add_row(letter.origin, letter.task_id or "-", letter.cause, letter.error, f"{len(letter.value):,}")
    Console(emoji=False, highlight=False).print(table if dead_letters else "no dead letters", markup=False)


@app.command()
def show(
    origin: Annotated[str, typer.Argument(help="TOPIC/PARTITION/OFFSET, as `list` prints it.")],
    raw: Annotated[bool, typer.Option("--raw", help="Write only the original bytes to stdout.")] = False,
    as_json: AsJson = False,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Show one dead letter with its bytes.

    Example: `deepar dead-letter show deepar.tasks/0/17 --raw`
    """
    found = next((letter for letter in _dead_letters(bootstrap_servers) if letter.origin == origin), None)
    if found is None:
        raise UnknownNameError(f"no dead letter has the origin {origin}", remedy="list them: deepar dead-letter list")
    if raw:
        sys.stdout.buffer.write(found.value)
        return
    if as_json:
        print(json_text(found.as_object() | {"value_hex": found.value.hex()}))
        return
    console = Console(emoji=False, highlight=False)
    for name, value in found.as_object().items():
        console.print(f"{name}: {value}", markup=False)
    for line in hex_lines(found.value[:HEX_BYTES]):
        console.print(line, markup=False)
    if len(found.value) > HEX_BYTES:
        console.print(f"... {len(found.value) - HEX_BYTES:,} more bytes; use --raw for all", markup=False)


def hex_lines(data: bytes) -> list[str]:
    """Format bytes as `hexdump -C` does."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}  {row.hex(' '):<47}  {text}")
    return lines
