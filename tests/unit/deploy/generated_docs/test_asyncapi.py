"""The AsyncAPI document says what is on the wire, and is the one in docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from bus import messages
from bus.frames import Frame, encode_frame
from bus.messages import NodeHeartbeat, SeedInput, TaskSubmitted
from bus.tensors import Encoded, to_pieces
from bus.topics import TABLE
from bus.values import Codec
from deploy.generated_docs.asyncapi import asyncapi_page, channel_name, document
from deploy.generated_docs.flow import main

DOCS = Path(__file__).parents[4] / "docs"


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for entry in node for found in references(entry)] if isinstance(node, list) else []


def test_every_topic_is_a_channel_and_every_reference_leads_somewhere() -> None:
    made = document()
    assert made["asyncapi"] == "3.0.0"
    assert set(made["channels"]) == {channel_name(topic) for topic in TABLE}
    assert len(references(made)) > 100
    for reference in references(made):
        found = made
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    for topic in TABLE:
        writers = {
            name.split("-sends-")[0] for name in made["operations"] if name.endswith(f"-sends-{channel_name(topic)}")
        }
        assert writers == set(topic.writers)


def test_messages_have_the_fields_and_requirements_of_their_schema() -> None:
    schemas = document()["components"]["schemas"]
    for message in (
        TaskSubmitted(task_id="t", device="d", model="m", samples=1, input=SeedInput(seed=1)),
        NodeHeartbeat(node="d", incarnation="i"),
    ):
        schema = schemas[type(message).__name__]
        sent = json.loads(messages.encode(message))
        assert set(sent) <= set(schema["properties"])
        assert set(schema.get("required", ())) <= set(sent)


def test_a_frame_has_the_fields_of_its_schema() -> None:
    schema = document()["components"]["schemas"]["Frame"]
    alike = [to_pieces(sample, [np.zeros((2, 3), np.float32)], 100)[0] for sample in (1, 2)]
    encoded = [
        to_pieces(sample, Encoded(Codec.Q8, alike[0].tensors, memoryview(bytes(sample))), 100)[0] for sample in (3, 4)
    ]
    cut = to_pieces(5, Encoded(Codec.Q8, alike[0].tensors, memoryview(bytes(9))), 8)
    pieces = (*to_pieces(0, [np.zeros((2, 3), np.float32)], 16), *alike, *encoded, *cut)
    frame = msgpack.unpackb(encode_frame(Frame("activations", "t", 1, "d", pieces)))
    assert set(frame) <= set(schema["properties"])
    assert set(schema["required"]) <= set(frame)
    one, many, many_encoded = schema["properties"]["pieces"]["items"]["oneOf"]
    kinds = [one, one, many, many_encoded, one, one]
    for sent, piece in zip(frame["pieces"], kinds, strict=True):
        assert set(sent) <= set(piece["properties"])
        assert set(piece["required"]) <= set(sent)


def test_the_document_in_docs_is_current_and_a_stale_one_is_noticed(tmp_path: Path) -> None:
    assert (DOCS / "asyncapi.json").read_text(encoding="utf-8") == asyncapi_page()
    assert main(["--check", str(DOCS)]) == 0
    assert main([str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    (tmp_path / "asyncapi.json").write_text("{}")
    assert main(["--check", str(tmp_path)]) == 1
