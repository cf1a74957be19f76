"""Metrics of the endpoint, under the names of Triton, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from stages.serving.statistics import ModelStatistics

COUNTERS: Final[Mapping[str, tuple[str, Callable[[ModelStatistics], float]]]] = {
    "nv_inference_request_success": ("Requests with an answer.", lambda one: one.successes),
    "nv_inference_request_failure": ("Requests with an error.", lambda one: one.failures),
    "nv_inference_count": ("Samples with an answer.", lambda one: one.samples),
    "nv_inference_exec_count": ("Requests that were computed.", lambda one: one.successes),
    "nv_inference_request_duration_us": ("Time of the requests with an answer.", lambda one: one.success_s * 1e6),
    "nv_inference_queue_duration_us": ("Of that time: until the computation began.", lambda one: one.queue_s * 1e6),
    "nv_inference_compute_infer_duration_us": (
        "Of that time: from then on.",
        lambda one: (one.success_s - one.queue_s) * 1e6,
    ),
    "deepar_serving_cancelled": ("Requests whose client went away.", lambda one: one.cancelled),
    "deepar_serving_tasks": ("Requests that were planned as tasks of their own.", lambda one: one.tasks),
}
PENDING: Final = "nv_inference_pending_request_count"


def served_metrics(labels: Mapping[str, str], served: Mapping[str, ModelStatistics]) -> Iterable[Metric]:
    """The metrics of every model."""
    names, values = [*labels, "model", "version"], list(labels.values())
    for name, (words, read) in COUNTERS.items():
        counter = Metric(name, words, "unknown")  # a counter's name would get the suffix _total, which Triton's lack
        for model, statistics in sorted(served.items()):
            counter.add_sample(name, dict(zip(names, [*values, model, "1"], strict=True)), read(statistics))
        yield counter
    pending = GaugeMetricFamily(PENDING, "Requests under way.", labels=names)
    for model, statistics in sorted(served.items()):
        pending.add_metric([*values, model, "1"], statistics.pending)
    yield pending
