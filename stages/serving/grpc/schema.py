"""The messages of `inference.GRPCInferenceService` that DeePar reads and writes, as protobuf classes.

They live in a descriptor pool of their own: a process that also imports another package's copy of these messages would
otherwise fail with a duplicate symbol. Only the fields in use are listed; protobuf skips the others.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE: Final = "inference"
SCALARS: Final = {
    name: getattr(FieldDescriptorProto, f"TYPE_{name.upper()}")
    for name in ("bool", "bytes", "double", "float", "int32", "int64", "string", "uint32", "uint64")
}
NAME_AND_VERSION: Final = "1 string name, 2 string version"
TENSORS: Final = "1 string name, 2 string datatype, 3 int64* shape"
DURATION: Final = "StatisticDuration"

MESSAGES: Final = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1 bool live",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1 bool ready",
    "ModelReadyRequest": NAME_AND_VERSION,
    "ModelReadyResponse": "1 bool ready",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1 string name, 2 string version, 3 string* extensions",
    "ModelMetadataRequest": NAME_AND_VERSION,
    "TensorMetadata": TENSORS,
    "ModelMetadataResponse": (
        "1 string name, 2 string* versions, 3 string platform, 4 TensorMetadata* inputs, 5 TensorMetadata* outputs"
    ),
    "InferParameter": (
        "1 bool bool_param | value, 2 int64 int64_param | value, 3 string string_param | value, "
        "4 double double_param | value, 5 uint64 uint64_param | value"
    ),
    "InferTensorContents": (
        "1 bool* bool_contents, 2 int32* int_contents, 3 int64* int64_contents, 4 uint32* uint_contents, "
        "5 uint64* uint64_contents, 6 float* fp32_contents, 7 double* fp64_contents, 8 bytes* bytes_contents"
    ),
    "InferInputTensor": f"{TENSORS}, 4 InferParameter% parameters, 5 InferTensorContents contents",
    "InferRequestedOutputTensor": "1 string name, 2 InferParameter% parameters",
    "ModelInferRequest": (
        "1 string model_name, 2 string model_version, 3 string id, 4 InferParameter% parameters, 5 InferInputTensor* inputs, "
        "6 InferRequestedOutputTensor* outputs, 7 bytes* raw_input_contents"
    ),
    "InferOutputTensor": TENSORS,
    "ModelInferResponse": (
        "1 string model_name, 2 string model_version, 3 string id, 4 InferParameter% parameters, "
        "5 InferOutputTensor* outputs, 6 bytes* raw_output_contents"
    ),
    "ModelStreamInferResponse": "1 string error_message, 2 ModelInferResponse infer_response",
    "ModelConfigRequest": NAME_AND_VERSION,
    "ModelTensorReshape": "1 int64* shape",
    "ModelInput": "1 string name, 2 int32 data_type, 4 int64* dims, 5 ModelTensorReshape reshape",
    "ModelOutput": "1 string name, 2 int32 data_type, 3 int64* dims, 5 ModelTensorReshape reshape",
    "Latest": "1 uint32 num_versions",
    "ModelVersionPolicy": "1 Latest latest",
    "ModelParameter": "1 string string_value",
    "ModelConfig": (
        "1 string name, 2 string platform, 3 ModelVersionPolicy version_policy, 4 int32 max_batch_size, 5 ModelInput* input, "
        "6 ModelOutput* output, 14 ModelParameter% parameters, 17 string backend"
    ),
    "ModelConfigResponse": "1 ModelConfig config",
    "ModelStatisticsRequest": NAME_AND_VERSION,
    "StatisticDuration": "1 uint64 count, 2 uint64 ns",
    "InferStatistics": (
        f"1 {DURATION} success, 2 {DURATION} fail, 3 {DURATION} queue, 4 {DURATION} compute_input, "
        f"5 {DURATION} compute_infer, 6 {DURATION} compute_output"
    ),
    "ModelStatistics": (
        "1 string name, 2 string version, 3 uint64 last_inference, 4 uint64 inference_count, 5 uint64 execution_count, "
        "6 InferStatistics inference_stats"
    ),
    "ModelStatisticsResponse": "1 ModelStatistics* model_stats",
    "RepositoryIndexRequest": "1 string repository_name, 2 bool ready",
    "ModelIndex": "1 string name, 2 string version, 3 string state, 4 string reason",
    "RepositoryIndexResponse": "1 ModelIndex* models",
}
"""Message -> its fields: number, type and name; `*` marks a list, `%` a map from strings, `| NAME` a member of a oneof."""

CONFIG_DATATYPES: Final = {
    f"TYPE_{name}": number
    for number, name in enumerate(
        ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"),
        start=1,
    )
}
"""Name -> number in the enumeration of a model's configuration, which is an int32 on the wire."""


def _message(name: str, fields: str) -> DescriptorProto:
    described = DescriptorProto(name=name)
    oneofs: list[str] = []
    for text in filter(None, fields.split(", ")):
        definition, _, oneof = text.partition(" | ")
        number, kind, field_name = definition.split()
        field = described.field.add(name=field_name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
        if kind[-1] in "*%":
            field.label = FieldDescriptorProto.LABEL_REPEATED
        if kind.endswith("%"):
            entry = _message("".join(word.capitalize() for word in field_name.split("_")) + "Entry", "")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=FieldDescriptorProto.LABEL_OPTIONAL, type=SCALARS["string"])
            _set_type(entry.field.add(name="value", number=2, label=FieldDescriptorProto.LABEL_OPTIONAL), kind[:-1])
            described.nested_type.add().CopyFrom(entry)
            kind = f"{name}.{entry.name}"
        _set_type(field, kind.rstrip("*"))
        if oneof:
            if oneof not in oneofs:
                oneofs.append(oneof)
                described.oneof_decl.add(name=oneof)
            field.oneof_index = oneofs.index(oneof)
    return described


def _set_type(field: FieldDescriptorProto, kind: str) -> None:
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="deepar_inference.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        file.message_type.add().CopyFrom(_message(name, fields))
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


CLASSES: Final = _classes()
"""Name -> protobuf class."""
