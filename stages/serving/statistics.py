"""Counts and times of the served requests, per model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.serving.values import ModelInfo


@dataclass(slots=True)
class ModelStatistics:
    """What happened to the requests for one model. Times are in seconds."""

    successes: int = 0
    success_s: float = 0.0  # from the decoded request to its outputs
    failures: int = 0
    failure_s: float = 0.0
    cancelled: int = 0  # the client went away
    samples: int = 0  # of the successful requests
    queue_s: float = 0.0  # of that time: until the computation began
    pending: int = 0  # under way now
    tasks: int = 0  # requests that were tasks of their own
    last_ms: int = 0  # when the last request succeeded, Unix time in milliseconds

    def succeed(self, samples: int, total_s: float, queue_s: float) -> None:
        """Count a request that has its answer."""
        self.successes += 1
        self.samples += samples
        self.success_s += total_s
        self.queue_s += min(queue_s, total_s)
        self.last_ms = time.time_ns() // 1_000_000

    def fail(self, total_s: float) -> None:
        """Count a request that has an error."""
        self.failures += 1
        self.failure_s += total_s

    def report(self, model: ModelInfo) -> Mapping[str, Any]:
        """The statistics in the protocol's form."""

        def duration(count: int, seconds: float) -> dict[str, int]:
            return {"count": count, "ns": int(seconds * 1e9)}

        none = duration(self.successes, 0.0)
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": self.last_ms,
            "inference_count": self.samples,
            "execution_count": self.successes,
            "inference_stats": {
                "success": duration(self.successes, self.success_s),
                "fail": duration(self.failures, self.failure_s),
                "queue": duration(self.successes, self.queue_s),
                "compute_input": none,
                "compute_infer": duration(self.successes, self.success_s - self.queue_s),
                "compute_output": none,
                "cache_hit": duration(0, 0.0),
                "cache_miss": duration(0, 0.0),
            },
            "batch_stats": [],
        }
