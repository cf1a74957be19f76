"""Codecs from their measurement to an answer: `deepar profile --codecs`, announcements, plans, links, the endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deepar
from bus.values import Codec
from deploy.kafka_local.ports import free_port
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.registry import digits, load_model
from tests.integration.deepar_processes import Processes

SLOW = """
models = ["lenet"]
[bus]
kind = "memory"
[[device]]
name = "d1"
serve = "127.0.0.1:{port}"
link = "200kbps"
[[edge]]
name = "e1"
[[cloud]]
name = "c1"
"""
CALIBRATED = 40


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[deepar.Client]:
    """A client of a region whose first link is slow, on a machine that has measured the codecs of LeNet."""
    folder = tmp_path_factory.mktemp("codecs")
    port = free_port()
    images, labels = digits()
    np.savez(folder / "few.npz", images=images[:CALIBRATED], labels=labels[:CALIBRATED])
    (folder / "slow.toml").write_text(SLOW.format(port=port), encoding="utf-8")
    with Processes("127.0.0.1:1", folder) as processes:  # there is no broker
        processes.environment["DEEPAR_CACHE_DIR"] = str(folder / "cache")
        words = ("profile", "lenet", "--num-runs", "2", "--codecs", "--calibration", "few.npz")
        done = processes.run(*words)
        assert done.returncode == 0, done.stderr
        processes.start("up", "slow.toml").wait_ready()
        with deepar.Client(f"http://127.0.0.1:{port}") as found:
            yield found


def codecs(answer: deepar.Answer) -> set[Codec]:
    """What was used on the links."""
    named = answer.parameters.get("deepar_codecs", "")
    return {Codec(name) for pair in named.split() for name in pair.split(",")}


@pytest.mark.parametrize("mode", ["request", "session"])
def test_consent_to_lossy_codecs_uses_them_and_keeps_the_classes(client: deepar.Client, mode: str) -> None:
    images, whole = digits()[0][:8], SegmentRunner(load_model("lenet").source)
    best = [int(whole.run([image[None]])[0].argmax()) for image in images]
    answer = client.infer("lenet", images, placement="edge+cloud", deepar_mode=mode, min_agreement=0.9)
    assert codecs(answer) & {Codec.Q8, Codec.Q4}
    assert answer.array.argmax(axis=1).tolist() == best


@pytest.mark.parametrize("mode", ["request", "session"])
def test_without_consent_links_carry_exact_bits(client: deepar.Client, mode: str) -> None:
    images, whole = digits()[0][:8], SegmentRunner(load_model("lenet").source)
    answer = client.infer("lenet", images, placement="edge+cloud", deepar_mode=mode)
    assert not codecs(answer) & {Codec.Q8, Codec.Q4}
    for row, image in zip(answer.array, images, strict=True):
        assert row.tobytes() == whole.run([image[None]])[0].tobytes()
