"""HTTP server of a service for `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from bus.errors import ConfigError
from bus.text.json_text import json_text
from deploy.services.telemetry.event_loop import loop_name
from deploy.services.telemetry.learned_gauges import FACTOR_LABELS, LATENCY_LABELS, LearnedGauges
from deploy.services.telemetry.metric_help import HELP
from deploy.services.telemetry.served_metrics import served_metrics
from planner.service.task_statistics import Histogram, TaskStatistics
from stages.serving.statistics import ModelStatistics

LAG_PROBE_S = 0.25
"""Interval at which the event loop's lag is measured."""


@dataclass(frozen=True, slots=True)
class Health:
    """The state that a service reports to its probes."""

    ready: bool
    detail: dict[str, Any]
    gauges: dict[str, float]
    counters: dict[str, float]
    leading: dict[str, bool] = field(default_factory=dict)  # planners only: region -> whether it leads there
    statistics: dict[str, TaskStatistics] = field(default_factory=dict)  # planners only: region -> ended tasks
    learned: dict[str, LearnedGauges] = field(default_factory=dict)  # planners only: region -> what was learned
    served: Mapping[str, ModelStatistics] = field(default_factory=dict)  # endpoints only: model -> its requests

    def without(self, missing: Mapping[str, str]) -> Health:
        """A copy that is not ready if topics are missing, with the missing topics in `detail`."""
        gauges = self.gauges | {"missing_topics": float(len(missing))}
        if not missing:
            return replace(self, gauges=gauges)
        return replace(self, ready=False, detail=self.detail | {"missing_topics": dict(missing)}, gauges=gauges)


class _Collector:
    """A Prometheus collector that reads the service's health at each scrape."""

    def __init__(self, look: Callable[[], Health], labels: dict[str, str], lag: Callable[[], float]) -> None:
        self._look = look
        self._labels = labels
        self._lag = lag

    def collect(self) -> Iterable[Metric]:
        """One metric per number, labelled with role, node and region (never with a task)."""
        health = self._look()
        names, values = list(self._labels), list(self._labels.values())
        gauges = {"ready": float(health.ready), "loop_lag_seconds": self._lag(), **health.gauges}
        for name, value in sorted(gauges.items()):
            gauge = GaugeMetricFamily(f"deepar_{name}", HELP[name], labels=names)
            gauge.add_metric(values, value)
            yield gauge
        if health.leading:
            gauge = GaugeMetricFamily("deepar_leading", HELP["leading"], labels=names)
            for region, leads in sorted(health.leading.items()):
                gauge.add_metric(self._values_in(region), float(leads))
            yield gauge
        for name, value in sorted(health.counters.items()):
            counter = CounterMetricFamily(f"deepar_{name}", HELP[name], labels=names)
            counter.add_metric(values, value)
            yield counter
        if health.statistics:
            yield from self._histograms(health.statistics)
            yield self._errors(health.statistics)
        if health.learned:
            yield from self._learned(health.learned)
        if health.served:
            yield from served_metrics(self._labels, health.served)

    def _values_in(self, region: str) -> list[str]:
        """The labels with `region` replaced, for a process that serves several regions."""
        return [region if name == "region" else value for name, value in self._labels.items()]

    def _histograms(self, statistics: Mapping[str, TaskStatistics]) -> Iterable[Metric]:
        names = list(self._labels)
        delays = HistogramMetricFamily(
            "deepar_task_delay_seconds", HELP["task_delay_seconds"], labels=[*names, "outcome", "kind"]
        )
        ratios = HistogramMetricFamily("deepar_prediction_ratio", HELP["prediction_ratio"], labels=[*names, "kind"])
        for region, found in sorted(statistics.items()):
            for (outcome, kind), histogram in sorted(found.delays.items()):
                delays.add_metric([*self._values_in(region), outcome, kind], _buckets(histogram), histogram.total)
            for kind, histogram in sorted(found.ratios.items()):
                ratios.add_metric([*self._values_in(region), kind], _buckets(histogram), histogram.total)
        yield delays
        yield ratios

    def _errors(self, statistics: Mapping[str, TaskStatistics]) -> Metric:
        name = "prediction_error_median"
        gauge = GaugeMetricFamily(f"deepar_{name}", HELP[name], labels=list(self._labels))
        for region, found in sorted(statistics.items()):
            if (error := found.errors.median) is not None:
                gauge.add_metric(self._values_in(region), error)
        return gauge

    def _learned(self, learned: Mapping[str, LearnedGauges]) -> Iterable[Metric]:
        for name, labels, column in (
            ("learned_speed_factor", FACTOR_LABELS, 0),
            ("learned_latency_seconds", LATENCY_LABELS, 1),
        ):
            gauge = GaugeMetricFamily(f"deepar_{name}", HELP[name], labels=[*self._labels, *labels])
            for region, found in sorted(learned.items()):
                for series in found[column]:
                    gauge.add_metric([*self._values_in(region), *series.labels], series.value)
            yield gauge


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound."""
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


@contextlib.asynccontextmanager
async def serve_probes(
    look: Callable[[], Health], *, port: int | None, labels: dict[str, str], host: str = "127.0.0.1"
) -> AsyncIterator[None]:
    """Answer probes while the block runs; with `port` None, run no server. Raises `ConfigError` if it cannot listen."""
    if port is None:
        yield
        return
    from aiohttp import web  # imported here: it takes half a second, and most commands serve no probes

    lag_s = 0.0

    async def watch_lag() -> None:
        nonlocal lag_s
        clock = asyncio.get_running_loop().time
        while True:
            due_s = clock() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            lag_s = max(0.0, clock() - due_s)

    registry = CollectorRegistry()
    registry.register(_Collector(look, labels, lambda: lag_s))

    async def livez(request: web.Request) -> web.Response:
        return web.json_response({"live": True, "loop": loop_name()}, dumps=json_text)

    async def readyz(request: web.Request) -> web.Response:
        health = look()
        body = {"ready": health.ready, "loop": loop_name(), **labels, **health.detail}
        return web.json_response(body, status=200 if health.ready else 503, dumps=json_text)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain")

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    watching = asyncio.create_task(watch_lag())
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"--http-port {port}: cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}",
                remedy="choose another --http-port, or another --http-host",
            ) from None
        yield
    finally:
        watching.cancel()
        await runner.cleanup()
