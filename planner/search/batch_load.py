"""What a platform that computes samples of several tasks in batches needs for a sample of one of them.

Of k pipelined tasks with the same model, each has at least eight samples under way, about half of them where they wait: at
the slowest station. So a batch there has four samples of each task, spread over the platform's E executors:

* n = min(32, m k / E) samples in a batch, at least 1; m is 4, or 1 for a task of fewer than eight samples
* a sample's share of its batch takes T(n) / n, with T as the profile says; between two samples of one task the platform
  computes one of each other task as well, E batches at a time, so they are c T(n) / n apart, with c = max(k / E, 1 / m)

Where another station is the slowest one, batches are smaller and samples are further apart than that, but then it does not
matter. A sequential task has one sample under way, which rarely meets another one: no batch is predicted for it.
"""

from __future__ import annotations

from typing import Final

from bus.values import MAX_BATCH, BatchLoad, ModelProfile

LONG_TASK: Final = 8
"""A task of so many samples may have several in a batch."""
SAMPLES_EACH: Final = 4
"""Samples of a long task in a batch: half of the least window (`stages.window`)."""


def samples_each(samples: int) -> int:
    """m, the samples in a batch of a task of so many samples."""
    return SAMPLES_EACH if samples >= LONG_TASK else 1


def batch_load(profile: ModelProfile, tasks: int, each: int) -> BatchLoad:
    """What `tasks` tasks with `each` samples in a batch do to a platform that computes in batches."""
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
