"""`deepar plan`: the best cuts of a model under constraints."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError, unknown_name
from bus.text.json_text import json_text
from bus.text.units import (
    format_count,
    format_rate,
    format_seconds,
    format_share,
    parse_duration,
    parse_rate,
    parse_size,
)
from bus.values import Kind, ModelProfile, Objective, Role
from deploy.console_output import completion
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import Codecs, MinAgreement, checked_agreement
from deploy.console_output.writable import writable_file
from deploy.monitor.phrases import STATION_NAMES, cut_column
from planner.search.cost import NO_OVERHEADS, Overheads
from planner.search.profiles import PlatformProfiles, load_profile, with_codecs
from planner.search.route_search import MixedRoute
from planner.search.what_if import Constraints, Situation, WhatIfPlan, mixed, plans, position_of

Platform = Annotated[
    str | None,
    typer.Option(metavar="P", help="Profile of this tier: a name, or a file such as `deepar profile --out` writes."),
]


POLICIES = ("deepar", "routes")


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """Speeds, bandwidths and input sizes."""

    link1: Annotated[
        str | None, typer.Option(help="Bandwidth from device to edge: 100Mbps. Default: from the profile.")
    ] = None
    link2: Annotated[
        str | None, typer.Option(help="Bandwidth from edge to cloud: 20Mbps. Default: from the profile.")
    ] = None
    link1_latency: Annotated[str, typer.Option(metavar="S", help="One-way latency from device to edge: 20ms.")] = "0"
    link2_latency: Annotated[str, typer.Option(metavar="S", help="One-way latency from edge to cloud: 40ms.")] = "0"
    profile: Annotated[
        str, typer.Option(metavar="P", help="Profile with speeds, links and input sizes: a name or a file.")
    ] = "paper"
    device: Platform = None
    edge: Platform = None
    cloud: Platform = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The task to plan."""

    samples: Annotated[int, typer.Option(min=1, max=10_000_000, help="Number of inferences in the task.")] = 1
    objective: Annotated[
        Objective, typer.Option(help="Delay model: the sum of all parts, or stations that work in parallel.")
    ] = Objective.SEQUENTIAL
    input_size: Annotated[str | None, typer.Option(help="Bytes of one input: 600KB. Default: from the profile.")] = None
    codecs: Codecs = False
    min_agreement: MinAgreement = None
    policy: Annotated[
        str,
        typer.Option(help="`deepar`: one pair of cuts; `routes`: samples may take several (with objective pipelined)."),
    ] = "deepar"


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """What a plan must satisfy."""

    pin: Annotated[list[Role] | None, typer.Option(help="Tier that must compute; repeatable.")] = None
    forbid: Annotated[list[Role] | None, typer.Option(help="Tier that must not compute; repeatable.")] = None
    keep_on_device: Annotated[
        str | None, typer.Option(metavar="LAYER", help="Minimum last layer on the device: name or number.")
    ] = None
    max_bytes: Annotated[str | None, typer.Option(help="Maximum bytes on any link for one sample: 300KB.")] = None
    max_delay: Annotated[str | None, typer.Option(help="Show only plans that take at most this long: 200ms.")] = None

    def constraints(self, device: ModelProfile) -> Constraints:
        """The constraints on plans of the model that this profile describes. Raises `ConfigError`, `UnknownNameError`."""
        layer = self.keep_on_device
        return Constraints(
            pinned=frozenset(self.pin or ()),
            forbidden=frozenset(self.forbid or ()),
            keep_on_device=0 if layer is None else position_of(device, layer),
            max_cut_bytes=None if self.max_bytes is None else parse_size(self.max_bytes, "--max-bytes"),
            max_delay_s=None if self.max_delay is None else parse_duration(self.max_delay, "--max-delay"),
        )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is shown and written."""

    top: Annotated[int, typer.Option("--top", min=1, max=100_000, help="Number of plans to show, best first.")] = 1
    plot: Annotated[
        Path | None, typer.Option(help="Draw delay over bandwidth with the best cuts (.png, .svg).", dir_okay=False)
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False


@with_option_groups
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of a model in the profile, or a .tflite file.", autocompletion=completion.models
        ),
    ],
    system: SystemOptions,
    task: TaskOptions,
    limits: ConstraintOptions,
    output: OutputOptions,
) -> None:
    """Find the best cuts of a model for given speeds and bandwidths, under constraints.

    Example: `deepar plan alexnet --link1 100Mbps --link2 20Mbps --keep-on-device maxpool_1 --top 5`

    Exit code 1 if no cut satisfies the constraints.
    """
    if output.plot is not None:
        if task.policy != "deepar":
            raise ConfigError(
                "--plot draws single pairs of cuts", remedy=f"leave out --policy {task.policy}, or --plot"
            )
        writable_file("--plot", output.plot, suffixes=(".png", ".svg"))
    situation = _situation(model, system, task, limits)
    found = _found(situation, task.policy, output.top)
    if output.plot is not None:
        from deploy.console_output.plan_chart import draw_plan

        draw_plan(situation, output.plot)
        print(f"written: {output.plot}", file=sys.stderr)
    if output.as_json:
        print(json_text(_plan_json(situation, found, task.policy)))
    elif found:
        console = Console(emoji=False)
        console.print(_plan_table(situation, found, console.width))
    if not found:
        print(_nothing(situation, task.policy), file=sys.stderr)
        raise typer.Exit(1)


def _found(situation: Situation, policy: str, top: int) -> list[WhatIfPlan]:
    """The best plans; of policy `routes` first the one of several routes."""
    if policy not in POLICIES:
        raise unknown_name("policy for a plan called", policy, POLICIES)
    found = plans(situation, top)
    if policy == "routes":
        best = mixed(situation)
        found = [] if best is None else [best, *(one for one in found if one != best)][:top]
    return found


def _situation(model: str, system: SystemOptions, task: TaskOptions, limits: ConstraintOptions) -> Situation:
    """What the options describe. Raises `ConfigError`, `UnknownNameError`."""
    base = load_profile(system.profile)
    if task.codecs and base.fitted_to and None in (system.device, system.edge, system.cloud):
        base = with_codecs(base)
        print(f"note: {base.assumed}", file=sys.stderr)
    rows = {
        role: _platform(base if given is None else given, role, model)
        for role, given in ((Role.DEVICE, system.device), (Role.EDGE, system.edge), (Role.CLOUD, system.cloud))
    }
    on_device, size = rows[Role.DEVICE], task.input_size
    return Situation(
        device=on_device,
        edge=_matching(on_device, rows[Role.EDGE]),
        cloud=_matching(on_device, rows[Role.CLOUD]),
        link1_bps=base.link1_bps if system.link1 is None else parse_rate(system.link1, "--link1"),
        link2_bps=base.link2_bps if system.link2 is None else parse_rate(system.link2, "--link2"),
        samples=task.samples,
        objective=task.objective,
        overheads=Overheads(
            parse_duration(system.link1_latency, "--link1-latency"),
            parse_duration(system.link2_latency, "--link2-latency"),
        ),
        input_bytes=base.input_bytes.get(model) if size is None else parse_size(size, "--input-size"),
        constraints=limits.constraints(on_device),
        codecs=task.codecs,
        min_agreement=checked_agreement(task.min_agreement, codecs=task.codecs),
    )


def _platform(source: PlatformProfiles | str, role: Role, model: str) -> ModelProfile:
    """The profile of `model` on a tier, from a set of platforms, or from a file of one profile."""
    if isinstance(source, str) and source.endswith(".json") and Path(source).is_file():
        try:
            one = ModelProfile.model_validate_json(Path(source).read_bytes())
        except ValidationError:
            pass  # may be a set of platforms
        else:
            if one.model != Path(model).name.removesuffix(".tflite"):
                raise ConfigError(f"{source} is a profile of {one.model}, not of {model}")
            return one
    found = load_profile(source) if isinstance(source, str) else source
    tier: dict[str, ModelProfile] = getattr(found, role.value)
    if model not in tier:
        file = f"{role.value}.json"
        raise unknown_name(
            f"model in profile {found.name} called",
            model,
            tier,
            remedy=f"it has {', '.join(tier)}; to add it: deepar profile {model} --out {file}, and --{role.value} {file}",
        )
    return tier[model]


def _matching(device: ModelProfile, other: ModelProfile) -> ModelProfile:
    if other.sha256 != device.sha256 or other.layers != device.layers:
        raise ConfigError(
            f"{other.platform} was measured on another {other.model} than {device.platform}",
            remedy="give all three tiers profiles of the same model file",
        )
    return other


def _plan_json(situation: Situation, found: list[WhatIfPlan], policy: str) -> dict[str, Any]:
    return {
        "model": situation.device.model,
        "objective": situation.objective.value,
        "samples": situation.samples,
        "link1_bps": situation.link1_bps,
        "link2_bps": situation.link2_bps,
        "link1_latency_s": situation.overheads.link1_latency_s,
        "link2_latency_s": situation.overheads.link2_latency_s,
        "input_bytes": situation.device.cut_bytes[0] if situation.input_bytes is None else situation.input_bytes,
        "plans": [
            {
                "kind": one.kind.value,
                "edge": None if one.kind is Kind.DEVICE else "edge",
                "cut1": one.cut1,
                "cut2": one.cut2,
                "cut1_name": one.cut1_name,
                "cut2_name": one.cut2_name,
                "link1_bps": one.link1_bps,
                "link2_bps": one.link2_bps,
                "delay_s": one.delay_s,
                "latency_s": one.latency_s,
                "parts": one.parts.model_dump(),
                **({"routes": _routes(one)} if situation.codecs or policy == "routes" else {}),
            }
            for one in found
        ],
    }


def _routes(one: WhatIfPlan) -> list[dict[str, Any]]:
    routes = one.routes or [MixedRoute(one.cut1, one.cut2, 1.0, one.codecs)]
    return [
        {"cut1": cut1, "cut2": cut2, "codec1": codec1.value, "codec2": codec2.value, "share": share}
        for cut1, cut2, share, (codec1, codec2) in routes
    ]


LATENCY = "latency"

BESIDE_PARTS, CODECS, PART = 24, 12, 9
"""Width of a table without codecs and parts, of the codecs, and of each part."""


def _plan_table(situation: Situation, found: list[WhatIfPlan], columns: int) -> Table:
    """One row for each plan: its delay, its cuts, and the parts that add up to the delay of one sample.

    A narrow terminal shows the tiers and the latency in place of the parts. A column that is 0 in all plans is left out.
    """
    table = Table(title=_title(situation), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("delay", justify="right", no_wrap=True)
    table.add_column("cut after", overflow="fold")
    if situation.codecs:
        table.add_column("codecs", no_wrap=True)
    rows = [{**one.parts.model_dump(), LATENCY: one.latency_s} for one in found]
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    with_parts = columns >= BESIDE_PARTS + CODECS * situation.codecs + PART * len(shown)
    if not with_parts:
        table.add_column("on", no_wrap=True)
        shown = [name for name in shown if name == LATENCY]
    for name in shown:
        heading = STATION_NAMES.get(name.removesuffix("_s"), name)
        table.add_column(heading, justify="right", style="dim", no_wrap=True)
    for one, row in zip(found, rows, strict=True):
        table.add_row(
            format_seconds(one.delay_s),
            _cuts(situation, one),
            *((_codecs(one),) if situation.codecs else ()),
            *(() if with_parts else (one.kind.value,)),
            *(format_seconds(row[name]) if row[name] else "" for name in shown),
        )
    return table


def _cuts(situation: Situation, one: WhatIfPlan) -> str:
    """The layers after which the model is cut; of several routes one line for each, with its share."""
    if not one.routes:
        return cut_column(one.kind, one.cut1_name, one.cut2_name)
    name, layers = situation.device.cut_name, situation.device.layers
    lines = []
    for cut1, cut2, share, _ in one.routes:
        kind = Kind.of(cut1, cut2, layers)
        cut = cut_column(kind, name(cut1), name(cut2))
        where = f" ({kind.value})" if kind in (Kind.DEVICE_EDGE, Kind.DEVICE_CLOUD, Kind.EDGE_CLOUD) else ""
        lines.append(f"{format_share(share)} {cut}{where}")
    return "\n".join(lines)


def _codecs(one: WhatIfPlan) -> str:
    """The codec of each link that is used; of several routes one line for each."""
    if one.routes:
        return "\n".join(f"{codec1.value}, {codec2.value}" for *_, (codec1, codec2) in one.routes)
    used = (one.link1_bps, one.link2_bps)
    return ", ".join(codec.value for codec, bps in zip(one.codecs, used, strict=True) if bps)


def _title(situation: Situation) -> str:
    """The model, the task and the links."""
    overheads = situation.overheads
    links = [
        format_rate(bps) + (f" with {format_seconds(latency_s)}" if overheads != NO_OVERHEADS else "")
        for bps, latency_s in (
            (situation.link1_bps, overheads.link1_latency_s),
            (situation.link2_bps, overheads.link2_latency_s),
        )
    ]
    samples = format_count(situation.samples, "sample")
    return f"{situation.device.model}, {samples}, {situation.objective.value}: links {' and '.join(links)}"


def _nothing(situation: Situation, policy: str) -> str:
    best = next(iter(_found(replace(situation, constraints=Constraints()), policy, 1)), None)
    if best is None:
        return "no cut satisfies the constraints"
    took = format_seconds(best.delay_s)
    return f"no cut satisfies the constraints; without them the best plan takes {took} on {best.kind.value}"
