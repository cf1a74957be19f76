"""The endpoint that a device's options describe, and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from bus.errors import ConfigError
from bus.values import ModelProfile, Role
from deploy.services.serving import Endpoint, endpoint_of
from deploy.services.settings import DeviceOptions
from deploy.services.telemetry.served_metrics import served_metrics
from stages.runner import ModelledRunner
from stages.serving.security import Listening
from stages.serving.statistics import ModelStatistics

PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a",), layer_s=(0.01,), cut_bytes=(100, 8)
)


def test_a_device_serves_nobody_by_default() -> None:
    assert endpoint_of(DeviceOptions(name="d")) is None


def test_options_say_where_and_how_a_device_serves(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("0123456789abcdef\n", encoding="utf-8")
    options = DeviceOptions(
        name="d",
        serve="127.0.0.1:8600",
        serve_grpc="[::1]:8601",
        serve_token_file=str(tokens),
        sessions=False,
        gateway=True,
    )
    endpoint = endpoint_of(options)
    assert endpoint is not None
    assert endpoint.http == Listening(host="127.0.0.1", port=8600, tokens=("0123456789abcdef",))
    assert endpoint.grpc is not None
    assert (endpoint.grpc.host, endpoint.grpc.port, endpoint.grpc.flag) == ("::1", 8601, "--serve-grpc")
    assert not endpoint.inference.sessions
    assert endpoint.inference.allowed == (Role.EDGE, Role.CLOUD)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"serve": "8600"}, "--serve 8600: must be HOST:PORT"),
        ({"serve_grpc": "localhost:many"}, "--serve-grpc"),
        ({"serve": "0.0.0.0:8600"}, "other machines can connect"),
        ({"serve": "127.0.0.1:8600", "serve_token_file": "/none"}, "--serve-token-file /none"),
        ({"serve": "127.0.0.1:8600", "serve_certificate": "/none"}, "together"),
        ({"serve": "127.0.0.1:8600", "serve_certificate": "/none", "serve_key": "/none"}, "/none"),
        ({"gateway": True}, "serves nowhere"),
    ],
)
def test_what_cannot_be_served_is_reported_before_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        endpoint_of(DeviceOptions(name="d", **options))


async def test_a_runner_that_computes_nothing_cannot_serve() -> None:
    def no_device() -> Any:
        raise AssertionError("no request came")

    serving = Endpoint().serving("d", no_device, lambda: True, ModelledRunner([PROFILE]))
    with pytest.raises(ConfigError, match="--runner litert"):
        async with serving:
            pass


def test_metrics_have_the_names_that_users_of_triton_know() -> None:
    statistics = ModelStatistics(pending=3)
    statistics.succeed(samples=5, total_s=0.5, queue_s=0.125)
    statistics.fail(0.25)

    class Collector:
        def collect(self) -> list[Metric]:
            return list(served_metrics({"node": "d"}, {"toy": statistics}))

    registry = CollectorRegistry()
    registry.register(Collector())
    found = dict(
        line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    )
    labels = '{model="toy",node="d",version="1"}'
    assert {name.removesuffix(labels): float(value) for name, value in found.items()} == {
        "nv_inference_request_success": 1.0,
        "nv_inference_request_failure": 1.0,
        "nv_inference_count": 5.0,
        "nv_inference_exec_count": 1.0,
        "nv_inference_request_duration_us": 500_000.0,
        "nv_inference_queue_duration_us": 125_000.0,
        "nv_inference_compute_infer_duration_us": 375_000.0,
        "nv_inference_pending_request_count": 3.0,
        "deepar_serving_cancelled": 0.0,
        "deepar_serving_tasks": 0.0,
    }
