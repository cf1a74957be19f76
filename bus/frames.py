"""Activation frames: msgpack maps that carry pieces of samples from stage to stage.

A frame is one msgpack map with string keys and no extension types, so that any language can read it:

    {"v": 1, "kind": "activations" | "result" | "report", "task": str, "attempt": int, "from": str,
     "plan": {...}                                    (in a task's first frame to a stage)
     "report": {"edge_s": float, ...}                 (kind "report" only)
     "pieces": [{"sample": int, "at": int, "size": int, "bytes": int, "tensors": [{"dtype", "shape"}, ...]}, ...
                or {"samples": [int, ...], "size": int, "tensors": [...]}],
     "data": bin}

The payload of a sample is its tensors' bytes (little-endian, C order) one after the other: `size` bytes. A piece is the
`bytes` of it that begin at `at`; small samples are whole pieces and share a frame, large ones are cut into many frames.
`tensors` stands where `at` is 0. Whole samples with the same tensors are described together (`samples`, of `size` bytes
each): on a link of 20 kB frames and 4 kB samples a description for each would be 2 % of the load. `data` holds the pieces'
bytes in order and is the last entry, so that it can be read in place: unpacking a `bin` would copy it, a fifth of the cost
of a hop at 1 MB.

Decoding is bounded everywhere: a frame's length is checked first, only the head of the frame is given to the unpacker, and
every count, size, shape and dtype is checked before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from bus.errors import ProtocolError
from bus.messages import Attempt, Placed, Samples
from bus.port import Payload
from bus.values import Execution, Frozen, Name, NodeName, Placement

FRAME_VERSION = 1
MAX_FRAME_BYTES = 1_040_000
"""Fits every broker's defaults with its headers."""
MAX_HEAD_BYTES = 128 * 1024
"""Everything before `data`: the plan and the pieces' descriptions."""
MAX_PIECES = 512
MAX_SAMPLE_BYTES = 256 * 1024 * 1024
MAX_TENSORS = 64
MAX_RANK = 8
DTYPES = frozenset(
    ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    + ("float16", "float32", "float64", "complex64")
)
ITEM_BYTES = {name: np.dtype(name).itemsize for name in sorted(DTYPES)}
_NAMES = {np.dtype(name): name for name in sorted(DTYPES)}  # dtype.name is computed anew each time it is asked for
_DTYPES = {name: np.dtype(name) for name in sorted(DTYPES)}
_COUNTS_BELOW = 1 << 40
_FIRST_LOOK_BYTES = 16 * 1024  # holds most heads; what the unpacker is fed is copied

Array = npt.NDArray[Any]
FrameKind = Literal["activations", "result", "report"]


class Plan(Frozen):
    """What a stage must know to work on a task: it travels with the activations."""

    task_id: Name
    attempt: Attempt
    region: Annotated[int, Field(ge=0)]
    device: NodeName  # where the results go
    model: Name
    sha256: str  # stages refuse another model of this name
    samples: Samples  # N of the whole task
    todo: Samples  # how many of them this attempt sends
    execution: Execution
    placement: Placement
    input_bytes: int | None = None  # G(0) where it is not the model's

    @classmethod
    def of(cls, placed: Placed, *, region: int, todo: int, input_bytes: int | None = None) -> Plan:
        """The plan that a placement makes for `todo` samples."""
        return cls(
            task_id=placed.task_id, attempt=placed.attempt, region=region, device=placed.device, model=placed.model,
            sha256=placed.sha256, samples=placed.samples, todo=todo, execution=placed.execution,
            placement=placed.placement, input_bytes=input_bytes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What one tensor of a payload is: `dtype` from the allow-list and `shape`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its length in the payload."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """`data` is the part of a sample's payload of `size_bytes` that begins at `at`."""

    sample: int
    at: int
    size_bytes: int
    data: memoryview
    tensors: tuple[TensorHead, ...] = ()  # where `at` is 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One record of a data topic."""

    kind: FrameKind
    task_id: str
    attempt: int
    source: str  # the node that sends it
    pieces: tuple[Piece, ...] = ()
    plan: Plan | None = None
    report: dict[str, float] = field(default_factory=dict)  # busy seconds by part


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_frame(frame: Frame) -> bytes:
    """The frame as msgpack. Raises ValueError where it would be too large to send."""
    head: dict[str, Any] = {
        "v": FRAME_VERSION,
        "kind": frame.kind,
        "task": frame.task_id,
        "attempt": frame.attempt,
        "from": frame.source,
    }
    if frame.plan is not None:
        head["plan"] = frame.plan.model_dump(mode="json", exclude_none=True)
    if frame.report:
        head["report"] = frame.report
    head["pieces"] = _described(frame.pieces)
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(head) + 1)
    for key, value in head.items():
        packer.pack(key)
        packer.pack(value)
    packer.pack("data")
    data_bytes = sum(piece.data.nbytes for piece in frame.pieces)
    front = packer.bytes()
    if len(front) > MAX_HEAD_BYTES or len(front) + 5 + data_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(front):,} + {data_bytes:,} bytes is over {MAX_FRAME_BYTES:,}")
    return b"".join([front, b"\xc6", data_bytes.to_bytes(4, "big"), *(piece.data for piece in frame.pieces)])


