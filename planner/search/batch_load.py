"""The time that a sample takes on a platform that computes the samples of several tasks in batches.

Of k pipelined tasks with the same model, each has a window of samples under way, at least eight (`bus.routes.windows`). About
half of them wait at the slowest station, and a stage puts at most eight of one task into a batch. A platform with E executors
computes E batches at the same time. So:

* m = min(8, half the window, half the samples of the task), at least 1: the samples of one task in a batch
* n = min(32, m k / E), at least 1: the samples in a batch
* T(n) / n: a sample's share of the time of its batch, which the profile gives
* c T(n) / n, with c = max(k / E, 1 / m): the time between the ends of two samples of one task

If another station is the slowest one, batches are smaller and samples are further apart, but then this platform does not
determine the delay. A sequential task has one sample under way, which rarely meets another one: no batch is predicted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bus.routes.windows import window_samples
from bus.values import MAX_BATCH, BatchLoad, Execution, ModelProfile

MOST_OF_A_TASK: Final = 8
"""Most samples of one task in a batch (`stages.runner`)."""


def samples_each(samples: int, cut_bytes: Sequence[int]) -> int:
    """m, for a task with this number of samples and a model with these sizes at its cuts."""
    window = window_samples(Execution.STREAMING, cut_bytes)
    return max(1, min(MOST_OF_A_TASK, window // 2, samples // 2))


def batch_load(profile: ModelProfile, tasks: int, each: int) -> BatchLoad:
    """The load of a platform that computes in batches by `tasks` tasks with `each` samples in a batch."""
    tasks_each = tasks / (profile.executors or 1)
    batch = min(float(MAX_BATCH), max(1.0, each * tasks_each))
    return BatchLoad(tasks=tasks, batch=batch, apart=max(tasks_each, 1.0 / each))


def share_of_batch(profile: ModelProfile, batch: float) -> ModelProfile:
    """The profile of a sample's share of a batch."""
    return _times(profile, [time / batch for time in profile.together(batch)])


def under_load(profile: ModelProfile, load: BatchLoad) -> ModelProfile:
    """The profile as one of the tasks experiences it: the times between two of its samples."""
    return _times(profile, [load.apart * time / load.batch for time in profile.together(load.batch)])


def _times(profile: ModelProfile, factors: list[float]) -> ModelProfile:
    return profile.model_copy(
        update={"layer_s": tuple(factor * s for factor, s in zip(factors, profile.layer_s, strict=True))}
    )
