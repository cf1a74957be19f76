"""Activation frames: msgpack maps that carry pieces of samples between stages.

A frame is one msgpack map with string keys and without extension types, so every msgpack library can read it:

    {"v": 1, "kind": "activations" | "result" | "report" | "probe" | "echo", "task": str, "attempt": int, "from": str,
     "plan": {...}                                    (in a task's first frame to a stage)
     "report": {"edge_s": float, ...}                 (kind "report" only; of a session with "samples": float, their number)
     "revision": int                                  (of the plan, in an attempt that was rerouted)
     "totals": [int, ...]                             (how many samples take each route, once all of the plan have begun; of a
                                                       plan of several routes, or that another one follows)
     "pieces": [{"sample": int, "at": int, "size": int, "bytes": int, "tensors": [{"dtype", "shape"}, ...],
                 "codec": str, "raw": int, "route": int}, ...
                or {"samples": [int, ...], "size": int, "tensors": [...], "route": int}
                or {"samples": [int, ...], "sizes": [int, ...], "tensors": [...], "codec": str, "raw": int, "route": int}],
     "data": bin}

The payload of a sample (`size` bytes) is the concatenation of its tensors' bytes (little-endian, C order). A piece is `bytes`
of them, starting at `at`. Small samples are one piece each and share a frame; large samples are split over several frames.
Only the piece at 0 has `tensors`. Whole samples with the same tensors share one description (`samples`, `size` bytes
each): with 4 kB samples in 20 kB frames, separate descriptions would be 2 % of the traffic. `route` is an index of the
plan's routes; it is absent for the first one, and in results. `data` holds the bytes of all
pieces in order. It is the last entry and is read in place, since unpacking would copy it: a fifth of the cost of a hop at
1 MB.

Where a piece names a `codec`, the payload is what the codec made of the tensors, whose bytes would be `raw` (`bus.codecs`).
Encoded samples differ in size, so those that share a description have `sizes`.

A `probe` measures a link's latency: the receiver sends it back as an `echo`. Both have no plan, report, pieces or data;
`task` and `attempt` identify the prober and count its probes.

Decoding is bounded: the length of the frame is checked first, the unpacker receives only the head, and every count, size,
shape and dtype is checked before memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgpack
from pydantic import Field, ValidationError

from bus.errors import ProtocolError
from bus.messages import AttemptNumber, Placed, Samples
from bus.port import RecordValue
from bus.tensors import (
    DTYPES,
    ITEM_BYTES,
    EncodedAs,
    Piece,
    TensorHead,
    encoded_limit,
    tensor_head,
    to_arrays,
    to_tensors,
)
from bus.validation import first_fault
from bus.values import MAX_ROUTES, Codec, Execution, Frozen, Name, NodeName, Placement

FRAME_VERSION = 1
MAX_FRAME_BYTES = 1_040_000
"""With its headers, a frame of this size fits a broker's default limit."""
MAX_HEAD_BYTES = 128 * 1024
"""Size limit of everything before `data`: the plan and the descriptions of the pieces."""
MAX_PIECES = 512
MAX_SAMPLE_BYTES = 256 * 1024 * 1024
MAX_TENSORS = 64
MAX_RANK = 8
MAX_BUSY_S = 1e12
_COUNTS_BELOW = 1 << 40
_FIRST_LOOK_BYTES = 16 * 1024  # contains most heads; the unpacker copies its input

FrameKind = Literal["activations", "result", "report", "probe", "echo"]
KINDS: tuple[FrameKind, ...] = get_args(FrameKind)
SAMPLES = "samples"
"""Key of a report of a session: the number of samples that it covers."""
MORE = "more"
"""Key of a report of a task of several routes: a later report covers what follows."""
PREDICTED = "_predicted_s"
"""Ending of a report's keys: what the plan predicts for the busy seconds of a part, in a task of several routes."""
BATCHES = "_batches"
"""Ending of a report's keys: the sum of 1/n over the samples that a part computed in batches, each of n samples."""
PROBING: tuple[FrameKind, ...] = ("probe", "echo")
"""Kinds without task data."""


