"""Codecs from their measurement to an answer: `deepar profile --codecs`, announcements, plans, links, the endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import deepar
from bus.values import Codec
from deploy.kafka_local.ports import free_port
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model
from tests.integration.deepar_processes import Processes
from tests.integration.test_docs_serving import wait_ready

REGION = """
models = ["lenet"]
[bus]
kind = "memory"
[[device]]
name = "d1"
serve = "127.0.0.1:{port}"
link = "20Mbps"
[[edge]]
name = "e1"
[[cloud]]
name = "c1"
"""
CALIBRATED = 40


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[deepar.Client]:
    """A client of a region with a link of 20 Mbit/s, on a machine that has measured the codecs of LeNet."""
    folder = tmp_path_factory.mktemp("codecs")
    port = free_port()
    images, labels = digits()
    np.savez(folder / "few.npz", images=images[:CALIBRATED], labels=labels[:CALIBRATED])
    (folder / "region.toml").write_text(REGION.format(port=port), encoding="utf-8")
    with Processes("127.0.0.1:1", folder) as processes:  # there is no broker
        processes.environment["DEEPAR_CACHE_DIR"] = str(folder / "cache")
        words = ("profile", "lenet", "--num-runs", "2", "--codecs", "--calibration", "few.npz")
        done = processes.run(*words)
        assert done.returncode == 0, done.stderr
        wait_ready(processes.start("up", "up", "region.toml"), f"127.0.0.1:{port}")
        with deepar.Client(f"http://127.0.0.1:{port}") as found:
            yield found


def codecs(answer: deepar.Answer) -> set[Codec]:
    """What was used on the links."""
    named = answer.parameters.get("deepar_codecs", "")
    return {Codec(name) for pair in named.split() for name in pair.split(",")}


@pytest.mark.parametrize("min_agreement", [None, 0.9])
@pytest.mark.parametrize("mode", ["request", "session"])
def test_lossy_codecs_are_used_with_consent_and_keep_the_classes(
    client: deepar.Client, mode: str, min_agreement: float | None
) -> None:
    images, whole = digits()[0][:8], SegmentRunner(load_model("lenet").source)
    exact = np.concatenate([whole.run([image[None]])[0] for image in images])
    terms: dict[str, Any] = {} if min_agreement is None else {"min_agreement": min_agreement}
    answer = client.infer("lenet", images, placement="edge+cloud", deepar_mode=mode, **terms)
    if min_agreement is None:
        assert codecs(answer) in ({Codec.ZSTD}, {Codec.ZSTD, Codec.RAW})  # on both links, or through the edge alone
        assert answer.array.tobytes() == exact.tobytes()
    else:
        assert codecs(answer) & {Codec.Q8, Codec.Q4}
        assert answer.array.argmax(axis=1).tolist() == exact.argmax(axis=1).tolist()
        assert answer.array.tobytes() != exact.tobytes()
