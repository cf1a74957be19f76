"""`deepar topics`: creation, repair and listing of the topics."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bus import topic_settings, topics
from bus.kafka import settings
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.topics import Partitions
from deploy.console_output.options import Bootstrap
from deploy.services import wiring
from deploy.services.process import run_on_uvloop

topics_app = typer.Typer(no_args_is_help=True, help="Create, repair or list the topics.")


@topics_app.command("create")
def topics_create(
    edges: Annotated[
        list[str] | None, typer.Option("--edge", help="Edge whose topic is created too; repeatable.")
    ] = None,
    regions: Annotated[int, typer.Option(min=1, help="Number of regions: partitions of the control topics.")] = 1,
    cloud_partitions: Annotated[
        int, typer.Option(min=1, help="Maximum number of cloud workers that can share the work.")
    ] = 8,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Create missing topics. A service with sufficient permissions creates its topics at start.

    Example: `deepar topics create --edge e1 --edge e2 --regions 1`
    """

    async def main() -> None:
        async with wiring.kafka_bus(bootstrap_servers) as bus:
            partitions = Partitions(regions=regions, cloud=cloud_partitions)
            await wiring.create_missing_topics(bus, edges or [], partitions)
            for spec in topics.specs(edges or [], partitions):
                typer.echo(f"{spec.name}  {await bus.partitions(spec.name)} partition(s)")

    run_on_uvloop(main())


@topics_app.command("repair")
def topics_repair(bootstrap_servers: Bootstrap = None) -> None:
    """Restore the settings of all topics, at every site; needs the permission to alter topics.

    Records that a wrong setting has already deleted are not restored.

    Example: `deepar topics repair`
    """

    async def main() -> None:
        connection = KafkaConnection.from_env(bootstrap_servers=bootstrap_servers)
        async with KafkaBus(connection) as bus:
            wrong = topic_settings.contradictions(await bus.found_topics())
            await settings.repair(connection, wrong)
            for one in wrong:
                typer.echo(f"{one.topic}  {one.key}={one.repair} (was {one.found})")
            if not wrong:
                typer.echo("all topics have the required settings")

    run_on_uvloop(main())


@topics_app.command("list")
def topics_list() -> None:
    """Show the table of topics: messages, keys, writers and readers.

    Example: `deepar topics list`
    """
    table = Table(title="the flow")
    for name in ("topic", "carries", "key", "written by", "read by"):
        table.add_column(name, overflow="fold")
    for topic in topics.TABLE:
        table.add_row(
            topic.name,
            f"{', '.join(topic.messages) or '-'} ({topic.encoding.value})",
            topic.key,
            ", ".join(topic.writers),
            ", ".join(topic.readers),
        )
    Console(emoji=False).print(table)
