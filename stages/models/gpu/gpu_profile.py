"""The profile of a model that a GPU computes."""

from __future__ import annotations

from collections.abc import Mapping

from bus.values import BatchSpeed, ModelProfile


def on_gpu(profile: ModelProfile, times_s: Mapping[int, float]) -> ModelProfile:
    """The profile of this machine with its GPU; `times_s`: what the GPU takes for the whole model, by the size of the batch.

    The layers share the time of the whole as they do on the CPU, since a GPU's layers cannot be timed one by one: the copies
    to the device and back would take longer than most layers.
    """
    alone_s, on_cpu_s = times_s[1], sum(profile.layer_s)
    factor = alone_s / on_cpu_s if on_cpu_s > 0 else 1.0
    speeds = tuple(
        BatchSpeed(batch=batch, factors=(took_s / batch / alone_s,) * profile.layers)
        for batch, took_s in sorted(times_s.items())
        if batch > 1 and alone_s > 0
    )
    return profile.model_copy(
        update={
            "layer_s": tuple(factor * layer_s for layer_s in profile.layer_s),
            "whole_s": alone_s,
            "sum_of_slices_s": None,
            "accelerator": "gpu",
            "batch": speeds or None,
            "executors": 1 if speeds else None,
            "not_on_gpu": None,
        }
    )


def on_cpu(profile: ModelProfile, reason: str) -> ModelProfile:
    """The profile of this machine whose GPU does not compute the whole model, for a reason."""
    return profile.model_copy(update={"accelerator": "cpu", "not_on_gpu": reason[:300]})
