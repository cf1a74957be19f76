"""Generator of `docs/asyncapi.json`, an AsyncAPI 3 document, from the table of topics, message schemas and frame limits."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from pydantic import TypeAdapter

from bus import frames, messages
from bus.frames import AttemptPlan
from bus.headers.tracing import TRACEPARENT
from bus.identity import authorization
from bus.identity.authorization import AuthorizationRule
from bus.identity.keys import IDENTITY_HEADER, PROOF_HEADER
from bus.tensors import DTYPES
from bus.topics import EDGE_PLACEHOLDER, TABLE, Encoding, PartitionBy, Topic
from bus.values import Codec

SCHEMA_REF: Final = "#/components/schemas/{model}"
JSON_TYPE: Final = "application/json"
FRAME_TYPE: Final = "application/msgpack"


CONTROL_HEADERS: Final = {
    "content-type": JSON_TYPE,
    "ce_specversion": "1.0: CloudEvents, binary mode",
    "ce_source": "/deepar/REGION/ROLE/NAME",
    "ce_id": "unique per source; the task's id for a submission",
    "ce_type": "deepar.TYPE: the type of the message",
    TRACEPARENT: "W3C trace context of a message about one task; the trace id is derived from the task's id",
}


def document() -> dict[str, Any]:
    """The whole document."""
    schemas: dict[str, Any] = {}
    message_objects: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for topic in TABLE:
        names = topic.messages or ("DeadLetter",)
        for name in names:
            message_objects[name] = _message(name, topic, schemas)
        channel = channel_name(topic)
        channels[channel] = _channel(topic, names)
        for action, roles in (("send", topic.writers), ("receive", topic.readers)):
            for role in roles:
                operations[f"{role}-{action}s-{channel}"] = {
                    "action": action,
                    "channel": {"$ref": f"#/channels/{channel}"},
                    "summary": f"{role} {'writes' if action == 'send' else 'reads'} {topic.name}",
                }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "DeePar",
            "version": _version(),
            "description": (
                "Every record that DeePar writes. Made by `make docs` from bus/topics.py, bus/messages.py and "
                "bus/frames.py; docs/interface.md says how to use it."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": JSON_TYPE,
        "servers": {"kafka": {"host": "localhost:9092", "protocol": "kafka", "description": "Any Apache Kafka."}},
        "channels": channels,
        "operations": operations,
        "components": {"messages": message_objects, "schemas": dict(sorted(schemas.items()))},
    }


def asyncapi_page() -> str:
    """The document as text."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def channel_name(topic: Topic) -> str:
    """`deepar.activations.<edge>` as an identifier: `activations-edge`."""
    return topic.name.removeprefix("deepar.").replace(".", "-").replace("<", "").replace(">", "")


def _channel(topic: Topic, names: tuple[str, ...]) -> dict[str, Any]:
    where = "the region" if topic.partition_by is PartitionBy.REGION else "murmur2 of the key, as Kafka clients do"
    channel: dict[str, Any] = {
        "address": topic.name.replace(EDGE_PLACEHOLDER, "{edge}"),
        "description": f"{topic.purpose}. Key: {topic.key}. Partition: {where}.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        "bindings": {
            "kafka": {
                "topicConfiguration": {
                    "cleanup.policy": ["compact"] if topic.compacted else ["delete"],
                    **({} if topic.compacted else {"retention.ms": _milliseconds(topic.retention_s)}),
                },
            }
        },
    }
    if EDGE_PLACEHOLDER in topic.name:
        channel["parameters"] = {"edge": {"description": "The edge's name: letters, digits, _ and -."}}
    return channel


def _milliseconds(seconds: int) -> int:
    return seconds * 1000 if seconds >= 0 else -1


def _message(name: str, topic: Topic, schemas: dict[str, Any]) -> dict[str, Any]:
    key = {"type": "string", "description": topic.key}
    common: dict[str, Any] = {"name": name, "bindings": {"kafka": {"key": key}}}
    if topic.encoding is Encoding.ORIGINAL:
        text = "The original bytes of the record. The headers contain its origin and the error."
        return common | {"summary": text, "contentType": "application/octet-stream", "payload": {"type": "string"}}
    if topic.encoding is Encoding.MSGPACK:
        schemas["Frame"] = frame_schema()
        schemas["FrameHeaders"] = _headers({TRACEPARENT: "W3C trace context; in a task's first frame, optional"})
        _collect(AttemptPlan, schemas)
        summary = "One msgpack map with string keys and no extension types; `data` is its last entry."
        return common | {
            "summary": summary,
            "contentType": FRAME_TYPE,
            "headers": _ref("FrameHeaders"),
            "payload": _ref("Frame"),
        }
    model = getattr(messages, name)
    _collect(model, schemas)
    schemas["ControlHeaders"] = _headers(CONTROL_HEADERS)
    summary = (model.__doc__ or name).strip().split("\n")[0]
    headers: dict[str, Any] = _ref("ControlHeaders")
    if (rule := authorization.BY_MESSAGE.get(name)) is not None:
        headers = {"allOf": [headers, _proof_headers(rule)]}
    return common | {"summary": summary, "contentType": JSON_TYPE, "headers": headers, "payload": _ref(name)}


