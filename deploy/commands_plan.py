"""`deepar plan` and `deepar explain`: where a task would be cut, and why one was placed as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import ConfigError, ProtocolError, UnknownNameError
from bus.messages import Decision, decode
from bus.units import format_rate, format_seconds, parse_duration, parse_rate
from bus.values import Kind, ModelProfile, Objective, Placement, Role
from deploy.outputs import writable_file
from loadgen.scenario import parse_size
from planner.explain import Explanation
from planner.explain import explain as explain_task
from planner.plan import Constraints, Plan, Situation, plans, position_of
from planner.profiles import PlatformProfiles, load_profile

Platform = Annotated[
    str | None,
    typer.Option(metavar="P", help="A profile's name or file, or a file that `deepar profile --out` wrote."),
]


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the profile, or a .tflite file.")],
    link1: Annotated[str | None, typer.Option(help="Device to edge: 100Mbps. Default: the profile's.")] = None,
    link2: Annotated[str | None, typer.Option(help="Edge to cloud: 20Mbps. Default: the profile's.")] = None,
    profile: Annotated[
        str, typer.Option(metavar="P", help="Speeds, links and input sizes: a name or a file.")
    ] = "paper",
    device: Platform = None,
    edge: Platform = None,
    cloud: Platform = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000_000, help="N, inferences in the task.")] = 1,
    objective: Annotated[
        Objective, typer.Option(help="Sum of all parts, or stations busy at once.")
    ] = Objective.SEQUENTIAL,
    input_size: Annotated[str | None, typer.Option(help="Bytes of one input: 600KB. Default: the profile's.")] = None,
    pin: Annotated[list[Role] | None, typer.Option(help="A tier that must compute. Can be repeated.")] = None,
    forbid: Annotated[list[Role] | None, typer.Option(help="A tier that must not compute. Can be repeated.")] = None,
    keep_on_device: Annotated[
        str | None, typer.Option(metavar="LAYER", help="The device runs at least up to this layer: name or number.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="No link may carry more than this for one sample: 300KB.")
    ] = None,
    max_delay: Annotated[str | None, typer.Option(help="Only plans that are done by then: 200ms.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=100_000, help="So many plans, best first.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw delay over bandwidth with the best cuts (.png, .svg).", dir_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Where a model is best cut, for given speeds and bandwidths, under constraints.

    Example: `deepar plan alexnet --link1 100Mbps --link2 20Mbps --keep-on-device maxpool_1 --top 5`

    Exit code 1 when no cut keeps to the constraints.
    """
    if plot is not None:
        writable_file("--plot", plot, suffixes=(".png", ".svg"))
    base = load_profile(profile)
    rows = {
        role: _platform(base if given is None else given, role, model)
        for role, given in ((Role.DEVICE, device), (Role.EDGE, edge), (Role.CLOUD, cloud))
    }
    on_device = rows[Role.DEVICE]
    size = parse_size(input_size) if input_size is not None else base.input_bytes.get(model)
    situation = Situation(
        device=on_device,
        edge=_matching(on_device, rows[Role.EDGE]),
        cloud=_matching(on_device, rows[Role.CLOUD]),
        link1_bps=base.link1_bps if link1 is None else parse_rate(link1),
        link2_bps=base.link2_bps if link2 is None else parse_rate(link2),
        samples=samples,
        objective=objective,
        input_bytes=size,
        constraints=Constraints(
            pinned=frozenset(pin or ()),
            forbidden=frozenset(forbid or ()),
            keep_on_device=0 if keep_on_device is None else position_of(on_device, keep_on_device),
            max_cut_bytes=None if max_bytes is None else parse_size(max_bytes),
            max_delay_s=None if max_delay is None else parse_duration(max_delay),
        ),
    )
    found = plans(situation, top)
    if plot is not None:
        from deploy.plan_chart import draw_plan

        draw_plan(situation, plot)
        print(f"written: {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps(_plan_json(situation, found)))
    elif found:
        console = Console()
        console.print(_plan_table(situation, found, console.width))
    if not found:
        print(_nothing(situation), file=sys.stderr)
        raise typer.Exit(1)


def _platform(source: PlatformProfiles | str, role: Role, model: str) -> ModelProfile:
    """The profile of `model` on a tier, from a set of platforms, or from a file of one profile."""
    if isinstance(source, str) and source.endswith(".json") and Path(source).is_file():
        try:
            one = ModelProfile.model_validate_json(Path(source).read_bytes())
        except ValidationError:
            pass  # a set of platforms, perhaps
        else:
            if one.model != Path(model).name.removesuffix(".tflite"):
                raise ConfigError(f"{source} is a profile of {one.model}, not of {model}")
            return one
    found = load_profile(source) if isinstance(source, str) else source
    tier: dict[str, ModelProfile] = getattr(found, role.value)
    if model not in tier:
        raise UnknownNameError(
            f"profile {found.name} has no {model} on its {role.value}; it has {', '.join(tier)}",
            remedy=f"measure it: deepar profile {model} --out {role.value}.json, then --{role.value} {role.value}.json",
        )
    return tier[model]


def _matching(device: ModelProfile, other: ModelProfile) -> ModelProfile:
    if other.sha256 != device.sha256 or other.layers != device.layers:
        raise ConfigError(
            f"{other.platform} was measured on another {other.model} than {device.platform}",
            remedy="give all three tiers profiles of the same model file",
        )
    return other


def _plan_json(situation: Situation, found: list[Plan]) -> dict[str, Any]:
    return {
        "model": situation.device.model,
        "objective": situation.objective.value,
        "samples": situation.samples,
        "link1_bps": situation.link1_bps,
        "link2_bps": situation.link2_bps,
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
                "parts": one.parts.model_dump(),
            }
            for one in found
        ],
    }


