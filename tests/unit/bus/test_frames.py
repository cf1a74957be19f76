"""Activation frames: what goes in comes out, and nothing hostile gets through."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest

from bus import frames
from bus.errors import ProtocolError
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.tensors import Assembler, Encoded, EncodedAs, Piece, TensorHead, encoded_limit, to_pieces
from bus.values import Codec, Execution, Kind, Placement


def plan() -> AttemptPlan:
    placement = Placement(
        kind=Kind.DEVICE_EDGE_CLOUD, edge="e1", cut1=1, cut2=2, cut1_name="a", cut2_name="b", link1_bps=5, link2_bps=6
    )
    return AttemptPlan(
        task_id="t1", attempt=2, region=0, device="d1", model="toy", sha256="0" * 64, samples=9, todo=4,
        execution=Execution.STREAMING, placement=placement,
    )  # fmt: skip


def payload_of(**changes: object) -> bytes:
    """A frame as a stranger would write it, with parts of it replaced or (None) left out."""
    data = bytes(range(12))
    head: dict[str, Any] = {
        "v": 1, "kind": "activations", "task": "t1", "attempt": 1, "from": "d1",
        "pieces": [{"sample": 0, "at": 0, "size": 12, "bytes": 12, "tensors": [{"dtype": "float32", "shape": [3]}]}],
        "data": data,
    }  # fmt: skip
    head |= changes
    packed: bytes = msgpack.packb({key: value for key, value in head.items() if value is not None})
    return packed


def test_a_frame_comes_back_as_it_was() -> None:
    arrays: list[np.ndarray] = [np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.array([7], dtype=np.int64)]
    frame = Frame("activations", "t1", 2, "d1", tuple(to_pieces(5, arrays, 1000)), plan())
    decoded = decode_frame(encode_frame(frame))
    assert (decoded.kind, decoded.task_id, decoded.attempt, decoded.source) == ("activations", "t1", 2, "d1")
    assert decoded.plan == plan()
    made = Assembler().add(decoded.pieces[0])
    assert isinstance(made, list)
    for array, again in zip(arrays, made, strict=True):
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)


def test_any_msgpack_reader_can_read_a_frame() -> None:
    pieces = tuple(to_pieces(5, [np.arange(3, dtype=np.uint8)], 1000))
    plain = msgpack.unpackb(encode_frame(Frame("result", "t1", 1, "c1", pieces)))
    assert plain["pieces"] == [
        {"sample": 5, "at": 0, "size": 3, "bytes": 3, "tensors": [{"dtype": "uint8", "shape": [3]}]}
    ]
    assert plain["data"] == b"\x00\x01\x02"


def test_whole_samples_that_are_alike_are_described_once() -> None:
    arrays = [np.arange(3, dtype=np.uint8) + sample for sample in range(4)]
    alike = [to_pieces(sample, [array], 1000)[0] for sample, array in enumerate(arrays)]
    other = to_pieces(9, [np.zeros(2, np.float32)], 1000)
    cut = to_pieces(10, [np.zeros(4, np.uint8)], 3)
    pieces = (*alike[:3], *other, *cut, alike[3])
    payload = encode_frame(Frame("activations", "t1", 1, "d1", pieces))
    head = msgpack.unpackb(payload)["pieces"]
    assert head[0] == {"samples": [0, 1, 2], "size": 3, "tensors": [{"dtype": "uint8", "shape": [3]}]}
    assert [entry.get("sample") for entry in head] == [None, 9, 10, 10, 3]
    again = decode_frame(payload).pieces
    assert [(p.sample, p.at, p.size_bytes, p.tensors) for p in again] == [
        (p.sample, p.at, p.size_bytes, p.tensors) for p in pieces
    ]
    assert [bytes(p.data) for p in again] == [bytes(p.data) for p in pieces]


def test_samples_of_several_routes_share_a_frame() -> None:
    routes = [0, 0, 2, 2, 2, 0, 7]
    pieces = [to_pieces(sample, [np.zeros(3, np.uint8)], 1000, route)[0] for sample, route in enumerate(routes)]
    pieces += to_pieces(9, [np.zeros(4, np.uint8)], 3, 5)
    payload = encode_frame(Frame("activations", "t1", 1, "d1", pieces, totals=(3, 0, 4)))
    entries = msgpack.unpackb(payload)["pieces"]
    assert [entry.get("route") for entry in entries] == [None, 2, None, 7, 5, 5]
    decoded = decode_frame(payload)
    assert [(piece.sample, piece.route) for piece in decoded.pieces] == [*enumerate(routes), (9, 5), (9, 5)]
    assert decoded.totals == (3, 0, 4)


def test_a_task_of_one_route_has_the_frames_that_it_always_had() -> None:
    payload = encode_frame(Frame("activations", "t1", 1, "d1", to_pieces(0, [np.zeros(3, np.uint8)], 1000)))
    assert set(msgpack.unpackb(payload)) == {"v", "kind", "task", "attempt", "from", "pieces", "data"}
    assert "route" not in msgpack.unpackb(payload)["pieces"][0]
    assert decode_frame(payload).totals == ()


PIECE = {"sample": 0, "at": 0, "size": 12, "bytes": 12, "tensors": [{"dtype": "float32", "shape": [3]}]}


@pytest.mark.parametrize(
    "changes",
    [{"pieces": [PIECE | {"route": route}]} for route in (-1, 8, 1 << 40, 1.0, "1", True)]
    + [{"totals": totals} for totals in ([], 3, [-1], [1.5], [1] * 9, {"a": 1}, ["1"])],
)
def test_routes_and_totals_that_no_plan_can_have_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(payload_of(**changes))


def test_the_layout_of_a_stranger_is_read() -> None:
    piece = decode_frame(payload_of()).pieces[0]
    assert piece.tensors == (TensorHead("float32", (3,)),)
    assert bytes(piece.data) == bytes(range(12))


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1000)])
def test_chunks_are_put_together(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)
    assembler, made = Assembler(), None
    for piece in to_pieces(3, [array], 333):
        assert made is None
        assert piece.data.nbytes <= 333
        made = assembler.add(decode_frame(encode_frame(Frame("result", "t", 1, "x", (piece,)))).pieces[0])
    assert isinstance(made, list)
    np.testing.assert_array_equal(made[0], array)
    assert assembler.pending_bytes == 0


def test_chunks_that_come_twice_or_from_the_beginning_again_do_no_harm() -> None:
    array = np.arange(100, dtype=np.uint8)
    pieces = to_pieces(0, [array], 30)
    assembler = Assembler()
    made = [assembler.add(piece) for piece in (pieces[0], pieces[1], pieces[0], pieces[1], pieces[2], pieces[3])]
    assert [result is not None for result in made] == [False] * 5 + [True]
    assert isinstance(made[-1], list)
    np.testing.assert_array_equal(made[-1][0], array)


def encoded(content: bytes, *, codec: Codec = Codec.Q8) -> Encoded:
    return Encoded(codec, (TensorHead("float32", (5,)),), memoryview(content))


def test_encoded_samples_come_back_as_they_were_and_name_their_codec_in_every_piece() -> None:
    pieces = (*to_pieces(1, encoded(b"ab"), 9), *to_pieces(2, encoded(b"cde"), 9), *to_pieces(3, encoded(b"123456"), 4))
    payload = encode_frame(Frame("activations", "t1", 1, "d1", (*pieces, *to_pieces(4, encoded(b""), 9))))
    tensors = [{"dtype": "float32", "shape": [5]}]
    codec = {"codec": "q8", "raw": 20}
    assert msgpack.unpackb(payload)["pieces"] == [
        {"samples": [1, 2], "sizes": [2, 3], "tensors": tensors, **codec},
        {"sample": 3, "at": 0, "size": 6, "bytes": 4, "tensors": tensors, **codec},
        {"sample": 3, "at": 4, "size": 6, "bytes": 2, **codec},
        {"sample": 4, "at": 0, "size": 0, "bytes": 0, "tensors": tensors, **codec},
    ]
    assembler = Assembler()
    again = [assembler.add(piece) for piece in decode_frame(payload).pieces]
    assert again == [encoded(b"ab"), encoded(b"cde"), None, encoded(b"123456"), encoded(b"")]


def test_samples_of_other_codecs_do_not_share_a_description() -> None:
    pieces = [to_pieces(n, encoded(b"ab", codec=codec), 9)[0] for n, codec in enumerate([Codec.Q8, Codec.Q4, Codec.Q4])]
    payload = encode_frame(Frame("activations", "t1", 1, "d1", (*pieces, *to_pieces(3, [np.zeros(5, np.float32)], 50))))
    codecs = [piece.encoded and piece.encoded.codec for piece in decode_frame(payload).pieces]
    assert codecs == [Codec.Q8, Codec.Q4, Codec.Q4, None]


@pytest.mark.parametrize("other", [None, EncodedAs(Codec.Q4, 20), EncodedAs(Codec.Q8, 21)])
def test_pieces_that_disagree_about_the_codec_are_refused(other: EncodedAs | None) -> None:
    first, second = to_pieces(1, encoded(b"abcd"), 2)
    assembler = Assembler()
    assembler.add(first)
    with pytest.raises(ProtocolError) as caught:
        assembler.add(second._replace(encoded=other))
    assert caught.value.cause == "wrong_shape"


def test_a_gap_is_named_and_nothing_is_made_up() -> None:
    pieces = to_pieces(0, [np.arange(100, dtype=np.uint8)], 30)
    assembler = Assembler()
    assembler.add(pieces[0])
    with pytest.raises(ProtocolError) as caught:
        assembler.add(pieces[2])
    assert caught.value.cause == "missing_chunk"


def test_a_frame_that_is_too_large_is_never_sent() -> None:
    piece = to_pieces(0, [np.zeros(frames.MAX_FRAME_BYTES, np.uint8)], 1 << 30)[0]
    with pytest.raises(ValueError, match="over"):
        encode_frame(Frame("activations", "t", 1, "d1", (piece,)))


ENCODED = {"sample": 0, "at": 0, "size": 12, "bytes": 12, "tensors": [{"dtype": "float32", "shape": [9]}]}
ENCODED |= {"codec": "zstd", "raw": 36}
HUGE = [0, 1 << 39, 1 << 39]  # no values, but numpy refuses it
BOTH = {"samples": [0, 1], "sizes": [6, 6], "tensors": ENCODED["tensors"], "codec": "q8", "raw": 36}
ALIKE = {"samples": [0], "size": 12, "tensors": [{"dtype": "float32", "shape": [3]}]}
PIECE = {"sample": 0, "at": 0, "size": 12, "bytes": 12, "tensors": [{"dtype": "float32", "shape": [3]}]}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"v": 2}, "unknown_version"),
        ({"v": None}, "unknown_version"),
        ({"kind": "bomb"}, "undecodable"),
        ({"task": ""}, "undecodable"),
        ({"task": 5}, "undecodable"),
        ({"attempt": -1}, "undecodable"),
        ({"attempt": True}, "undecodable"),
        ({"pieces": None}, "undecodable"),
        ({"pieces": {}}, "undecodable"),
        ({"pieces": [{}]}, "undecodable"),
        ({"pieces": []}, "wrong_shape"),
        ({"data": b""}, "wrong_shape"),
        ({"data": "text"}, "undecodable"),
        ({"pieces": [PIECE | {"size": 13}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"size": 1 << 39}]}, "oversized"),
        ({"pieces": [PIECE | {"at": 13}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"bytes": 11}]}, "wrong_shape"),
        ({"pieces": [PIECE, PIECE]}, "wrong_shape"),
        ({"pieces": [PIECE | {"tensors": [{"dtype": "object", "shape": [3]}]}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"tensors": [{"dtype": "float32", "shape": [4]}]}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"tensors": [{"dtype": "float32", "shape": [1 << 20, 1 << 20]}]}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"tensors": [{"dtype": "float32", "shape": [1] * 9}]}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"tensors": [{"dtype": "float32", "shape": [-3]}]}]}, "undecodable"),
        ({"pieces": [ALIKE | {"samples": [0, 1]}]}, "wrong_shape"),
        ({"pieces": [ALIKE | {"samples": {}}]}, "undecodable"),
        ({"pieces": [ALIKE | {"samples": [-1]}]}, "undecodable"),
        ({"pieces": [ALIKE | {"size": 8}]}, "wrong_shape"),
        ({"pieces": [{"samples": [0], "size": 12}]}, "undecodable"),
        ({"pieces": [ALIKE | {"samples": [0] * 300, "size": 0, "tensors": []}] * 2, "data": b""}, "undecodable"),
        (
            {
                "pieces": [
                    PIECE | {"tensors": [{"dtype": "float32", "shape": [3]}, {"dtype": "float32", "shape": HUGE}]}
                ]
            },
            "wrong_shape",
        ),
        ({"pieces": [ENCODED | {"codec": "raw"}]}, "undecodable"),
        ({"pieces": [ENCODED | {"codec": "zip"}]}, "undecodable"),
        ({"pieces": [ENCODED | {"codec": ["q8"]}]}, "undecodable"),
        ({"pieces": [ENCODED | {"raw": -1}]}, "undecodable"),
        ({"pieces": [ENCODED | {"raw": 32}]}, "wrong_shape"),
        ({"pieces": [ENCODED | {"raw": 1 << 39}]}, "oversized"),
        ({"pieces": [ENCODED | {"size": encoded_limit(36) + 1}]}, "oversized"),
        ({"pieces": [ENCODED | {"bytes": 11}]}, "wrong_shape"),
        ({"pieces": [PIECE | {"codec": "q8"}]}, "undecodable"),
        ({"pieces": [BOTH | {"sizes": [6, 7]}]}, "wrong_shape"),
        ({"pieces": [BOTH | {"sizes": [6, 5]}]}, "wrong_shape"),
        ({"pieces": [BOTH | {"sizes": [12]}]}, "undecodable"),
        ({"pieces": [BOTH | {"sizes": 6}]}, "undecodable"),
        ({"pieces": [BOTH | {"sizes": [-6, 18]}]}, "undecodable"),
        ({"pieces": [BOTH | {"raw": 37}]}, "wrong_shape"),
        ({"pieces": [{**ALIKE, "samples": [0, 1], "sizes": [6, 6]}]}, "wrong_shape"),
        ({"plan": {"task_id": "t1"}}, "undecodable"),
        ({"plan": [1]}, "undecodable"),
        ({"report": {"edge_s": "soon"}}, "undecodable"),
        ({"report": [1]}, "undecodable"),
        ({"report": {"edge_s": float("nan")}}, "undecodable"),
        ({"report": {"edge_s": -1.0}}, "undecodable"),
        ({"report": {"edge_s": float("inf")}}, "undecodable"),
    ],
)
def test_what_is_wrong_is_refused_with_its_cause(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_frame(payload_of(**changes))
    assert caught.value.cause == cause


@pytest.mark.parametrize("payload", [None, b"", b"\x80", b"\xc1", b"garbage", b"\x80" * 1000, b"\x91" * 100_000])
def test_what_is_no_frame_is_refused(payload: bytes | None) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_frame(payload)
    assert caught.value.cause == "undecodable"


def test_too_large_a_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_frame(b"\x80" * (frames.MAX_FRAME_BYTES + 1))
    assert caught.value.cause == "oversized"


@pytest.mark.parametrize("seed", range(20))
def test_broken_bytes_raise_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    samples = [piece for sample in range(1 + seed % 3) for piece in to_pieces(sample, [np.arange(9.0)], 1000)]
    samples += [piece for sample in range(5, 7) for piece in to_pieces(sample, encoded(b"some bytes"), 1000)]
    good = encode_frame(Frame("activations", "t1", 2, "d1", tuple(samples), plan()))
    for _ in range(200):
        broken = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            frame = decode_frame(bytes(broken[: rng.randint(0, len(broken))] if rng.random() < 0.3 else broken))
            for piece in frame.pieces:
                Assembler().add(piece)
        except ProtocolError:
            pass


def test_pieces_point_into_the_payload() -> None:
    payload = payload_of()
    piece: Piece = decode_frame(payload).pieces[0]
    assert piece.data.obj is payload
