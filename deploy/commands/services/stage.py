"""`deepar stage` and `deepar gateway`: one node in a process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bus import topics
from bus.errors import ConfigError
from bus.identity.keys import Speaker
from bus.identity.signed_bus import signed
from deploy.commands.services.stage_options import AcceleratorFlags, Link1Options, Link2Options, ServeFlags, StageFlags
from deploy.console_output import completion
from deploy.console_output.option_groups import with_option_groups
from deploy.services import wiring
from deploy.services.identities import key_of
from deploy.services.process import run_on_uvloop
from deploy.services.result_file import ResultFile
from deploy.services.settings import (
    CloudOptions,
    DeviceOptions,
    EdgeOptions,
    NodeOptions,
    lease_of,
    options_of,
)

stage_app = typer.Typer(no_args_is_help=True, help="Run a stage: device, edge or cloud worker.")

Edges = Annotated[
    list[str] | None,
    typer.Option(
        "--edge",
        envvar="DEEPAR_EDGES",
        help="Edge that the device can reach; repeatable. Default: all.",
        autocompletion=completion.edges,
    ),
]
DeviceLink = Annotated[
    str, typer.Option(envvar="DEEPAR_LINK", help="Limit of the device's link 1, like 50Mbps; 0: no limit.")
]


@stage_app.command("device")
@with_option_groups
def device(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the device.")] = "d1",
    edges: Edges = None,
    link: DeviceLink = "0",
    results: Annotated[Path | None, typer.Option(help="Append every result as a JSON line to this file.")] = None,
    *,
    network: Link1Options,
    serving: ServeFlags,
    flags: StageFlags,
) -> None:
    """Run a device. It computes the first layers of its tasks' models, sends activations and collects results.

    On one machine, `--link1-latency` and `--link1-trace` play the network of the device: its frames and its results arrive
    later, and what it sends follows a recorded bandwidth. With `--serve`, clients send it their own input.

    Example: `deepar stage device --name d1 --edge e1 --slowdown 8 --link1-latency 20ms --results d1.jsonl`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=link,
        **network.played(),
        **serving.served(),
        **flags.machine(),
    )
    _run_stage(options, flags, results)


@stage_app.command("edge")
@with_option_groups
def edge(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the edge; part of its topic's name.")] = "e1",
    slots: Annotated[
        int, typer.Option(min=1, envvar="DEEPAR_SLOTS", help="Maximum number of tasks that compute at once (r_e).")
    ] = 2,
    link1: Annotated[str, typer.Option(envvar="DEEPAR_LINK1", help="Capacity of link 1, to its devices.")] = "1Gbps",
    link2: Annotated[str, typer.Option(envvar="DEEPAR_LINK2", help="Capacity of link 2, to the cloud.")] = "100Mbps",
    *,
    network: Link2Options,
    accelerator: AcceleratorFlags,
    flags: StageFlags,
) -> None:
    """Run an edge. It computes the middle layers in its slots and relays between devices and the cloud.

    `--link2-latency` and `--link2-trace` play a network between edge and cloud; give the cloud workers the same.

    Example: `deepar stage edge --name e1 --slots 4 --link1 1Gbps --link2 100Mbps --link2-latency 40ms`
    """
    if name in topics.RESERVED_EDGE_NAMES:
        raise ConfigError(f"an edge cannot be named {name}: the name is reserved for a topic")
    options = options_of(
        EdgeOptions,
        name=name,
        slots=slots,
        link1=link1,
        link2=link2,
        **network.played(),
        **accelerator.chosen(),
        **flags.machine(),
    )
    _run_stage(options, flags)


@stage_app.command("cloud")
@with_option_groups
def cloud(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the worker.")] = "c1",
    *,
    network: Link2Options,
    accelerator: AcceleratorFlags,
    flags: StageFlags,
) -> None:
    """Run a cloud worker. It computes the last layers; several workers share the tasks as one consumer group.

    `--link2-latency` and `--link2-trace` play a network between the cloud and the edges, in the direction of the results.

    Example: `deepar stage cloud --name c2 --model MODEL.tflite --link2-latency 40ms`
    """
    options = options_of(CloudOptions, name=name, **network.played(), **accelerator.chosen(), **flags.machine())
    _run_stage(options, flags)


@with_option_groups
def gateway(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the gateway among the devices.")] = "gateway",
    edges: Edges = None,
    link: DeviceLink = "0",
    *,
    network: Link1Options,
    serving: ServeFlags,
    flags: StageFlags,
) -> None:
    """Serve clients that have no device: a device stage whose requests only edges and the cloud compute.

    Example: `deepar gateway --serve 127.0.0.1:8600 --edge e1`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=link,
        gateway=True,
        **network.played(),
        **({**serving.served(), "serve": serving.serve or "127.0.0.1:8600"}),
        **flags.machine(),
    )
    _run_stage(options, flags)


def _run_stage(options: NodeOptions, flags: StageFlags, results: Path | None = None) -> None:
    from deploy.services.runners import make_runner  # imported here: the inference runtime is slow to import

    settings = wiring.node_settings(options, region=flags.region, lease_s=lease_of(flags.lease))
    key = key_of(Speaker(settings.role.value, settings.name), flags.identity_key)
    make = partial(make_runner, settings.role, options, flags.served(), wiring.log.info)
    on_result = ResultFile(results) if results else None
    endpoint = None
    if isinstance(options, DeviceOptions):
        from deploy.services.serving import endpoint_of  # imported here: it imports the inference runtime

        endpoint = endpoint_of(options)
    bus, probes = signed(wiring.kafka_bus(flags.bootstrap_servers), key), flags.probes
    run_on_uvloop(
        wiring.run_stage(
            bus,
            settings,
            make,
            http_port=probes.http_port,
            http_host=probes.http_host,
            on_result=on_result,
            endpoint=endpoint,
        )
    )