PARTS_FROM = 76
"""Columns that it takes to show a plan's parts beside its delay and cuts."""


def _plan_table(situation: Situation, found: list[Plan], columns: int) -> Table:
    table = Table(
        title=f"{situation.device.model}, {situation.samples} sample{'s' * (situation.samples != 1)}, "
        f"{situation.objective.value}: links {format_rate(situation.link1_bps)} and {format_rate(situation.link2_bps)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("delay", justify="right", no_wrap=True)
    table.add_column("cut after", overflow="fold")
    for heading in ("device", "link 1", "edge", "link 2", "cloud", "result") if columns >= PARTS_FROM else ():
        table.add_column(heading, justify="right", style="dim", no_wrap=True)
    for one in found:
        parts = one.parts.model_dump().values() if columns >= PARTS_FROM else ()
        table.add_row(
            format_seconds(one.delay_s),
            _cuts(one, situation.device.layers),
            *(format_seconds(part) if part else "" for part in parts),
        )
    return table


def _cuts(one: Plan, layers: int) -> str:
    """The cuts as people say them; what computes shows in the columns beside."""
    if one.cut1 == layers:
        return "nowhere: device"
    if one.cut1 == one.cut2 or one.cut2 == layers:
        return one.cut1_name
    return f"{one.cut1_name}, {one.cut2_name}"


def _nothing(situation: Situation) -> str:
    best = next(iter(plans(replace(situation, constraints=Constraints()))), None)
    if best is None:
        return "no cut keeps to the constraints"
    return f"no cut keeps to the constraints; without them the best takes {format_seconds(best.delay_s)} on {best.kind.value}"


def explain(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's id.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A dump of the decisions: `deepar tail decisions --exit > FILE`."),
    ] = None,
    region: Annotated[int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Whose planner decided.")] = 0,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option("--bootstrap-servers", "-b", envvar="KAFKA_BOOTSTRAP_SERVERS", help="Kafka, host:port."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Why a task was placed as it was: every candidate, what each lacked, and what the start waited for.

    Everything comes from the decision record: from Kafka, or from a file. `deepar tail tasks --exit` names the tasks.

    Example: `deepar explain t1 --from decisions.jsonl`
    """
    decisions = list(read_dump(source, region)) if source is not None else read_topic(bootstrap_servers, region)
    found = explain_task(decisions, task)
    if as_json:
        print(json.dumps(explanation_json(found)))
    else:
        show(found, Console())


def read_dump(path: Path, region: int) -> Iterator[Decision]:
    """The decisions that count in a dump: lines of `deepar tail decisions`, or bare records.

    Raises `ConfigError` for a file that is not one.
    """
    log = DecisionLog()
    if not path.is_file():
        raise ConfigError(f"--from {path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            value = value.get("value", value)
            message = decode(topics.DECISIONS, json.dumps(value).encode())
        except (ValueError, AttributeError, ProtocolError) as error:
            raise ConfigError(f"{path}, line {number}: no record of {topics.DECISIONS}: {error}") from None
        if message.region == region and isinstance(accepted := log.accept(message), Decision):
            yield accepted


def read_topic(bootstrap_servers: str | None, region: int) -> list[Decision]:
    """Every decision of a region that counts, from Kafka, up to now."""
    from deploy import nodes
    from deploy.process import run_on_uvloop

    async def read() -> list[Decision]:
        log = DecisionLog()
        found: list[Decision] = []
        where = (topics.DECISIONS, region)
        async with nodes.kafka_bus(bootstrap_servers) as bus:
            await nodes.require_region(bus, region)
            reader = await bus.reader([where], start="start")
            try:
                while await reader.lag():
                    read = [log.read(record) for record in await reader.fetch(timeout_s=0.5)]
                    found += [message for message in read if isinstance(message, Decision)]
            finally:
                await reader.close()
        return found

    return run_on_uvloop(read())


def explanation_json(found: Explanation) -> dict[str, Any]:
    """The object that docs/json.md describes, with the task's story added."""
    decided = None
    if found.decided is not None:
        placed = found.decided
        decided = {
            "at_s": found.decided_at_s,
            "attempt": placed.attempt,
            "policy": placed.policy,
            "objective": placed.objective.value,
            "start_in_s": placed.wait_s,
            "delay_s": placed.delay_s,
            "placement": _placement_json(placed.placement),
            "parts": placed.parts.model_dump(),
        }
    return {
        "task_id": found.task_id,
        "state": found.state,
        "decided": decided,
        "candidates": [
            {
                "placement": None if c.placement is None else _placement_json(c.placement),
                "edge": c.edge,
                "family": c.family,
                "start_in_s": c.start_in_s,
                "delay_s": c.delay_s,
                "lacked": c.lacked,
                "chosen": c.chosen,
            }
            for c in found.candidates
        ],
        "waited_for": list(found.waited_for),
        "story": list(found.story),
    }


def _placement_json(placement: Placement) -> dict[str, Any]:
    return placement.model_dump(mode="json")


LACKED_BESIDE_FROM = 120
"""Columns that it takes to show what a candidate lacked beside it, and not below."""


def _cut_names(where: Placement) -> str:
    return "device alone" if where.edge is None else f"{where.cut1_name}, {where.cut2_name}"


def show(found: Explanation, console: Console) -> None:
    """The explanation for a terminal."""
    console.print(f"[bold]{found.task_id}[/] is {found.state}", highlight=False)
    for line in found.story:
        console.print(f"  {line}", highlight=False)
    if found.decided is None:
        console.print("It was never placed.", highlight=False)
        return
    table = Table(
        title=f"Candidates at {found.decided_at_s:.3f} s, best start of each",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("", "edge", "cut after", "starts in", "takes", "done in", "granted"):
        table.add_column(heading, justify="right" if heading.endswith(("in", "takes")) else "left", no_wrap=True)
    beside = console.width >= LACKED_BESIDE_FROM
    if beside:
        table.add_column("lacked at once")
    notes = []
    for c in found.candidates:
        lacked = [c.lacked] if beside else []
        where = c.placement
        if where is None or c.start_in_s is None or c.delay_s is None:
            table.add_row("", c.edge or "", c.family, "never", "", "", "", *lacked)
            notes.append(f"{c.edge or ''} {c.family}: {c.lacked}")
            continue
        if c.lacked:
            notes.append(f"{c.edge or ''} {_cut_names(where)}: {c.lacked}")
        table.add_row(
            "=>" if c.chosen else "",
            c.edge or "",
            _cut_names(where),
            format_seconds(c.start_in_s),
            format_seconds(c.delay_s),
            format_seconds(c.start_in_s + c.delay_s),
            ", ".join(format_rate(bps) for bps in (where.link1_bps, where.link2_bps) if bps),
            *lacked,
        )
    console.print(table)
    if notes and not beside:
        console.print("What each lacked at once:", highlight=False)
        for note in notes:
            console.print(f"  {note.strip()}", highlight=False, markup=False)
    if found.waited_for:
        console.print(f"It waited for {', '.join(found.waited_for)}.", highlight=False)


__all__ = ["explain", "explanation_json", "plan", "read_dump", "read_topic", "show"]
