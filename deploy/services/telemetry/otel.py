"""Export of traces to OpenTelemetry, if its environment variables enable it; otherwise OpenTelemetry is not imported.

Spans arrive when they have ended, with ids derived from the task (`bus/headers/tracing.py`). The OpenTelemetry SDK batches
and sends them from its own thread, drops them when its queue is full, and reads its remaining variables
(`OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*`, ...) itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

import structlog

from bus.headers.tracing import SUBMIT, TASK, Span, SpanSink, trace_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CLOSING_S = 5.0
"""Maximum time that a stopping service waits until its last spans are sent."""

log = structlog.get_logger("deepar")


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment names an endpoint for traces and does not disable them."""
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    return not off and exporter == "otlp" and any(environment.get(name) for name in ENDPOINTS)


@contextlib.asynccontextmanager
async def tracing(
    service: str, environment: Mapping[str, str] | None = None, *, closing_s: float = CLOSING_S
) -> AsyncIterator[SpanSink | None]:
    """A sink for the spans of this process while the block runs; None if traces are disabled or the SDK is missing.

    `service` is the name of the process unless `OTEL_SERVICE_NAME` is set. The end of the block waits at most `closing_s`
    until the last spans are sent.
    """
    if not wanted(os.environ if environment is None else environment):
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(
            "traces not exported: OpenTelemetry is not installed",
            remedy="pip install --require-hashes -r requirements-otel.lock",
        )
        yield None
        return
    sink = OtelSink(BatchSpanProcessor(OTLPSpanExporter()), service)
    try:
        yield sink
    finally:
        # In a daemon thread, because closing sends the remaining spans and retries for a long time if the endpoint is down.
        closing = threading.Thread(target=sink.close, name="last traces", daemon=True)
        closing.start()
        until_s = time.monotonic() + closing_s
        while closing.is_alive() and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        if closing.is_alive():
            log.warning("last traces not sent in time", waited_s=closing_s)


class OtelSink:
    """Hands spans to OpenTelemetry's SDK."""

    def __init__(self, processor: SpanProcessor, service: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.id_generator import IdGenerator

        class NextIds(IdGenerator):
            """Gives the SDK the ids of the next span, which are derived from the task."""

            trace_id = span_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

            def generate_span_id(self) -> int:
                return self.span_id

        self._trace = trace
        self._ids = NextIds()
        resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("deepar")
        self._ahead_ns: int | None = None  # the wall clock minus the loop's

    def __call__(self, span: Span) -> None:
        """Record an ended span."""
        trace = self._trace
        self._ids.trace_id, self._ids.span_id = int(trace_id(span.task_id), 16), int(span.span_id, 16)
        parent = trace.INVALID_SPAN
        if span.parent_id is not None:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
            parent = trace.NonRecordingSpan(
                trace.SpanContext(self._ids.trace_id, int(span.parent_id, 16), is_remote=True, trace_flags=flags)
            )
        started = self._tracer.start_span(
            span.name,
            context=trace.set_span_in_context(parent),
            kind={SUBMIT: trace.SpanKind.PRODUCER, TASK: trace.SpanKind.SERVER}.get(span.name, trace.SpanKind.INTERNAL),
            attributes={"deepar.task": span.task_id, **span.attributes},
            start_time=self._wall_ns(span.begin_s),
        )
        if span.failed:
            started.set_status(trace.Status(trace.StatusCode.ERROR, span.failed))
        started.end(self._wall_ns(span.end_s))

    def _wall_ns(self, moment_s: float) -> int:
        """Convert event loop time to nanoseconds since 1970; the offset is read once per process."""
        if self._ahead_ns is None:
            self._ahead_ns = time.time_ns() - int(asyncio.get_running_loop().time() * 1e9)
        return self._ahead_ns + int(moment_s * 1e9)

    def close(self) -> None:
        """Send the remaining spans and shut down. Blocks."""
        self._provider.shutdown()