def _headers(described: dict[str, str]) -> dict[str, Any]:
    """A schema of optional string headers; DeePar's own readers do not need them."""
    properties = {name: {"type": "string", "description": text} for name, text in described.items()}
    return {"type": "object", "properties": properties}


def _proof_headers(rule: AuthorizationRule) -> dict[str, Any]:
    """The two headers that prove the sender; optional if the region does not require proofs."""
    itself, others = " or ".join(rule.itself), " or ".join(rule.others)
    who = f"a {itself} for its own {'task' if rule.node is None else rule.node}"
    who += f", a {others} for any" if others else ""
    return {
        "type": "object",
        "description": "Required if the open epoch sets `identity`; docs/interface.md describes how to create them.",
        "properties": {
            IDENTITY_HEADER: {"type": "string", "description": f"the sender as ROLE:NAME: {who}"},
            PROOF_HEADER: {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "its HMAC-SHA-256"},
        },
    }


def _collect(model: type, schemas: dict[str, Any]) -> None:
    """Collect the schema of a model in its wire format, and the schemas that it refers to."""
    schema = TypeAdapter(model).json_schema(ref_template=SCHEMA_REF, mode="validation")
    for name, found in {**schema.pop("$defs", {}), model.__name__: schema}.items():
        schemas[name] = _plain_discriminators(found)


def _plain_discriminators(schema: Any) -> Any:
    """Replace discriminator objects by the name of the property: pydantic writes OpenAPI's form, AsyncAPI needs the name."""
    if isinstance(schema, list):
        return [_plain_discriminators(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.get("discriminator")
    if isinstance(named, dict) and "propertyName" in named:
        schema = {**schema, "discriminator": named["propertyName"]}
    return {key: _plain_discriminators(value) for key, value in schema.items()}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def frame_schema() -> dict[str, Any]:
    """The layout of a frame, with the limits that its decoder enforces."""

    def count(description: str, most: int | None = None) -> dict[str, Any]:
        return {"type": "integer", "minimum": 0, "description": description} | ({"maximum": most} if most else {})

    tensor = {
        "type": "object",
        "required": ["dtype", "shape"],
        "properties": {
            "dtype": {"enum": sorted(DTYPES)},
            "shape": {"type": "array", "maxItems": frames.MAX_RANK, "items": {"type": "integer", "minimum": 0}},
        },
    }
    size = count("size of the whole payload of a sample in bytes", frames.MAX_SAMPLE_BYTES)
    tensors = {
        "type": "array",
        "maxItems": frames.MAX_TENSORS,
        "items": tensor,
        "description": "tensors of the payload if `at` is 0: little-endian, C order, one after the other",
    }
    encoding = {
        "codec": {
            "enum": [codec.value for codec in Codec if codec is not Codec.RAW],
            "description": "what the payload is encoded with; absent where it is the tensors' bytes",
        },
        "raw": count("size of the tensors' bytes, with `codec`", frames.MAX_SAMPLE_BYTES),
    }
    piece = {
        "type": "object",
        "required": ["sample", "at", "size", "bytes"],
        "properties": {
            "sample": count("index of the sample in the task"),
            "at": count("offset of this piece in the payload of the sample"),
            "size": size,
            "bytes": count("length of this piece; `data` contains the pieces one after the other"),
            "tensors": tensors,
            **encoding,
        },
    }
    samples = {
        "type": "array",
        "maxItems": frames.MAX_PIECES,
        "items": count("index of the sample in the task"),
    }
    alike = {
        "type": "object",
        "description": "whole samples with the same tensors, each of `size` bytes in `data`",
        "required": ["samples", "size", "tensors"],
        "properties": {"samples": samples, "size": size, "tensors": tensors},
    }
    alike_encoded = {
        "type": "object",
        "description": "encoded whole samples with the same tensors, each of its own size",
        "required": ["samples", "sizes", "tensors", "codec", "raw"],
        "properties": {
            "samples": samples,
            "sizes": {"type": "array", "maxItems": frames.MAX_PIECES, "items": size},
            "tensors": tensors,
            **encoding,
        },
    }
    return {
        "type": "object",
        "description": f"A msgpack map of at most {frames.MAX_FRAME_BYTES} bytes, the part before `data` at most "
        f"{frames.MAX_HEAD_BYTES}.",
        "required": ["v", "kind", "task", "attempt", "from", "pieces", "data"],
        "properties": {
            "v": {"const": frames.FRAME_VERSION},
            "kind": {
                "enum": list(frames.KINDS),
                "description": "a `probe` is sent back as an `echo`; both carry no data",
            },
            "task": {"type": "string", "minLength": 1, "maxLength": 200},
            "attempt": count("attempt of the task; stages drop frames of superseded attempts"),
            "from": {"type": "string", "description": "name of the sending node"},
            "plan": _ref("AttemptPlan") | {"description": "present in the first frame of a task to a stage"},
            "report": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "description": "busy seconds by part, kind `report` only",
            },
            "pieces": {
                "type": "array",
                "maxItems": frames.MAX_PIECES,
                "items": {"oneOf": [piece, alike, alike_encoded]},
            },
            "data": {"type": "string", "contentEncoding": "binary", "description": "msgpack bin; the last entry"},
        },
    }


def _version() -> str:
    try:
        return version("deepar")
    except PackageNotFoundError:
        return "0"
