"""Scenarios: the nodes, the arriving tasks and the decision settings of one experiment, as one value.

The core-only driver, the full simulator and the live comparison run the same scenario: `nodes` and `schedule` return
the same edges, devices and tasks for the same seed. Defaults are the paper's Section V-B with one random reachable
edge per device. Each quantity has its own random stream, so changing one parameter does not change the others.

A scenario file is TOML with the field names below. Rates, sizes and times may have units; a range is a list of two
values: `max_link1_bps = ["20Mbps", "300Mbps"]`. `link1_trace` and `link2_trace` name CSV files (`stages.network.trace`).
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bus.errors import ConfigError, unknown_name
from bus.messages import NodeAnnounced
from bus.text.units import parse_duration, parse_rate, parse_size
from bus.values import Execution, ModelProfile, Objective, Role
from loadgen.random_streams import Streams
from loadgen.replay import arrivals
from loadgen.replay.schedule import Schedule, make
from loadgen.replay.task_mix import PAPER_MODELS, Mix, Range
from planner.search.policies import BUILT_IN, check_objective, load_policy
from stages.network.played import PlayedNetwork
from stages.network.trace import Trace, read_trace

NO_LEASE_S = 1e9
"""Lease of simulated nodes that send no heartbeats: about thirty years, so they are never declared lost."""

ARRIVALS = ("uniform", "poisson", "constant", "bursts", "offline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One experiment. Validated when built; raises `ConfigError` naming the key."""

    name: str = "scenario"
    devices: int = 40  # number of devices; each submits tasks
    tasks: int | None = None  # total tasks; None: one per device, as in the paper
    edges: int = 10
    reachable: int | None = 1  # reachable edges per device, drawn at random; None: all edges
    arrivals: str = "uniform"  # one of ARRIVALS
    within_s: float = 300.0  # interval of `uniform` arrivals; else tasks / within_s is the mean rate
    burst_size: int = 10  # tasks per burst of `bursts`
    models: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(PAPER_MODELS, 1.0))  # weights
    samples: Range = (1, 1000)  # N_i
    input_bytes: Range | None = (10_000, 1_000_000)  # G_i(0); None: the model's own
    max_link1_bps: Range | None = (20e6, 300e6)  # B_i^1
    max_link2_bps: Range | None = (10e6, 50e6)  # B_i^2
    edge_link1_bps: Range = (5e9, 20e9)  # B_e^1
    edge_link2_bps: Range = (0.1e9, 5e9)  # B_e^2
    slots: Range = (1, 10)  # r_e
    deadline_s: float | None = None  # deadline of every task
    min_agreement: float | None = None  # of lossy codecs that every task allows; None: lossless ones only
    codecs: bool = False  # whether activations may be encoded on the links
    profile: str = "paper"  # profile with the speeds of device, edge and cloud
    policy: str = "deepar"
    objective: Objective = Objective.SEQUENTIAL
    execution: Execution | None = None  # None: derived from the objective
    noise: float = 0.0  # standard deviation of log(actual / predicted) of a task's times
    drift: float = 0.0  # standard deviation of log(actual / declared) of the speed of a node or link
    learn: bool = False  # whether the planner learns from completed tasks
    link1_latency_s: float = 0.0  # one-way latency of link 1, of every device
    link2_latency_s: float = 0.0  # the same of link 2, of every edge and the cloud
    link1_trace: Trace | None = None  # bandwidth and latency over time that every device plays on link 1
    link2_trace: Trace | None = None  # the same of every edge and the cloud on link 2

    def __post_init__(self) -> None:
        for name in ("devices", "edges", "burst_size"):
            _whole(name, getattr(self, name), 1)
        for name in ("tasks", "reachable"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        if self.reachable is not None and self.reachable > self.edges:
            raise ConfigError(f"reachable: {self.reachable} of {self.edges} edges")
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals: {self.arrivals!r} is not one of {', '.join(ARRIVALS)}")
        if not (self.within_s > 0 and math.isfinite(self.within_s)):
            raise ConfigError(f"within_s must be greater than 0, not {self.within_s}")
        for name in ("noise", "drift"):
            if not 0 <= getattr(self, name) < 10:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a small number from 0 up")
        for name in ("edge_link1_bps", "edge_link2_bps", "slots"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name}: {low:g}..{high:g} must be an ascending range of numbers greater than 0")
        if self.slots[0] < 1:
            raise ConfigError(f"slots: {self.slots[0]:g}..{self.slots[1]:g} must start at 1 or more")
        if self.policy in BUILT_IN:
            check_objective(BUILT_IN[self.policy], self.objective)
        _ = self.mix, self.runs_as, self.link1, self.link2  # these properties validate the fields that they use

    @property
    def mix(self) -> Mix:
        """The task mix of the scenario."""
        return Mix(
            models=self.models,
            samples=self.samples,
            max_link1_bps=self.max_link1_bps,
            max_link2_bps=self.max_link2_bps,
            input_bytes=self.input_bytes,
            deadline_s=self.deadline_s,
            min_agreement=self.min_agreement,
        )

    @property
    def runs_as(self) -> Execution:
        """Execution mode of the stages; by default the one that matches the objective."""
        return self.objective.executed_as(self.execution)

    @property
    def link1(self) -> PlayedNetwork:
        """The network of every device."""
        return PlayedNetwork(self.link1_latency_s, self.link1_trace)

    @property
    def link2(self) -> PlayedNetwork:
        """The network of every edge and the cloud."""
        return PlayedNetwork(self.link2_latency_s, self.link2_trace)

    def network(self, role: Role) -> PlayedNetwork:
        """The network that a node of this role plays."""
        return self.link1 if role is Role.DEVICE else self.link2

    @property
    def task_count(self) -> int:
        """Total number of tasks."""
        return self.devices if self.tasks is None else self.tasks

    def varied(self, **changes: Any) -> Scenario:
        """A copy with changed fields, written as in a file (text with units, lists as ranges). Raises `ConfigError`."""
        return dataclasses.replace(self, **{key: coerce(key, value) for key, value in changes.items()})

    def schedule(self, seed: int) -> Schedule:
        """The tasks of a seed, assigned to the devices round-robin."""
        rate = self.task_count / self.within_s
        patterns: dict[str, Callable[[], arrivals.Arrivals]] = {
            "uniform": lambda: arrivals.uniform(self.within_s),
            "poisson": lambda: arrivals.poisson(rate),
            "constant": lambda: arrivals.constant(rate),
            "bursts": lambda: arrivals.bursts(self.burst_size, self.burst_size / rate),
            "offline": arrivals.at_once,
        }
        devices = [device_name(index) for index in range(self.devices)]
        return make(self.task_count, patterns[self.arrivals](), self.mix, devices, seed=seed)

    def nodes(
        self, seed: int, profiles: Mapping[Role, tuple[ModelProfile, ...]], *, lease_s: float = NO_LEASE_S
    ) -> list[NodeAnnounced]:
        """Announcements of one cloud, the edges and the devices, with the profiles of their tier."""
        streams = Streams(seed)
        link1 = streams.stream("edge_link1").uniform(*self.edge_link1_bps, size=self.edges)
        link2 = streams.stream("edge_link2").uniform(*self.edge_link2_bps, size=self.edges)
        low, high = round(self.slots[0]), round(self.slots[1])
        slots = streams.stream("edge_slots").integers(low, high, size=self.edges, endpoint=True)
        reach = streams.stream("reachable")
        latency1_s, latency2_s = self.link1.mean_latency_s or None, self.link2.mean_latency_s or None
        nodes = [
            NodeAnnounced(
                node="cloud-0",
                role=Role.CLOUD,
                incarnation="i0",
                lease_s=lease_s,
                link2_latency_s=latency2_s,
                models=profiles[Role.CLOUD],
            )
        ]
        nodes += [
            NodeAnnounced(
                node=edge_name(index),
                role=Role.EDGE,
                incarnation="i0",
                lease_s=lease_s,
                slots=int(slots[index]),
                link1_capacity_bps=round(link1[index]),
                link2_capacity_bps=round(link2[index]),
                link2_latency_s=latency2_s,
                models=profiles[Role.EDGE],
            )
            for index in range(self.edges)
        ]
        for index in range(self.devices):
            order = reach.permutation(self.edges)  # `reachable=2` extends the choice of `reachable=1`
            near = None if self.reachable is None else tuple(edge_name(int(e)) for e in order[: self.reachable])
            nodes.append(
                NodeAnnounced(
                    node=device_name(index),
                    role=Role.DEVICE,
                    incarnation="i0",
                    lease_s=lease_s,
                    reachable_edges=near,
                    link1_latency_s=latency1_s,
                    models=profiles[Role.DEVICE],
                )
            )
        return nodes


def edge_name(index: int) -> str:
    """Name of a simulated edge, zero-padded because the planner breaks ties between edges by id."""
    return f"edge-{index:04d}"


def device_name(index: int) -> str:
    """Name of a simulated device."""
    return f"device-{index:05d}"


FIELDS = {entry.name: entry for entry in dataclasses.fields(Scenario)}
MOST = 10_000_000
"""Upper limit of every count in a scenario; more would not fit in memory."""

_RATES = {"max_link1_bps", "max_link2_bps", "edge_link1_bps", "edge_link2_bps"}
_WHOLE = {"devices", "tasks", "edges", "reachable", "burst_size"}
_TRACES = {"link1_trace", "link2_trace"}
_NULLABLE = {
    "tasks",
    "reachable",
    "input_bytes",
    "max_link1_bps",
    "max_link2_bps",
    "deadline_s",
    "execution",
    "min_agreement",
} | _TRACES


def read(path: Path) -> Scenario:
    """Read a scenario from a TOML file. Raises `ConfigError` naming the file and the key."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    fields.setdefault("name", path.stem)
    try:
        return Scenario().varied(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", remedy=error.remedy) from None


def coerce(key: str, value: Any) -> Any:
    """Convert the value of a file key or an option to the field's type. Raises `ConfigError` naming the key."""
    if key not in FIELDS:
        raise unknown_name("parameter of a scenario called", key, sorted(FIELDS))
    try:
        if key in _NULLABLE and value in (None, "all", "none"):
            return None
        if key in _RATES:
            return _range(value, partial(_whole_in_the_keys_unit, parse_rate))
        if key == "input_bytes":
            return _range(value, partial(_whole_in_the_keys_unit, parse_size))
        if key in ("samples", "slots"):
            return _range(value, _number)
        if key in _TRACES:
            return read_trace(Path(value))
        if key in ("within_s", "deadline_s", "link1_latency_s", "link2_latency_s"):
            return _in_the_keys_unit(parse_duration, value)
        if key in _WHOLE:
            number = _number(value)
            if not (abs(number) < MOST and number == int(number)):
                raise ValueError(f"{value!r} is not a whole number below {MOST:,}")
            return int(number)
        if key == "models":
            return _models(value)
        if key == "objective":
            return Objective(value)
        if key == "execution":
            return Execution(value)
        if key == "policy":
            load_policy(str(value))
        if key in ("learn", "codecs"):
            return _flag(value)
        return _number(value) if key in ("noise", "drift", "min_agreement") else str(value)
    except (ValueError, TypeError, ConfigError) as error:
        raise ConfigError(f"{key}: {error}", remedy=getattr(error, "remedy", None)) from None


def _in_the_keys_unit(parse: Callable[[str], float], value: Any) -> float:
    """Parse a quantity with a unit, or a number in the unit of the key's suffix (`_bps`, `_s`, `_bytes`)."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        return parse(str(value))
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} is not a number from 0 up")
    return number


def _whole_in_the_keys_unit(parse: Callable[[str], float], value: Any) -> int:
    return round(_in_the_keys_unit(parse, value))


def _number(value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (ValueError, TypeError):
        raise ValueError(f"{value!r} is not a number") from None


def _flag(value: Any) -> bool:
    found = {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower())
    if found is None:
        raise ValueError(f"{value!r} is not true or false")
    return found


def _range(value: Any, parse: Callable[[Any], float]) -> Range:
    if isinstance(value, str) and ".." in value:
        value = value.split("..")
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"{value!r} is not a range of two")
        return (parse(value[0]), parse(value[1]))
    return (parse(value), parse(value))


def _models(value: Any) -> dict[str, float]:
    if isinstance(value, str):
        names = [part.partition("=") for part in value.replace("+", ",").split(",")]
        return {name.strip(): _number(weight or 1) for name, _, weight in names}
    if isinstance(value, Mapping):
        return {str(name): _number(weight) for name, weight in value.items()}
    return {str(name): 1.0 for name in value}


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: {value!r} is not a whole number from {least} up")
