"""Options of `deepar loadgen replay`, in groups, and the values that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bus.errors import ConfigError
from bus.text.units import parse_duration, parse_rate, parse_size
from deploy.console_output import completion
from deploy.console_output.options import BootstrapFromEnv, MinAgreement
from deploy.services.identities import KeyFile
from deploy.services.settings import node_name
from loadgen.replay import arrivals
from loadgen.replay.metrics import Threshold
from loadgen.replay.task_mix import PAPER_MIX, Mix, Range, parse_models


class Distribution(StrEnum):
    """How requests of a given mean rate are spread."""

    CONSTANT = "constant"
    POISSON = "poisson"


@dataclass(frozen=True, kw_only=True)
class ArrivalOptions:
    """How many tasks arrive, and when."""

    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks, without warm-up.")] = 20
    within: Annotated[
        str, typer.Option(help="Interval in which all tasks arrive, at uniformly random times (the paper's arrivals).")
    ] = "10s"
    request_rate: Annotated[float | None, typer.Option(help="Tasks per second, instead of --within.")] = None
    request_distribution: Annotated[Distribution, typer.Option(help="Distribution of arrivals at --request-rate.")] = (
        Distribution.POISSON
    )
    request_intervals: Annotated[
        Path | None, typer.Option(help="File with the gaps between tasks in seconds: one per line, or a JSON list.")
    ] = None
    burst_size: Annotated[int | None, typer.Option(min=1, help="Tasks per burst, one burst every --burst-every.")] = (
        None
    )
    burst_every: Annotated[str, typer.Option(help="Time between bursts.")] = "10s"
    scenario: Annotated[
        arrivals.LoadgenScenario | None,
        typer.Option(help="MLPerf scenario; Server takes its rate from --request-rate.", case_sensitive=False),
    ] = None
    schedule_file: Annotated[
        Path | None,
        typer.Option("--schedule", help='JSON Lines file, one task per line: {"at_s": 1.5, "model": "lenet", ...}.'),
    ] = None

    def pattern(self) -> arrivals.Arrivals:
        """The arrival times. Raises `ConfigError` if options exclude each other."""
        given = [
            name
            for name, on in (
                ("--request-intervals", self.request_intervals is not None),
                ("--burst-size", self.burst_size is not None),
                ("--scenario", self.scenario is not None),
            )
            if on
        ]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other")
        rate = self.request_rate
        if self.scenario is arrivals.LoadgenScenario.SERVER:
            if rate is None:
                raise ConfigError("--scenario Server needs --request-rate")
            return arrivals.poisson(rate)
        if self.scenario is not None:
            return arrivals.at_once()
        if self.request_intervals is not None:
            return arrivals.intervals(arrivals.read_intervals(self.request_intervals))
        if self.burst_size is not None:
            return arrivals.bursts(self.burst_size, parse_duration(self.burst_every, "--burst-every"))
        if rate is not None:
            constant = self.request_distribution is Distribution.CONSTANT
            return arrivals.constant(rate) if constant else arrivals.poisson(rate)
        return arrivals.uniform(parse_duration(self.within, "--within"))


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """What the tasks are."""

    models: Annotated[
        str,
        typer.Option(
            help="Models of the tasks: lenet, or lenet=3,alexnet=1, or paper (the paper's four models and parameters).",
            autocompletion=completion.models,
        ),
    ] = "lenet"
    samples: Annotated[str | None, typer.Option(help="Samples per task: 10, or a random number in 1..1000.")] = None
    max_link1: Annotated[
        str | None, typer.Option(help="Maximum rate of a task on link 1: 100Mbps, or random in 20Mbps..300Mbps.")
    ] = None
    max_link2: Annotated[str | None, typer.Option(help="Maximum rate of a task on link 2, like --max-link1.")] = None
    input_size: Annotated[str | None, typer.Option(help="Size of one input: 600KB, or random in 10KB..1MB.")] = None
    deadline: Annotated[str | None, typer.Option(help="Time after which an unfinished task ends as EXPIRED: 30s.")] = (
        None
    )
    min_agreement: MinAgreement = None

    def mix(self, scenario: arrivals.LoadgenScenario | None) -> Mix:
        """The mix that tasks are drawn from. Raises `ConfigError`."""
        paper = self.models.strip() == "paper"
        samples = PAPER_MIX.samples if paper else (scenario.samples,) * 2 if scenario else (10.0, 10.0)
        link1_bps = _range(self.max_link1, parse_rate, "--max-link1")
        link2_bps = _range(self.max_link2, parse_rate, "--max-link2")
        input_bytes = _range(self.input_size, parse_size, "--input-size")
        return Mix(
            models=parse_models(self.models),
            samples=_range(self.samples, _number, "--samples") or samples,
            max_link1_bps=link1_bps or (PAPER_MIX.max_link1_bps if paper else None),
            max_link2_bps=link2_bps or (PAPER_MIX.max_link2_bps if paper else None),
            input_bytes=input_bytes or (PAPER_MIX.input_bytes if paper else None),
            deadline_s=None if self.deadline is None else parse_duration(self.deadline, "--deadline"),
            min_agreement=self.min_agreement,
            datasets={"lenet": "digits"},
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """For which devices tasks are drawn, and how the schedule is seeded and scaled."""

    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices to submit tasks for, a,b,c; default: all of the region.",
            autocompletion=completion.devices,
        ),
    ] = None
    random_seed: Annotated[
        int, typer.Option("--random-seed", "--seed", min=0, help="Random seed for all generated values.")
    ] = 0
    warmup: Annotated[int, typer.Option(min=0, help="Number of first tasks that are excluded from the summary.")] = 0
    time_scale: Annotated[float, typer.Option(help="Factor on all arrival times: 0.1 submits ten times as fast.")] = 1.0

    def named_devices(self) -> list[str] | None:
        """The devices of --devices; None: all devices of the region. Raises `ConfigError`."""
        if self.devices is None:
            return None
        return [node_name(name.strip(), "--devices") for name in self.devices.split(",")]


@dataclass(frozen=True, kw_only=True)
class SubmissionOptions:
    """Where tasks are submitted, how long the replay waits, and where its files go."""

    region: Annotated[
        int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Region to submit to: a partition of the control topics.")
    ] = 0
    bootstrap_servers: BootstrapFromEnv = None
    drain_timeout: Annotated[
        str, typer.Option(help="Maximum time without a task end after the last arrival; then the replay stops.")
    ] = "120s"
    submit_timeout: Annotated[
        str,
        typer.Option(
            help="Time to retry a submission while the broker is unavailable; then the task is not_acknowledged."
        ),
    ] = "30s"
    out: Annotated[
        Path | None,
        typer.Option(envvar="DEEPAR_REPLAY_OUT", help="Folder for the files; by default runs/replay-SEED-TIME."),
    ] = None
    identity_key: KeyFile = None


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of the delay."""

    max_mean: Annotated[str | None, typer.Option(help="Exit with 99 if the mean delay is greater.")] = None
    max_p50: Annotated[str | None, typer.Option(help="Exit with 99 if the median delay is greater.")] = None
    max_p90: Annotated[str | None, typer.Option(help="Exit with 99 if the 90th percentile is greater.")] = None
    max_p99: Annotated[str | None, typer.Option(help="Exit with 99 if the 99th percentile is greater.")] = None

    def thresholds(self) -> list[Threshold]:
        """The limits that are set. Raises `ConfigError`."""
        given = {"mean": self.max_mean, "p50": self.max_p50, "p90": self.max_p90, "p99": self.max_p99}
        return [
            Threshold(f"max-{name}", name, parse_duration(text, f"--max-{name}"))
            for name, text in given.items()
            if text is not None
        ]


def _range(text: str | None, parse: Callable[[str, str], float], flag: str) -> Range | None:
    """A number, or a range LOW..HIGH to draw from."""
    if text is None:
        return None
    low, dots, high = text.partition("..")
    return (parse(low, flag), parse(high if dots else low, flag))


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: not a number", remedy="write it like 10, or as a range: 1..1000") from None
