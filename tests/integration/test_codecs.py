"""Codecs in a region of processes on Kafka: measured by a command, announced, chosen by the planner, used on the links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from bus import topics
from bus.frames import decode_frame
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.tensors import Array, codec_of
from bus.values import Codec
from stages.zoo.registry import digits, load_model
from tests.integration.serving_system import System, random_inputs, serving_system, uncut

SAMPLES = 40


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("codecs")
    environment = {"DEEPAR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "deploy.cli", "profile", "lenet", "--codecs"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=120)
    with serving_system(folder, ["lenet"], environment) as made:
        yield made


def infer(system: System, inputs: Mapping[str, Array], **terms: Any) -> Array:
    """The logits of a batch that the cloud computes, over links that are slow for it."""
    limits = {"placement": "cloud", "max_link1_bps": 4_000_000, "max_link2_bps": 2_000_000}
    given = [
        {"name": name, "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
        for name, images in inputs.items()
    ]
    body = json.dumps({"inputs": given, "parameters": limits | terms})
    request = urllib.request.Request(f"http://{system.http}/v2/models/lenet/infer", body.encode(), method="POST")
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60.0) as answer:
                (output,) = json.loads(answer.read())["outputs"]
            break
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(0.2)  # until the edge and the cloud have joined
    return np.array(output["data"], np.float32).reshape(output["shape"])


async def codecs_used(system: System, topic: str) -> dict[str, set[Codec]]:
    """The codecs of the pieces of each task on a topic."""
    used: dict[str, set[Codec]] = {}
    async with KafkaBus(KafkaConnection(bootstrap_servers=system.broker.bootstrap)) as bus:
        reader = await bus.reader([(topic, number) for number in range(await bus.partitions(topic))], start="start")
        while await reader.lag():
            for record in await reader.fetch():
                frame = decode_frame(record.value)
                if frame.pieces:
                    used.setdefault(frame.task_id, set()).update(codec_of(piece.encoded) for piece in frame.pieces)
    return used


async def test_the_digits_of_a_whole_model_come_back_and_the_links_carry_what_the_task_allows(system: System) -> None:
    model = load_model("lenet")
    (name,) = random_inputs(model, 1, seed=0)
    case = uncut(model, {name: digits()[0][:SAMPLES]})
    (right,) = case.outputs.values()
    links = (topics.activations_topic("e1"), topics.ACTIVATIONS_CLOUD)

    exact = infer(system, case.inputs)
    assert exact.tobytes() == right.tobytes()
    before = [await codecs_used(system, link) for link in links]
    assert [list(used.values()) for used in before] == [[{Codec.ZSTD}], [{Codec.ZSTD}]]

    lossy = infer(system, case.inputs, min_agreement=0.995)
    assert (lossy.argmax(axis=1) == right.argmax(axis=1)).mean() >= 0.95
    for link, earlier in zip(links, before, strict=True):
        (used,) = [used for task, used in (await codecs_used(system, link)).items() if task not in earlier]
        assert used in ({Codec.Q8}, {Codec.Q4})
