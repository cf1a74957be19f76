"""`deepar planner`: the planner of one or several regions in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from bus.errors import ConfigError
from bus.text.units import parse_duration
from bus.values import Objective
from deploy.console_output import completion
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import Bootstrap, Lease, ProbeOptions, Region
from deploy.services import wiring
from deploy.services.identities import MasterFile, master_of
from deploy.services.planner_process import parse_regions, run_planner, run_regions
from deploy.services.process import run_on_uvloop
from deploy.services.settings import (
    lease_of,
    node_name,
)
from deploy.services.wiring import PlannerSetup
from planner.core.options import WhenLate
from planner.service.service import PlannerService


@dataclass(frozen=True, kw_only=True)
class PlannerRegionOptions:
    """The region or regions of a planner process, and its name."""

    bootstrap_servers: Bootstrap = None
    region: Region = 0
    regions: Annotated[
        str | None,
        typer.Option(
            envvar="DEEPAR_REGIONS",
            help="Several regions: a list (0,1,2), or `all` to share all regions with other `all` planners.",
        ),
    ] = None
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the planner.")] = "planner"


@dataclass(frozen=True, kw_only=True)
class DecisionOptions:
    """How a planner decides."""

    policy: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_POLICY",
            help=(
                "Policy: deepar, no-delay, device-only, edge-only, cloud-only, neurosurgeon, routes, elastic, or "
                "module:name."
            ),
            autocompletion=completion.policies,
        ),
    ] = "deepar"
    objective: Annotated[
        Objective,
        typer.Option(
            envvar="DEEPAR_OBJECTIVE", help="Delay to minimise: pipelined for streaming execution, or sequential."
        ),
    ] = Objective.PIPELINED
    learn: Annotated[
        bool,
        typer.Option(
            "--learn/--no-learn",
            envvar="DEEPAR_LEARN",
            help="Correct predictions by what completed tasks and nodes measured.",
            rich_help_panel="Learning",  # a box of its own, so that its two names do not narrow the other helps
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """How long a planner waits for nodes, and how many tasks it lets wait."""

    lease: Lease = "5s"
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting tasks; further tasks are rejected (queue_full).")
    ] = 10_000
    patience: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_PATIENCE",
            help="Maximum time that a task waits for its device or a suitable node before it is rejected "
            "(no_device) or fails (device_lost, no_node).",
        ),
    ] = "10min"
    when_late: Annotated[
        WhenLate, typer.Option(help="Action for a task that is predicted to miss its deadline under every placement.")
    ] = WhenLate.REJECT
    max_waiting_per_device: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of waiting tasks per device; further tasks are rejected (device_queue_full)."
        ),
    ] = 1_000


@dataclass(frozen=True, kw_only=True)
class LeadershipOptions:
    """How a planner starts to lead, and which records it accepts."""

    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Take over at once instead of waiting for the leading planner's lease to expire."
        ),
    ] = False
    snapshot_every: Annotated[int, typer.Option(min=1, help="Decisions between two snapshots.")] = 500
    identity_master: MasterFile = None
    trust_everybody: Annotated[
        bool,
        typer.Option(
            "--trust-everybody",
            help="Accept records without proof of identity even if the region has required it so far.",
        ),
    ] = False


@with_option_groups
def planner(
    region: PlannerRegionOptions,
    decisions: DecisionOptions,
    queue: QueueOptions,
    leadership: LeadershipOptions,
    probes: ProbeOptions,
) -> None:
    """Run the planner of a region. It decides where each task runs and publishes its decisions.

    A second planner for the same region stands by and takes over when the first one stops sending heartbeats.

    Example: `deepar planner --policy neurosurgeon --http-port 9100`
    """
    bus = wiring.kafka_bus(region.bootstrap_servers)
    setup = planner_setup(region, decisions, queue, leadership)

    def make(number: int) -> PlannerService:
        return wiring.make_planner(bus, replace(setup, region=number))

    service = make(region.region)  # reports an unknown policy before connecting
    http_port, http_host = probes.http_port, probes.http_host
    if region.regions is None:
        run_on_uvloop(run_planner(bus, service, http_port=http_port, http_host=http_host))
    else:
        wanted = parse_regions(region.regions)
        run_on_uvloop(run_regions(bus, make, wanted, name=setup.name, http_port=http_port, http_host=http_host))


def planner_setup(
    region: PlannerRegionOptions, decisions: DecisionOptions, queue: QueueOptions, leadership: LeadershipOptions
) -> PlannerSetup:
    """The planner that the options describe. Raises `ConfigError`."""
    master = master_of(leadership.identity_master)
    if master is not None and leadership.trust_everybody:
        raise ConfigError("--trust-everybody and --identity-master exclude each other")
    return PlannerSetup(
        name=node_name(region.name, "--name"),
        region=region.region,
        policy=decisions.policy,
        objective=decisions.objective,
        execution=decisions.objective.execution,
        max_waiting=queue.max_waiting,
        max_waiting_per_device=queue.max_waiting_per_device,
        patience_s=parse_duration(queue.patience, "--patience"),
        when_late=queue.when_late,
        learning=decisions.learn,
        lease_s=lease_of(queue.lease),
        take_over=leadership.take_over,
        snapshot_every=leadership.snapshot_every,
        master=master,
        trust_everybody=leadership.trust_everybody,
    )