class AttemptPlan(Frozen):
    """The plan of a task attempt, sent to a stage with the first activations."""

    task_id: Name
    attempt: AttemptNumber
    region: Annotated[int, Field(ge=0)]
    device: NodeName  # where the results go
    model: Name
    sha256: str  # of the model file; stages reject other files
    samples: Samples  # N of the whole task
    todo: Samples  # number of samples that this attempt sends
    execution: Execution
    placement: Placement
    input_bytes: int | None = None  # G(0) of this task; None: the model's
    in_flight: Annotated[int, Field(ge=1)] | None = None  # samples that a full pipeline has on links with latency
    revision: Annotated[int, Field(ge=1)] | None = None  # how often the attempt was rerouted; None: never
    session: Literal[True] | None = None  # an open-ended task: `samples` and `todo` mean nothing

    @classmethod
    def of(cls, placed: Placed, *, region: int, todo: int, input_bytes: int | None = None) -> AttemptPlan:
        """The plan of a placement for `todo` samples."""
        latency_s = placed.overhead.latency_s if placed.overhead is not None else 0.0
        slowest_s = placed.slowest_s
        session = placed.session is not None
        streams = (session or placed.execution is Execution.STREAMING) and latency_s > 0 and slowest_s > 0
        in_flight = math.ceil(latency_s / slowest_s) if streams else None
        if in_flight is not None and not session:
            in_flight = min(placed.samples, in_flight)
        return cls(
            task_id=placed.task_id, attempt=placed.attempt, region=region, device=placed.device, model=placed.model,
            sha256=placed.sha256, samples=placed.samples, todo=todo, execution=placed.execution,
            placement=placed.placement, input_bytes=input_bytes, in_flight=in_flight,
            revision=None if placed.rest is None else placed.rest.reroutes, session=True if session else None,
        )  # fmt: skip

    @property
    def number(self) -> int:
        """The revision as a number, 0 where the attempt was never rerouted."""
        return self.revision or 0


class Frame(NamedTuple):
    """One record of a data topic."""

    kind: FrameKind
    task_id: str
    attempt: int
    source: str  # the node that sends it
    pieces: Sequence[Piece] = ()
    plan: AttemptPlan | None = None
    report: Mapping[str, float] = MappingProxyType({})  # busy seconds by part, and the other keys above
    revision: int = 0  # of the plan that it belongs to
    totals: tuple[int, ...] = ()  # samples of each route in this attempt; empty: not known yet, or one route


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_frame(frame: Frame) -> bytes:
    """Encode a frame as msgpack. Raises ValueError if it would exceed the size limit."""
    more: dict[str, Any] = {}
    if frame.plan is not None:
        more["plan"] = frame.plan.model_dump(mode="json", exclude_none=True)
    if frame.report:
        more["report"] = dict(frame.report)
    if frame.revision:
        more["revision"] = frame.revision
    if frame.totals:
        more["totals"] = frame.totals
    more["pieces"] = _described(frame.pieces)
    entries = bytes((_MAP | (_SENDER_ENTRIES + len(more) + 1),))
    front = b"".join(
        (entries, _sender(frame.kind, frame.task_id, frame.attempt, frame.source), msgpack.packb(more)[1:], _DATA)
    )
    data = [piece.data for piece in frame.pieces]
    data_bytes = sum([part.nbytes for part in data])
    if len(front) > MAX_HEAD_BYTES or len(front) + 5 + data_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(front):,} + {data_bytes:,} bytes is over {MAX_FRAME_BYTES:,}")
    return b"".join((front, b"\xc6", data_bytes.to_bytes(4, "big"), *data))


_MAP = 0x80  # first byte of a msgpack map with up to 15 entries: this plus the count
_DATA: bytes = msgpack.packb("data")
_SENDER_ENTRIES = 5


@lru_cache(maxsize=1024)
def _sender(kind: FrameKind, task_id: str, attempt: int, source: str) -> bytes:
    """The packed entries, without the map header, that all frames of an attempt from one stage share."""
    entries = {"v": FRAME_VERSION, "kind": kind, "task": task_id, "attempt": attempt, "from": source}
    packed: bytes = msgpack.packb(entries)
    return packed[1:]