def _described(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """What the head says of the pieces; whole samples that follow each other and have the same tensors in one entry."""
    entries: list[dict[str, Any]] = []
    alike: tuple[TensorHead, ...] | None = None  # of the whole sample that was described last
    for piece in pieces:
        whole = piece.at == 0 and piece.data.nbytes == piece.size_bytes
        if whole and piece.tensors == alike:
            last = entries[-1]
            if "samples" in last:
                last["samples"].append(piece.sample)
            else:
                samples = [last["sample"], piece.sample]
                entries[-1] = {"samples": samples, "size": piece.size_bytes, "tensors": last["tensors"]}
            continue
        alike = piece.tensors if whole else None
        entry: dict[str, Any] = {
            "sample": piece.sample,
            "at": piece.at,
            "size": piece.size_bytes,
            "bytes": piece.data.nbytes,
        }
        if piece.at == 0:
            entry["tensors"] = [{"dtype": tensor.dtype, "shape": tensor.shape} for tensor in piece.tensors]
        entries.append(entry)
    return entries


def to_pieces(sample: int, tensors: Sequence[Array], chunk_bytes: int) -> list[Piece]:
    """One sample's tensors as pieces of at most `chunk_bytes`, without copying where it is one contiguous tensor."""
    heads = tuple([_head(_NAMES.get(array.dtype) or array.dtype.name, array.shape) for array in tensors])
    if len(tensors) == 1:
        payload = _bytes_of(tensors[0])
    else:
        payload = memoryview(b"".join(_bytes_of(array) for array in tensors))
    size = payload.nbytes
    if size <= chunk_bytes:
        return [Piece(sample, 0, size, payload, heads)]
    return [
        Piece(sample, at, size, payload[at : at + chunk_bytes], heads if at == 0 else ())
        for at in range(0, size, chunk_bytes)
    ]


@lru_cache(maxsize=4096)
def _head(dtype: str, shape: tuple[int, ...]) -> TensorHead:
    """Samples of a model have the same few heads."""
    return TensorHead(dtype, shape)


def _bytes_of(array: Array) -> memoryview:
    if array.dtype.kind in "fiub" and array.size and array.ndim and array.flags.c_contiguous and array.dtype.isnative:
        return array.data.cast("B")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # A flat byte view: memoryview.cast refuses shapes that hold a zero and arrays of rank 0.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_frame(payload: Payload | None) -> Frame:
    """The frame of a record; its pieces' data are views of `payload`.

    Raises `ProtocolError`: `oversized`, `undecodable`, `unknown_version`, `wrong_shape`.
    """
    if payload is None:
        raise ProtocolError("undecodable", "an empty record")
    view = memoryview(payload)
    if view.nbytes > MAX_FRAME_BYTES:
        raise ProtocolError("oversized", f"{view.nbytes:,} bytes, over {MAX_FRAME_BYTES:,}")
    head, data = _unpack(view)
    try:
        version = head.get("v")
        if version != FRAME_VERSION:
            raise ProtocolError("unknown_version", f"frame version {version!r}, this reads {FRAME_VERSION}")
        kind = head["kind"]
        if kind not in ("activations", "result", "report"):
            raise ProtocolError("undecodable", f"unknown kind {kind!r}")
        plan = Plan.model_validate(head["plan"]) if "plan" in head else None
        return Frame(
            kind, _text(head["task"]), _count(head["attempt"]), _text(head["from"]), tuple(_pieces(head["pieces"], data)),
            plan, {_text(key): float(value) for key, value in head.get("report", {}).items()},
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError("undecodable", f"plan.{where}: {first['msg']}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError("undecodable", f"{type(error).__name__}: {error}") from None


def _unpack(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    try:
        return _unpack_head(view, _FIRST_LOOK_BYTES)
    except msgpack.OutOfData:
        pass
    try:
        return _unpack_head(view, MAX_HEAD_BYTES)
    except msgpack.OutOfData as error:
        raise ProtocolError("undecodable", f"not a msgpack map: {type(error).__name__}: {error}") from None


def _unpack_head(view: memoryview, look_bytes: int) -> tuple[dict[str, Any], memoryview]:
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=True, max_buffer_size=look_bytes, max_array_len=MAX_PIECES, max_map_len=64,
        max_str_len=4096, max_bin_len=0, max_ext_len=0,
    )  # fmt: skip
    unpacker.feed(view[:look_bytes])
    head: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            if key == "data":
                return head, _bin_at(view, unpacker.tell())
            if not isinstance(key, str) or key in head:
                raise ProtocolError("undecodable", "a key is no string, or stands twice")
            head[key] = unpacker.unpack()
    except (ProtocolError, msgpack.OutOfData):
        raise
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ProtocolError("undecodable", f"not a msgpack map: {type(error).__name__}: {error}") from None
    raise ProtocolError("undecodable", "no data at the end")


_BIN_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}


def _bin_at(view: memoryview, at: int) -> memoryview:
    """The msgpack `bin` that begins at `at` and must end the frame."""
    width = _BIN_LENGTHS.get(view[at]) if at < view.nbytes else None
    if width is None or at + 1 + width > view.nbytes:
        raise ProtocolError("undecodable", "data is no bin")
    start = at + 1 + width
    length = int.from_bytes(view[at + 1 : start], "big")
    if start + length != view.nbytes:
        raise ProtocolError("undecodable", f"data of {length:,} bytes in a frame that has {view.nbytes - start:,} left")
    return view[start:]


def _pieces(described: Any, data: memoryview) -> Iterator[Piece]:
    if not isinstance(described, list):
        raise ProtocolError("undecodable", "pieces are no array")
    begin = count = 0
    for entry in described:
        samples = entry.get("samples")
        if samples is None:
            samples, at, size, length = (
                (entry["sample"],),
                _count(entry["at"]),
                _count(entry["size"]),
                _count(entry["bytes"]),
            )
        elif isinstance(samples, list):
            at, size = 0, _count(entry["size"])
            length = size
        else:
            raise ProtocolError("undecodable", "samples are no array")
        count += len(samples)
        if count > MAX_PIECES:
            raise ProtocolError("undecodable", f"over {MAX_PIECES} pieces in one frame")
        if size > MAX_SAMPLE_BYTES:
            raise ProtocolError("oversized", f"a sample of {size:,} bytes, over {MAX_SAMPLE_BYTES:,}")
        if at + length > size or begin + length * len(samples) > data.nbytes or (length == 0 and size > 0):
            raise ProtocolError("wrong_shape", f"sample {samples[:1]}: a piece lies outside its sample or its frame")
        tensors = tuple([_tensor(head) for head in entry["tensors"]]) if at == 0 else ()
        if at == 0 and (len(tensors) > MAX_TENSORS or sum(t.size_bytes for t in tensors) != size):
            raise ProtocolError("wrong_shape", f"sample {samples[:1]}: its tensors do not make up {size:,} bytes")
        for sample in samples:
            yield Piece(_count(sample), at, size, data[begin : begin + length], tensors)
            begin += length
    if begin != data.nbytes:
        raise ProtocolError("wrong_shape", f"{data.nbytes - begin:,} bytes belong to no piece")


def _tensor(head: Any) -> TensorHead:
    dtype, shape = head["dtype"], head["shape"]
    if dtype not in DTYPES:
        raise ProtocolError("wrong_shape", f"dtype {str(dtype)[:20]!r} is not allowed")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise ProtocolError("wrong_shape", f"a rank over {MAX_RANK}")
    return _head(dtype, tuple([_count(extent) for extent in shape]))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _COUNTS_BELOW:
        raise ProtocolError("undecodable", f"{str(value)[:40]!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ProtocolError("undecodable", f"{str(value)[:40]!r} is no name")
    return value


# --- putting samples together again ----------------------------------------------------------------------------------


class Assembler:
    """Puts the pieces of one task attempt together.

    Pieces of a sample come in order; a piece that came before is ignored. What is kept is bounded by the samples that
    are under way, and the sender's window bounds those.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[tuple[TensorHead, ...], bytearray, int]] = {}

    @property
    def pending(self) -> int:
        """Samples that are not whole yet."""
        return len(self._open)

    @property
    def pending_bytes(self) -> int:
        """Memory held for samples that are not whole yet."""
        return sum(len(buffer) for _, buffer, _ in self._open.values())

    def add(self, piece: Piece) -> list[Array] | None:
        """The sample's tensors, read-only, once it is whole. Raises `ProtocolError` `missing_chunk` on a gap."""
        if piece.at == 0 and piece.data.nbytes == piece.size_bytes:
            self._open.pop(piece.sample, None)
            return to_tensors(piece.tensors, piece.data)
        if piece.at == 0 and piece.sample not in self._open:
            self._open[piece.sample] = (piece.tensors, bytearray(piece.size_bytes), 0)
        if piece.sample not in self._open:
            raise ProtocolError("missing_chunk", f"sample {piece.sample}: a piece at {piece.at} without the first")
        tensors, buffer, filled = self._open[piece.sample]
        end = piece.at + piece.data.nbytes
        if piece.size_bytes != len(buffer):
            raise ProtocolError("wrong_shape", f"sample {piece.sample}: its size changed")
        if piece.at > filled:
            raise ProtocolError("missing_chunk", f"sample {piece.sample}: bytes {filled}..{piece.at} are missing")
        if end <= filled:
            return None
        buffer[piece.at : end] = piece.data
        if end < len(buffer):
            self._open[piece.sample] = (tensors, buffer, end)
            return None
        del self._open[piece.sample]
        return to_tensors(tensors, memoryview(buffer).toreadonly())


def to_tensors(heads: Iterable[TensorHead], payload: memoryview) -> list[Array]:
    """Views of a sample's payload as arrays (read-only, perhaps unaligned)."""
    arrays, at = [], 0
    for head in heads:
        part = payload[at : at + head.size_bytes]
        arrays.append(np.frombuffer(part, dtype=_DTYPES[head.dtype]).reshape(head.shape))
        at += head.size_bytes
    return arrays
