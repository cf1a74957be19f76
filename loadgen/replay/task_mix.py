"""Task mix: the models and the random parameters of generated tasks; the defaults are the paper's.

Each quantity is drawn uniformly from a closed range, from its own random stream (`loadgen.random_streams`), so
drawing bandwidth caps does not change, for example, the fifth task's number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import ValidationError

from bus.errors import ConfigError, unknown_name
from bus.messages import DatasetInput, SeedInput, TaskSubmitted
from bus.validation import first_fault
from loadgen.random_streams import Streams

Range = tuple[float, float]
"""(minimum, maximum), both inclusive."""

PAPER_MODELS = ("alexnet", "vgg16", "deepface", "lenet")
"""The four networks of the paper's Section V, named as in the model zoo and the `paper` profile."""


MOST = 1e15
"""Upper limit of every drawn quantity; all integers up to it are exact as floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Distributions of a task's fields. A range of None leaves the field unset. Validated when built."""

    models: Mapping[str, float]  # name -> weight, greater than 0
    samples: Range = (1, 1)  # N
    max_link1_bps: Range | None = None  # B_i^1
    max_link2_bps: Range | None = None  # B_i^2
    input_bytes: Range | None = None  # G_i(0)
    deadline_s: float | None = None  # deadline of every task
    min_agreement: float | None = None  # of lossy codecs that every task allows; None: lossless ones only
    datasets: Mapping[str, str] = field(
        default_factory=dict
    )  # model -> data set that its tasks read; others use a seed

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("a mix needs at least one model")
        for model, weight in self.models.items():
            if not weight > 0:
                raise ConfigError(f"the weight of {model} in the mix must be greater than 0, not {weight}")
        for name in ("samples", "max_link1_bps", "max_link2_bps", "input_bytes"):
            limits = getattr(self, name)
            if limits is not None and not 0 < limits[0] <= limits[1] <= MOST:
                raise ConfigError(
                    f"{name}: {limits[0]:g}..{limits[1]:g} must be an ascending range within 0 (exclusive) to {MOST:g}"
                )
        if self.samples[0] < 1:
            raise ConfigError(f"samples: {self.samples[0]:g}..{self.samples[1]:g} must start at 1 or more")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"deadline_s must be greater than 0, not {self.deadline_s:g}")
        if self.min_agreement is not None and not 0 < self.min_agreement <= 1:
            raise ConfigError(f"min_agreement must be above 0 and at most 1, not {self.min_agreement:g}")


PAPER_MIX = Mix(
    models=dict.fromkeys(PAPER_MODELS, 1.0),
    samples=(1, 1000),
    max_link1_bps=(20e6, 300e6),
    max_link2_bps=(10e6, 50e6),
    input_bytes=(10_000, 1_000_000),
)
"""Section V-B: N 1..1000, B^1 20..300 Mbps, B^2 10..50 Mbps, G(0) 10..1000 KB, the four networks equally often."""


def draw(
    mix: Mix, tasks: int, devices: Sequence[str], streams: Streams, *, prefix: str = "task"
) -> list[TaskSubmitted]:
    """Draw `tasks` tasks named `PREFIX-0`, `PREFIX-1`, ..., assigned to the devices round-robin.

    Raises `ConfigError` if `devices` is empty.
    """
    if not devices:
        raise ConfigError("no device to submit tasks for")
    names = list(mix.models)
    weights = np.array([mix.models[name] for name in names])
    picks = streams.stream("model").choice(len(names), size=tasks, p=weights / weights.sum())
    samples = _whole(mix.samples, tasks, streams, "samples")
    link1 = _whole(mix.max_link1_bps, tasks, streams, "max_link1")
    link2 = _whole(mix.max_link2_bps, tasks, streams, "max_link2")
    sizes = _whole(mix.input_bytes, tasks, streams, "input_bytes")
    seeds = streams.stream("input").integers(0, 1 << 62, size=tasks)
    drawn = []
    for index in range(tasks):
        model = names[int(picks[index])]
        dataset = mix.datasets.get(model)
        try:
            task = TaskSubmitted(
                task_id=f"{prefix}-{index}",
                device=devices[index % len(devices)],
                model=model,
                samples=samples[index] or 1,
                input=DatasetInput(name=dataset, start=int(seeds[index]) % 1_000_000)
                if dataset
                else SeedInput(seed=int(seeds[index])),
                max_link1_bps=link1[index],
                max_link2_bps=link2[index],
                input_bytes=sizes[index],
                deadline_s=mix.deadline_s,
                min_agreement=mix.min_agreement,
            )
        except ValidationError as error:
            raise ConfigError(f"a task for device {devices[index % len(devices)]!r}: {first_fault(error)}") from None
        drawn.append(task)
    return drawn


def parse_models(text: str, *, known: Sequence[str] | None = None) -> dict[str, float]:
    """A mix from `lenet`, `lenet,alexnet` or `lenet=3,alexnet=1`; `paper` means the paper's four.

    Raises `ConfigError` for a bad weight, `UnknownNameError` for a model that is not in `known`.
    """
    if text.strip() == "paper":
        return dict.fromkeys(PAPER_MODELS, 1.0)
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if known is not None and name not in known:
            raise unknown_name("model", name, known)
        try:
            mix[name] = float(weight) if weight else 1.0
        except ValueError:
            raise ConfigError(f"the weight of {name} in the mix is {weight!r}, not a number") from None
    return Mix(models=mix).models  # type: ignore[return-value]  # `Mix` has validated it, and it is the dict built above


def _whole(limits: Range | None, tasks: int, streams: Streams, name: str) -> list[int] | list[None]:
    """One integer per task drawn uniformly from the closed range; a list of None if there is no range."""
    if limits is None:
        return [None] * tasks
    least, largest = round(limits[0]), round(limits[1])
    values: list[int] = streams.stream(name).integers(least, largest, size=tasks, endpoint=True).tolist()
    return values