def _described(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """The descriptions of the pieces; consecutive whole samples with the same tensors share an entry."""
    entries: list[dict[str, Any]] = []
    alike: tuple[TensorHead, ...] | None = None  # tensors of the whole samples that share the last entry
    encoded: EncodedAs | None = None  # their codec
    route = 0
    samples: list[int] = []  # samples that share it
    sizes: list[int] = []  # of their payloads
    for piece in pieces:
        sample, at, size, data, tensors, _, own, its_route = piece
        whole = at == 0 and data.nbytes == size
        if whole and tensors == alike and own == encoded and its_route == route:
            samples.append(sample)
            sizes.append(size)
            if len(samples) == 2:
                for alone in ("sample", "at", "size", "bytes"):
                    del entries[-1][alone]
                entries[-1]["samples"] = samples
                entries[-1] |= {"size": size} if own is None else {"sizes": sizes}
            continue
        alike, encoded, route = (tensors if whole else None), own, its_route
        samples, sizes = [sample], [size]
        entry: dict[str, Any] = {"sample": sample, "at": at, "size": size, "bytes": data.nbytes}
        if at == 0:
            entry["tensors"] = [{"dtype": tensor.dtype, "shape": tensor.shape} for tensor in tensors]
        if own is not None:
            entry |= {"codec": own.codec.value, "raw": own.raw_bytes}
        if route:
            entry["route"] = route
        entries.append(entry)
    return entries


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_frame(value: RecordValue | None) -> Frame:
    """Decode the frame of a record; the data of its pieces are views of `value`.

    Raises `ProtocolError`: `oversized`, `undecodable`, `unknown_version`, `wrong_shape`.
    """
    if value is None:
        raise ProtocolError("undecodable", "an empty record")
    view = memoryview(value)
    if view.nbytes > MAX_FRAME_BYTES:
        raise ProtocolError("oversized", f"{view.nbytes:,} bytes, over {MAX_FRAME_BYTES:,}")
    head, data = _unpack(view)
    try:
        version = head.get("v")
        if version != FRAME_VERSION:
            raise ProtocolError("unknown_version", f"frame version {version!r}, this reads {FRAME_VERSION}")
        kind = head["kind"]
        if kind not in KINDS:
            raise ProtocolError("undecodable", f"unknown kind {kind!r}")
        if kind in PROBING and (data.nbytes or head["pieces"] or "plan" in head or "report" in head):
            raise ProtocolError("wrong_shape", f"a frame of kind {kind} has no plan, report, pieces or data")
        plan = AttemptPlan.model_validate(head["plan"]) if "plan" in head else None
        return Frame(
            kind, _text(head["task"]), _count(head["attempt"]), _text(head["from"]), _pieces(head["pieces"], data),
            plan, {_text(key): _seconds(value) for key, value in head.get("report", {}).items()},
            _count(head.get("revision", 0)), _totals(head),
        )  # fmt: skip
    except ValidationError as error:
        raise ProtocolError("undecodable", first_fault(error, "plan")) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError("undecodable", f"{type(error).__name__}: {error}") from None


def _unpack(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The head as a dictionary, and the data as a view."""
    if view.nbytes <= _FIRST_LOOK_BYTES and view.nbytes and _MAP < view[0] < _MAP + 16:
        return _unpack_whole(view)
    try:
        return _unpack_head(view, _FIRST_LOOK_BYTES)
    except msgpack.OutOfData:
        pass
    try:
        return _unpack_head(view, MAX_HEAD_BYTES)
    except msgpack.OutOfData as error:
        raise ProtocolError("undecodable", f"not a msgpack map: {type(error).__name__}: {error}") from None


_LIMITS: dict[str, Any] = {
    "raw": False, "strict_map_key": True, "max_array_len": MAX_PIECES, "max_map_len": 64, "max_str_len": 4096,
    "max_ext_len": 0,
}  # fmt: skip


def _unpack_whole(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    """Unpack a small frame in one call, which copies the data.

    That is faster than an `Unpacker` that stops before the data, since an `Unpacker` allocates 40 kB.
    """
    try:
        head = msgpack.unpackb(view, max_bin_len=_FIRST_LOOK_BYTES, **_LIMITS)
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ProtocolError("undecodable", f"not a msgpack map: {type(error).__name__}: {error}") from None
    if len(head) != view[0] - _MAP:
        raise ProtocolError("undecodable", "duplicate key")
    key, data = head.popitem()  # the last
    if key != "data":
        raise ProtocolError("undecodable", "the last entry is not data")
    if type(data) is not bytes:
        raise ProtocolError("undecodable", "data is not a bin")
    return head, view[view.nbytes - len(data) :]


def _unpack_head(view: memoryview, look_bytes: int) -> tuple[dict[str, Any], memoryview]:
    unpacker = msgpack.Unpacker(max_buffer_size=look_bytes, max_bin_len=0, **_LIMITS)
    unpacker.feed(view[:look_bytes])
    unpack = unpacker.unpack
    head: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            key = unpack()
            if key == "data":
                return head, _bin_at(view, unpacker.tell())
            if type(key) is not str or key in head:
                raise ProtocolError("undecodable", "a key is not a string, or is duplicate")
            head[key] = unpack()
    except (ProtocolError, msgpack.OutOfData):
        raise
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ProtocolError("undecodable", f"not a msgpack map: {type(error).__name__}: {error}") from None
    raise ProtocolError("undecodable", "the last entry is not data")


_BIN_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}


def _bin_at(view: memoryview, at: int) -> memoryview:
    """The content of the msgpack `bin` at `at`, which must be the end of the frame."""
    width = _BIN_LENGTHS.get(view[at]) if at < view.nbytes else None
    if width is None or at + 1 + width > view.nbytes:
        raise ProtocolError("undecodable", "data is not a bin")
    start = at + 1 + width
    length = int.from_bytes(view[at + 1 : start], "big")
    if start + length != view.nbytes:
        raise ProtocolError("undecodable", f"data of {length:,} bytes in a frame that has {view.nbytes - start:,} left")
    return view[start:]


def _pieces(described: Any, data: memoryview) -> list[Piece]:
    if not isinstance(described, list):
        raise ProtocolError("undecodable", "pieces is not an array")
    pieces: list[Piece] = []
    begin = 0
    for entry in described:
        if "samples" not in entry:
            pieces.append(_piece(entry, data, begin))
            begin += pieces[-1].data.nbytes
        else:
            alike = _alike(entry, data[begin:])
            begin += sum(entry["sizes"]) if "codec" in entry else entry["size"] * len(alike)
            pieces += alike
        if len(pieces) > MAX_PIECES:
            raise ProtocolError("undecodable", f"over {MAX_PIECES} pieces in one frame")
    if begin != data.nbytes:
        raise ProtocolError("wrong_shape", f"{data.nbytes - begin:,} bytes belong to no piece")
    return pieces


def _piece(entry: dict[str, Any], data: memoryview, begin: int) -> Piece:
    """Decode one piece whose bytes start at `begin`."""
    encoded = _encoded_as(entry)
    size = _size(entry["size"], encoded)
    sample, at, length = _count(entry["sample"]), _count(entry["at"]), _count(entry["bytes"])
    end = begin + length
    if at + length > size or end > data.nbytes or (length == 0 and size > 0):
        raise ProtocolError("wrong_shape", f"sample {sample}: a piece lies outside its sample or its frame")
    tensors = _tensors(entry, size if encoded is None else encoded.raw_bytes) if at == 0 else ()
    part = data[begin:end]
    arrays = to_tensors(tensors, part) if length == size and encoded is None else None
    return Piece(sample, at, size, part, tensors, arrays, encoded, _route(entry))


def _alike(entry: dict[str, Any], data: memoryview) -> list[Piece]:
    """Decode whole samples with the same tensors; the first starts at the beginning of `data`."""
    samples, encoded = entry["samples"], _encoded_as(entry)
    if not isinstance(samples, list):
        raise ProtocolError("undecodable", "samples is not an array")
    for sample in samples:
        _count(sample)
    if encoded is not None:
        return _alike_encoded(samples, entry, encoded, data)
    size, count, route = _size(entry["size"], None), len(samples), _route(entry)
    tensors = _tensors(entry, size)
    if size * count > data.nbytes:
        raise ProtocolError("wrong_shape", f"sample {samples[:1]}: a piece lies outside its frame")
    arrays = to_arrays(tensors, data[: size * count], count) if count else []
    return [
        Piece(sample, 0, size, data[number * size : (number + 1) * size], tensors, whole, None, route)
        for number, (sample, whole) in enumerate(zip(samples, arrays, strict=True))
    ]


def _alike_encoded(samples: list[int], entry: dict[str, Any], encoded: EncodedAs, data: memoryview) -> list[Piece]:
    """The same for encoded samples, each of its own size."""
    tensors, route = _tensors(entry, encoded.raw_bytes), _route(entry)
    begin = 0
    pieces = []
    for sample, size in zip(samples, [_size(size, encoded) for size in entry["sizes"]], strict=True):
        pieces.append(Piece(sample, 0, size, data[begin : begin + size], tensors, None, encoded, route))
        begin += size
    if begin > data.nbytes:
        raise ProtocolError("wrong_shape", f"sample {samples[:1]}: a piece lies outside its frame")
    return pieces


def _encoded_as(entry: dict[str, Any]) -> EncodedAs | None:
    if "codec" not in entry:
        return None
    codec, raw_bytes = Codec(entry["codec"]), _count(entry["raw"])
    if codec is Codec.RAW:
        raise ProtocolError("undecodable", "a payload that is not encoded names no codec")
    if raw_bytes > MAX_SAMPLE_BYTES:
        raise ProtocolError("oversized", f"a sample of {raw_bytes:,} bytes, over {MAX_SAMPLE_BYTES:,}")
    return EncodedAs(codec, raw_bytes)


def _size(value: Any, encoded: EncodedAs | None) -> int:
    """The size of a payload."""
    size = _count(value)
    limit = MAX_SAMPLE_BYTES if encoded is None else encoded_limit(encoded.raw_bytes)
    if size > limit:
        raise ProtocolError("oversized", f"a sample of {size:,} bytes, over {limit:,}")
    return size


def _route(entry: dict[str, Any]) -> int:
    route = entry.get("route")
    if route is None:
        return 0
    if _count(route) >= MAX_ROUTES:
        raise ProtocolError("wrong_shape", f"route {route}: a plan has at most {MAX_ROUTES} routes")
    return int(route)


def _totals(head: dict[str, Any]) -> tuple[int, ...]:
    totals = head.get("totals")
    if totals is None:
        return ()
    if not isinstance(totals, list) or not 0 < len(totals) <= MAX_ROUTES:
        raise ProtocolError("wrong_shape", f"totals are not an array of 1 to {MAX_ROUTES} numbers")
    return tuple([_count(total) for total in totals])


def _tensors(entry: dict[str, Any], size: int) -> tuple[TensorHead, ...]:
    """The tensors of a sample, which make up `size` bytes before they are encoded."""
    tensors = tuple([_tensor(head) for head in entry["tensors"]])
    if len(tensors) > MAX_TENSORS or sum([tensor.size_bytes for tensor in tensors]) != size:
        raise ProtocolError("wrong_shape", f"the tensors do not make up {size:,} bytes")
    return tensors


def _tensor(head: Any) -> TensorHead:
    dtype, shape = head["dtype"], head["shape"]
    if dtype not in DTYPES:
        raise ProtocolError("wrong_shape", f"dtype {str(dtype)[:20]!r} is not allowed")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise ProtocolError("wrong_shape", f"a rank over {MAX_RANK}")
    extents = tuple([_count(extent) for extent in shape])
    if 0 in extents and math.prod(filter(None, extents)) * ITEM_BYTES[dtype] >= _COUNTS_BELOW:
        raise ProtocolError("wrong_shape", "a tensor without values has too large a shape")  # numpy refuses it, too
    return tensor_head(dtype, extents)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _COUNTS_BELOW:
        raise ProtocolError("undecodable", f"{str(value)[:40]!r} is not a non-negative integer")
    return value


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 <= seconds <= MAX_BUSY_S:
        raise ProtocolError("undecodable", f"{seconds} is not a valid number of busy seconds")
    return seconds


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ProtocolError("undecodable", f"{str(value)[:40]!r} is not a text of 1 to 200 characters")
    return value
